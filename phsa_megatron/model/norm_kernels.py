"""RMSNorm as two Triton kernels: every number is read and written once, gradients of the weight on the way.

torch's own takes 2.6 times as long as the memory allows at the widths of a 0.6B model, Liger-Kernel's and a
compiled one are slower still (docs/results/h100_training.md, "Norms and SwiGLU alone").
"""

# Arguments of Triton functions are pointers, blocks and scalars of no Python type.
# ruff: noqa: ANN001, ANN201
# mypy: disallow-untyped-defs=false, disallow-untyped-decorators=false
# mypy: disallow-untyped-calls=false, disallow-incomplete-defs=false

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from phsa_megatron.config.compute_rules import WIDEST_NORM

_TILE_NUMBERS = 4096  # of one program's step
_PROGRAMS_PER_MULTIPROCESSOR = 4  # of the backward pass: each keeps a sum of its rows for the weight


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return x / sqrt(mean(x^2) + eps) * weight over the last dimension, computed in fp32, in the dtype of x.

    Args:
        x: [..., n], bf16, fp16 or fp32, on a GPU; with [..., heads, n] the heads may be a part of wider rows.
        weight: [n].
        eps: added to the mean of squares.

    Raises:
        ValueError: another dtype or width.
    """
    width = x.shape[-1]
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32) or width > WIDEST_NORM:
        raise ValueError(
            f"compute.norm=triton normalizes rows of up to {WIDEST_NORM} bf16, fp16 or fp32 numbers, not "
            f"{width} of {x.dtype}: set compute.norm=torch"
        )
    out: Tensor = _RMSNorm.apply(x, weight, eps)
    return out


@triton.jit
def rms_norm_forward_kernel(
    X, W, Y, RSTD, num_rows, heads, stride_t, stride_h, eps, N: tl.constexpr, P: tl.constexpr, B: tl.constexpr
):
    """B rows of Y = X * RSTD * W; RSTD fp32 is one over the root of the mean square."""
    row = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    column = tl.arange(0, P)
    inside = (row < num_rows)[:, None] & (column < N)[None, :]
    at = row // heads * stride_t + row % heads * stride_h
    x = tl.load(X + at[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)
    rstd = 1.0 / tl.sqrt(tl.sum(x * x, 1) / N + eps)
    weight = tl.load(W + column, mask=column < N, other=0.0).to(tl.float32)
    y = x * rstd[:, None] * weight[None, :]
    tl.store(Y + row[:, None] * N + column[None, :], y.to(Y.dtype.element_ty), mask=inside)
    tl.store(RSTD + row, rstd, mask=row < num_rows)


@triton.jit
def rms_norm_backward_kernel(
    DY, X, W, RSTD, DX, PARTIAL, num_rows, heads, stride_t, stride_h,
    N: tl.constexpr, P: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """DX of all rows, and of each program the sum over its rows of DY * X * RSTD."""
    column = tl.arange(0, P)
    weight = tl.load(W + column, mask=column < N, other=0.0).to(tl.float32)
    total = tl.zeros([B, P], tl.float32)
    for first in range(tl.program_id(0) * B, num_rows, tl.num_programs(0) * B):
        row = (first + tl.arange(0, B)).to(tl.int64)
        inside = (row < num_rows)[:, None] & (column < N)[None, :]
        at = row // heads * stride_t + row % heads * stride_h
        rstd = tl.load(RSTD + row, mask=row < num_rows, other=0.0)
        x = tl.load(X + at[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(DY + row[:, None] * N + column[None, :], mask=inside, other=0.0).to(tl.float32)
        normal = x * rstd[:, None]
        total += dy * normal
        scaled = dy * weight[None, :]
        dx = rstd[:, None] * (scaled - normal * (tl.sum(scaled * normal, 1) / N)[:, None])
        tl.store(DX + row[:, None] * N + column[None, :], dx.to(DX.dtype.element_ty), mask=inside)
    tl.store(PARTIAL + tl.program_id(0) * N + column, tl.sum(total, 0), mask=column < N)


class _RMSNorm(torch.autograd.Function):
    """Keeps x as it is, a view of wider rows too, and one fp32 number a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x, strides = _rows(x)
        num_rows, width = x.numel() // x.shape[-1], x.shape[-1]
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        rstd = torch.empty(num_rows, dtype=torch.float32, device=x.device)
        sizes = _sizes(width)
        grid = (triton.cdiv(num_rows, sizes["B"]),)
        rms_norm_forward_kernel[grid](x, weight, y, rstd, num_rows, *strides, eps, **sizes, num_warps=4)
        ctx.save_for_backward(x, weight, rstd)
        ctx.strides = strides
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, rstd = ctx.saved_tensors
        num_rows, width = len(rstd), x.shape[-1]
        sizes = _sizes(width)
        programs = min(triton.cdiv(num_rows, sizes["B"]), _programs(x.device))
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        partial = torch.empty(programs, width, dtype=torch.float32, device=x.device)
        rms_norm_backward_kernel[(programs,)](
            grad.contiguous(), x, weight, rstd, dx, partial, num_rows, *ctx.strides, **sizes, num_warps=8
        )
        return dx, partial.sum(0).to(weight.dtype), None


def _rows(x: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
    """Return x, copied only if need be, and (heads of a token, its stride, a head's stride)."""
    heads = x.shape[-2] if x.dim() > 2 else 1
    tokens = x.shape[:-2] if x.dim() > 2 else x.shape[:-1]
    strides = [s for size, s in zip(tokens, x.stride(), strict=False) if size > 1]
    if x.stride(-1) != 1 or len(strides) > 1:
        x = x.contiguous()
    if x.is_contiguous():
        return x, (heads, heads * x.shape[-1], x.shape[-1])
    return x, (heads, strides[0] if strides else 0, x.stride(-2) if x.dim() > 2 else 0)


@cache
def _sizes(width: int) -> dict[str, int]:
    padded = triton.next_power_of_2(width)
    return {"N": width, "P": padded, "B": max(1, _TILE_NUMBERS // padded)}


@cache
def _programs(device: torch.device) -> int:
    if device.type != "cuda":  # Triton's interpreter
        return 3
    processors: int = torch.cuda.get_device_properties(device).multi_processor_count
    return _PROGRAMS_PER_MULTIPROCESSOR * processors
