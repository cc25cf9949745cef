"""Norms and SwiGLU alone, forward and backward, in the implementations that could be chosen."""

from __future__ import annotations

import importlib.util
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import rms_norm, silu

from phsa_megatron.model.fused_rotary import rotate, rotate_compiled

TOKENS = 32768
SHAPES = {"norm of the residual stream": (TOKENS, 1024), "norm of heads": (TOKENS * 16, 128)}


def op_times(device: str) -> dict[str, Any]:
    """Return milliseconds of a forward and a backward pass, by operation and implementation.

    Liger's kernels are among them where that package is installed.
    """
    found: dict[str, dict[str, float | str]] = {}
    for name, (implementation, inputs) in _candidates(device):
        try:
            milliseconds: float | str = round(_forward_backward_ms(implementation, inputs), 4)
        except Exception as error:  # one that does not run here is a result as well
            traceback.print_exc()
            milliseconds = f"{type(error).__name__}: {error}"[:200]
        operation, label = name
        found.setdefault(operation, {})[label] = milliseconds
        print(f"{operation}, {label}: {milliseconds} ms", flush=True)
    return {"ops_ms": found}


def _candidates(
    device: str,
) -> Iterator[tuple[tuple[str, str], tuple[Callable[..., Tensor], list[Tensor]]]]:
    liger = importlib.util.find_spec("liger_kernel") is not None
    for operation, (rows, width) in SHAPES.items():
        rows = rows if device == "cuda" else rows // 1024
        inputs = [_random(rows, width, device), torch.ones(width, device=device, dtype=torch.bfloat16)]
        inputs[1].requires_grad_()

        def plain(x: Tensor, weight: Tensor) -> Tensor:
            return rms_norm(x, weight.shape, weight, 1e-6)

        yield (operation, "torch"), (plain, inputs)
        yield (operation, "compiled"), (torch.compile(plain), inputs)
        if device == "cuda":
            yield (operation, "ours"), (_our_norm, inputs)
        if liger:
            yield (operation, "Liger"), (_liger_norm, inputs)
    yield from _head_norm_and_rotation(device)
    rows = TOKENS if device == "cuda" else TOKENS // 1024
    wide = [_random(rows, 2 * 3072, device)]

    def swiglu(x: Tensor) -> Tensor:
        gate, up = x.chunk(2, dim=-1)
        return silu(gate) * up

    yield ("SwiGLU", "torch"), (swiglu, wide)
    yield ("SwiGLU", "compiled"), (torch.compile(swiglu), wide)
    if liger:
        yield ("SwiGLU", "Liger"), (_liger_swiglu, wide)


def _head_norm_and_rotation(
    device: str,
) -> Iterator[tuple[tuple[str, str], tuple[Callable[..., Tensor], list[Tensor]]]]:
    """Yield queries through their norm and RoPE: one after the other, and as one compiled function."""
    tokens = TOKENS if device == "cuda" else TOKENS // 1024
    queries = torch.randn(tokens, 1, 16, 128, device=device, dtype=torch.bfloat16).requires_grad_()
    weight = torch.ones(128, device=device, dtype=torch.bfloat16).requires_grad_()
    half = torch.rand(tokens, 1, 1, 64, device=device)
    cos, sin, freqs = half.cos(), half.sin(), torch.cat((half, half), dim=-1)

    def apart(x: Tensor, scale: Tensor) -> Tensor:
        return rotate_compiled(rms_norm(x, scale.shape, scale, 1e-6), freqs)

    def together(x: Tensor, scale: Tensor) -> Tensor:
        return rotate(rms_norm(x.float(), scale.shape, scale.float(), 1e-6), cos, sin).to(x.dtype)

    yield ("norm of heads and RoPE", "torch"), (apart, [queries, weight])
    yield ("norm of heads and RoPE", "compiled"), (torch.compile(together), [queries, weight])


def _our_norm(x: Tensor, weight: Tensor) -> Tensor:
    from phsa_megatron.model.norm_kernels import rms_norm

    return rms_norm(x, weight, 1e-6)


def _liger_norm(x: Tensor, weight: Tensor) -> Tensor:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    result: Tensor = LigerRMSNormFunction.apply(x, weight, 1e-6, 0.0, "llama", False)
    return result


def _liger_swiglu(x: Tensor) -> Tensor:
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    gate, up = (part.contiguous() for part in x.chunk(2, dim=-1))
    result: Tensor = LigerSiLUMulFunction.apply(gate, up)
    return result


def _random(rows: int, width: int, device: str) -> Tensor:
    return torch.randn(rows, width, device=device, dtype=torch.bfloat16).requires_grad_()


def _forward_backward_ms(implementation: Callable[..., Tensor], inputs: list[Tensor]) -> float:
    on_gpu = inputs[0].is_cuda
    grad = torch.randn_like(implementation(*inputs))
    times = []
    for _ in range(25):
        for tensor in inputs:
            tensor.grad = None
        if on_gpu:
            torch.cuda.synchronize()
        start_s = time.perf_counter()
        torch.autograd.backward(implementation(*inputs), grad)
        if on_gpu:
            torch.cuda.synchronize()
        times.append((time.perf_counter() - start_s) * 1e3)
    return statistics.median(times[5:])
