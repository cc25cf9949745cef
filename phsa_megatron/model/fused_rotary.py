"""RoPE of queries or keys in one kernel: megatron's chain of operations reads and writes them a dozen times.

Cosines and sines are fp32, where megatron rounds them to the dtype of the queries.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor


def rotate_compiled(t: Tensor, freqs: Tensor, interleaved: bool = False) -> Tensor:
    """Return t [S, b, heads, D] rotated by the angles `freqs` [S, 1, 1, D], fp32, whose halves are alike.

    Called by megatron for `apply_rope_fusion`. Nothing but cosines and sines, shared by all layers, is kept
    for the backward pass.

    Raises:
        ValueError: interleaved pairs, or angles that do not cover all channels.
    """
    if interleaved or freqs.shape[-1] != t.shape[-1]:
        raise ValueError(
            f"the fused rotation turns channel i with channel i + D / 2, all D={t.shape[-1]} of them; asked "
            f"for interleaved={interleaved} and {freqs.shape[-1]} channels"
        )
    rotated: Tensor = _Rotation.apply(t, *_cosines_and_sines(freqs))  # type: ignore[no-untyped-call]
    return rotated


def _cosines_and_sines(freqs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return cos, sin and -sin of the first half of the angles, fp32 [S, 1, 1, D / 2].

    Megatron hands the same tensor of angles to every layer of every step: they are kept with it.
    """
    kept: tuple[Tensor, Tensor, Tensor] | None = getattr(freqs, "cosines_and_sines", None)
    if kept is None:
        half = freqs[..., : freqs.shape[-1] // 2].float()
        kept = half.cos(), half.sin(), -half.sin()
        freqs.cosines_and_sines = kept  # type: ignore[attr-defined]
    return kept


def rotate(t: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return t with channels i and i + D / 2 turned by the angles, computed in fp32, in the dtype of t."""
    first, second = t.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(t.dtype)


@cache
def _compiled() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    # Not at import: the compiler takes seconds to load, and most runs of the tests never need it.
    return torch.compile(rotate)


class _Rotation(torch.autograd.Function):
    """The backward pass turns gradients the other way."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, cos: Tensor, sin: Tensor, negative_sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, negative_sin)
        return _compiled()(t, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _compiled()(grad, *ctx.saved_tensors), None, None, None
