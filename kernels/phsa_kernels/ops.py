"""The Triton kernels as torch.library operators: launches, fakes and the backward of attention.

Every shape follows from the arguments' shapes alone: nothing is read back from the device.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from phsa_kernels.attend.launch import attend_backward, attend_forward, saved_shapes
from phsa_kernels.pool.kernels import cu_blocks_kernel, pool_kernel
from phsa_kernels.select.launch import select_blocks

_POOL_TOKENS = 64  # a program


@torch.library.custom_op("phsa::pool", mutates_args=())
def pool(
    k: Tensor, weights: Tensor | None, cu_seqlens: Tensor, block_tokens: int, vectors: int = 1
) -> Tensor:
    """Return the pooled keys [Tk // m, Hkv, vectors, D]: of whole blocks, or of their halves."""
    num_tokens, num_heads, head_dim = k.shape
    out = k.new_empty(num_tokens // block_tokens, num_heads, vectors, head_dim)
    if out.numel() == 0:
        return out
    cu_blocks, num_docs = torch.empty_like(cu_seqlens), len(cu_seqlens) - 1
    cu_blocks_kernel[(1,)](cu_seqlens, cu_blocks, num_docs, BLOCK=block_tokens, B=1024)
    w = k if weights is None else weights.view(num_tokens, -1)
    blocks = max(1, _POOL_TOKENS // block_tokens)
    pool_kernel[(triton.cdiv(out.shape[0], blocks), num_heads)](
        k, w, out, cu_seqlens, cu_blocks, num_docs, len(cu_seqlens).bit_length(), out.shape[0], k.stride(0),
        k.stride(1), w.stride(0), w.stride(1) if w.shape[1] > 1 else 0, out.stride(0), out.stride(1),
        HAS_WEIGHTS=weights is not None, VECTORS=vectors, BLOCK=block_tokens, D=head_dim, B=blocks,
    )  # fmt: skip
    return out


@pool.register_fake
def _(k: Tensor, weights: Tensor | None, cu_seqlens: Tensor, block_tokens: int, vectors: int = 1) -> Tensor:
    return k.new_empty(k.shape[0] // block_tokens, k.shape[1], vectors, k.shape[2])


@torch.library.custom_op("phsa::select", mutates_args=())
def select(
    q: Tensor,
    pooled: Tensor,
    q_pos: Tensor,
    q_doc: Tensor,
    cu_blocks: Tensor,
    topk: int,
    init_tokens: int,
    local_tokens: int,
    block_tokens: int,
    softmax: bool,
    scale: float,
) -> Tensor:
    """Return the chosen blocks int32 [Tq, Hkv, k]."""
    return select_blocks(
        q, pooled, q_pos, q_doc, cu_blocks, topk, init_tokens, local_tokens, block_tokens, softmax, scale
    )


@select.register_fake
def _(
    q: Tensor, pooled: Tensor, q_pos: Tensor, q_doc: Tensor, cu_blocks: Tensor, topk: int, *_: Any
) -> Tensor:
    return q.new_empty(q.shape[0], pooled.shape[1], topk, dtype=torch.int32)


@torch.library.custom_op("phsa::attend", mutates_args=())
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ids: Tensor,
    q_pos: Tensor,
    q_doc: Tensor,
    cu_seqlens: Tensor,
    init_tokens: int,
    local_tokens: int,
    block_tokens: int,
    dense_len_tokens: int,
    scale: float,
    block_slot: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (out, lse, rows, union): the last two are what backward needs to walk the same keys."""
    return attend_forward(
        q,
        k,
        v,
        ids,
        q_pos,
        q_doc,
        cu_seqlens,
        init_tokens,
        local_tokens,
        block_tokens,
        dense_len_tokens,
        scale,
        block_slot,
    )


@attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, ids: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, union = saved_shapes(q, k, ids)
    return (
        q.new_empty(q.shape),
        q.new_empty(q.shape[:2], dtype=torch.float32),
        q.new_empty(rows, dtype=torch.int32),
        q.new_empty(union, dtype=torch.int32),
    )


@torch.library.custom_op("phsa::attend_backward", mutates_args=())
def _attend_backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ids: Tensor,
    out: Tensor,
    lse: Tensor,
    rows: Tensor,
    union: Tensor,
    cu_seqlens: Tensor,
    init_tokens: int,
    block_tokens: int,
    scale: float,
    block_slot: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (dq, dk, dv)."""
    return attend_backward(
        grad_out, grad_lse, q, k, v, ids, out, lse, rows, union, cu_seqlens, init_tokens, block_tokens, scale,
        block_slot,
    )  # fmt: skip


@_attend_backward.register_fake
def _(
    grad_out: Tensor, grad_lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    q, k, v, ids, _, _, cu_seqlens, ctx.init_tokens, _, ctx.block_tokens, _, ctx.scale, block_slot = inputs
    out, lse, rows, union = output
    ctx.mark_non_differentiable(rows, union)
    ctx.save_for_backward(q, k, v, ids, out, lse, rows, union, cu_seqlens, block_slot)


def _backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    *saved, block_slot = ctx.saved_tensors
    grads = _attend_backward(
        grad_out, grad_lse, *saved, ctx.init_tokens, ctx.block_tokens, ctx.scale, block_slot
    )
    return (*grads, *[None] * 10)


attend.register_autograd(_backward, setup_context=_save)
