"""What the server of forks (`forks.py`) has loaded: the training process's modules, in their order."""

import gc

from phsa_megatron.parallel import collective_trace, cpu_shim

# Before the shim, which imports megatron.
collective_trace.install()
cpu_shim.install(hide_gpu=True)

import torch  # noqa: E402

import phsa_megatron.train  # noqa: E402
import phsa_megatron.training.loop  # noqa: E402, F401

torch.set_num_threads(1)
# What is loaded stays: a fork's collector need not look at it, nor write to its pages.
gc.freeze()
