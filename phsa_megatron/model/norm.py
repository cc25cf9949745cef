"""RMSNorm for megatron layers, with and without sequence parallelism, on any device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from phsa_megatron.config.schema import Norm


class RMSNorm(torch.nn.RMSNorm):
    """Root-mean-square norm whose weight megatron reduces correctly under sequence parallelism.

    Without Transformer Engine megatron wraps torch's norm and refuses sequence parallelism, only because
    nobody marks the weight: each process sees a part of the sequence, so that gradients have to be summed.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-6, **labels: Any) -> None:
        """Take what megatron passes to a norm: its config, width and epsilon; `labels` name the module."""
        unknown = labels.keys() - {"name", "persist_layer_norm", "zero_centered_gamma", "normalization"}
        if unknown:
            raise TypeError(f"RMSNorm got arguments it does not know: {sorted(unknown)}")
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class TritonRMSNorm(RMSNorm):
    """The same by our kernels, on a GPU."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x [..., n] normalized."""
        # Triton is not there on every machine that has this module.
        from phsa_megatron.model.norm_kernels import rms_norm

        assert self.eps is not None
        return rms_norm(x, self.weight, self.eps)


def norm_class(norm: Norm) -> type[RMSNorm]:
    """Return whose norm `compute.norm` asks for."""
    return TritonRMSNorm if norm == Norm.triton else RMSNorm
