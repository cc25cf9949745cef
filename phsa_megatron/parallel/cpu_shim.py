"""megatron-core on a machine without CUDA: its hard-coded `cuda` devices become the CPU.

megatron-core has no CPU path of its own. Its mathematics does not need a GPU, but some sixty call sites ask
`torch.cuda` for the current device, allocate on `device="cuda"`, or recognize a parameter by the string
`torch.cuda.FloatTensor`. `install()` answers those calls with the CPU. Nothing in site-packages is edited,
and with CUDA nothing happens at all.

It has to run before megatron's first import: `torch.compile` is bound to megatron's functions while they are
imported, and modules copy names out of `torch.cuda`. It stays on for the whole process.

Threads: a torch function mode belongs to the thread that entered it. That is enough: on the CPU the backward
pass runs in the thread that called it, activation recomputation included. A thread that reads data or writes
files calls no megatron code that names a device.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from phsa_megatron.parallel import mcore

_CPU = torch.device("cpu")
_installed_mode: TorchFunctionMode | None = None

# jit_fuser is torch.compile: on a CPU it would start a C++ compiler for functions of three lines.
_ENVIRONMENT = {"TORCH_COMPILE_DISABLE": "1", "TORCHDYNAMO_DISABLE": "1"}


def install(*, hide_gpu: bool = False) -> bool:
    """Make megatron-core run on the CPU if there is no CUDA; return whether the shim is on.

    Args:
        hide_gpu: hide the GPUs of this machine from the process first, for a run with `cluster.device=cpu`.

    Raises:
        RuntimeError: `megatron.core` was imported before, or CUDA was used before it could be hidden.

    A second call does nothing.
    """
    global _installed_mode
    if _installed_mode is not None:
        return True
    if not hide_gpu and torch.cuda.is_available():
        return False
    if "megatron.core" in sys.modules:
        raise RuntimeError(
            "cpu_shim.install() came after `import megatron.core`: megatron copies torch names when it is "
            "imported, so that the shim would be incomplete. Call install() at the top of the entry point."
        )
    if hide_gpu:
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            raise RuntimeError("cpu_shim.install(hide_gpu=True) came after CUDA was used in this process")
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        if torch.cuda.is_available():
            raise RuntimeError(
                "cpu_shim.install(hide_gpu=True) came after CUDA was looked for in this process"
            )
    os.environ.update(_ENVIRONMENT)
    mcore.hide_known_notices()
    _installed_mode = _CudaMeansCpu()
    _installed_mode.__enter__()  # type: ignore[no-untyped-call]
    _replace_torch_cuda()
    _replace_megatron_rng()
    return True


def is_installed() -> bool:
    """Return whether megatron's CUDA calls are answered with the CPU in this process."""
    return _installed_mode is not None


def _names_cuda(device: Any) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.startswith("cuda")


class _CudaMeansCpu(TorchFunctionMode):
    """Rewrites the arguments of torch calls that ask for CUDA."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # The optimizer and clip_grads sort parameters by this string and raise on a CPU name.
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if _names_cuda(kwargs.get("device")):
            kwargs = {**kwargs, "device": _CPU}
        if kwargs.get("pin_memory"):
            # Page-locked memory needs a CUDA driver.
            kwargs = {**kwargs, "pin_memory": False}
        if func is torch.Tensor.to and len(args) > 1 and _names_cuda(args[1]):
            args = (args[0], _CPU, *args[2:])
        return func(*args, **kwargs)


class _CpuStream:
    """A CUDA stream or event whose work is always done: on the CPU calls return when they are finished."""

    device = _CPU
    cuda_stream = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def wait_stream(self, *args: Any) -> None:
        pass

    def wait_event(self, *args: Any) -> None:
        pass

    def wait(self, *args: Any) -> None:
        pass

    def record(self, *args: Any) -> None:
        pass

    def record_event(self, *args: Any) -> _CpuStream:
        return _CpuStream()

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: Any) -> float:
        return 0.0


def _replace_torch_cuda() -> None:
    """Replace the functions of `torch.cuda` that fail without a driver and that megatron calls."""
    cuda: Any = torch.cuda
    # `device=torch.cuda.current_device()` is megatron's most frequent way to name a device.
    cuda.current_device = lambda: _CPU
    cuda.set_device = lambda device: None
    # Pipeline sends, timers and checkpoint writers wait for the device.
    cuda.synchronize = lambda device=None: None
    cuda.current_stream = cuda.default_stream = lambda device=None: _CpuStream()
    cuda.Stream = cuda.Event = _CpuStream
    cuda.stream = _no_stream
    cuda.empty_cache = lambda: None
    cuda.memory_allocated = cuda.max_memory_allocated = lambda device=None: 0
    # The random states that megatron tracks are those of the only generator there is.
    cuda.get_rng_state = cuda.random.get_rng_state = lambda device=None: torch.get_rng_state()
    cuda.set_rng_state = cuda.random.set_rng_state = lambda state, device=None: torch.set_rng_state(state)
    cuda.manual_seed = cuda.random.manual_seed = _manual_seed


def _no_stream(stream: Any) -> AbstractContextManager[None]:
    return nullcontext()


def _manual_seed(seed: int) -> None:
    torch.manual_seed(seed)


def _replace_megatron_rng() -> None:
    """Let megatron's tracker and its activation recomputation save and restore the CPU generator."""
    import megatron.core.tensor_parallel.random as megatron_random

    def get_state(device: Any = "cuda", clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(new_state: torch.Tensor, device: Any = -1, graph_safe: bool = False) -> None:
        torch.set_rng_state(new_state)

    megatron_random._get_cuda_rng_state = get_state
    megatron_random._set_cuda_rng_state = set_state
    # The tracker warns when the CPU generator moves inside a fork: here that is the generator it tracks.
    logging.getLogger(megatron_random.__name__).addFilter(
        lambda record: "CPU RNG state changed" not in record.getMessage()
    )
