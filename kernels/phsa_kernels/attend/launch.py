"""Launches of the attention kernels, forward and backward."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from phsa_kernels.attend.backward import chosen_dkdv_kernel, dq_kernel
from phsa_kernels.attend.forward import forward_kernel
from phsa_kernels.attend.inverse import queries_by_block
from phsa_kernels.attend.plan import Rows, plan_key_tiles, plan_rows
from phsa_kernels.attend.slots import assert_distinct, key_rows, natural_keys
from phsa_kernels.attend.union import union_kernel
from phsa_kernels.attend.window_backward import init_partial_kernel, window_dkdv_kernel
from phsa_kernels.configs import Launch, configs_for
from phsa_kernels.primitives import aligned, tiles

# A tile's choices are sorted at once: a longer list is no longer worth its compilation.
_MAX_TILE_CHOICES = 2048
_WORD = 32  # queries whose choices one int32 holds
# Rows of init gradients are cut into chunks until about two programs run on every multiprocessor.
_MIN_INIT_CHUNK = 256
_MIN_INIT_PROGRAMS = 256


def _group_shape(q: Tensor, k: Tensor) -> dict[str, int]:
    group = q.shape[1] // k.shape[1]
    return {"GROUP": group, "GROUP_PADDED": triton.next_power_of_2(group), "D": q.shape[2]}


def _tile_queries(q: Tensor, k: Tensor, tile: Launch) -> int:
    """Return the queries of a tile: its rows shared among the heads of a group."""
    return max(1, tile.rows // _group_shape(q, k)["GROUP_PADDED"])


def _union_tile(q: Tensor, k: Tensor, topk: int) -> int:
    """Return the queries of a tile of forward and dQ, which share the unions: at most two words of bits."""
    most: int = _MAX_TILE_CHOICES // triton.next_power_of_2(max(topk, 1))
    return min(2 * _WORD, most, _tile_queries(q, k, configs_for(q.device, q.dtype).forward))


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for tensor in tensors for stride in tensor.stride()[:2]]


def saved_shapes(q: Tensor, k: Tensor, ids: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of `rows` and `union`, int32.

    rows [6, Tq]: the columns of `Rows`. union: first tokens [Hkv * tiles * T * k], bits (as many or twice),
    counts [Hkv * tiles].
    """
    topk = ids.shape[2]
    queries_in_tile = _union_tile(q, k, topk)
    tiles = triton.cdiv(q.shape[0], queries_in_tile) * k.shape[1]
    words = triton.cdiv(queries_in_tile, _WORD)
    return (6, q.shape[0]), (tiles * ((1 + words) * queries_in_tile * topk + 1),)


class _Unions(NamedTuple):
    """The parts of `union` and the sizes that go with them."""

    lists: tuple[Tensor, Tensor, Tensor]
    queries_in_tile: int
    tiles: int
    words: int
    word_stride: int


def _unions(union: Tensor, q: Tensor, k: Tensor, topk: int) -> _Unions:
    queries_in_tile = _union_tile(q, k, topk)
    tiles, words = triton.cdiv(q.shape[0], queries_in_tile), triton.cdiv(queries_in_tile, _WORD)
    entries = k.shape[1] * tiles * queries_in_tile * topk
    first_token, bits, count = union.split_with_sizes([entries, words * entries, k.shape[1] * tiles])
    return _Unions((first_token, bits, count), queries_in_tile, tiles, words, entries)


def attend_forward(
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
    block_slot: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (out, lse, rows, union)."""
    rows_shape, union_shape = saved_shapes(q, k, ids)
    k, v = aligned(k), aligned(v)
    num_queries, num_heads, head_dim = q.shape
    num_kv_heads, topk = k.shape[1], ids.shape[2]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = q.new_empty(num_queries, num_heads, dtype=torch.float32)
    union = torch.empty(union_shape, dtype=torch.int32, device=q.device)
    if num_queries == 0:
        return out, lse, q.new_empty(rows_shape, dtype=torch.int32), union
    rows = plan_rows(
        q_pos,
        q_doc,
        cu_seqlens,
        init_tokens=init_tokens,
        local_tokens=local_tokens,
        block_tokens=block_tokens,
        dense_len_tokens=dense_len_tokens,
    )
    plan = Rows(*rows.unbind(0))
    slots = None if block_slot is None else key_rows(cu_seqlens, block_slot, len(k), block_tokens)
    tile, unions = configs_for(q.device, q.dtype).forward, _unions(union, q, k, topk)
    if topk > 0:
        union_kernel[(unions.tiles, num_kv_heads)](
            ids, plan.order, plan.start, plan.init_end, plan.local_start, *unions.lists, num_queries,
            unions.tiles, num_kv_heads, unions.word_stride, TOPK=topk,
            TOPK_PADDED=triton.next_power_of_2(topk), BLOCK=block_tokens, T=unions.queries_in_tile,
            WORDS=unions.words,
            WIDE=natural_keys(k, block_slot, block_tokens) * unions.queries_in_tile >= 2**31,
        )  # fmt: skip
    keys = max(tile.keys, block_tokens)
    forward_kernel[(unions.tiles, num_kv_heads)](
        q, k, v, tiles(k, keys), tiles(v, keys), out, lse, *plan, cu_seqlens, *unions.lists, slots,
        num_queries, unions.tiles, num_heads, unions.word_stride, scale, *_strides(q, k, v, out),
        INIT=init_tokens, TOPK=topk, **_group_shape(q, k), BLOCK=block_tokens, T=unions.queries_in_tile,
        WORDS=unions.words, BN=keys, **tile.options(),
    )  # fmt: skip
    return out, lse, rows, union


def attend_backward(
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
    block_slot: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (dq, dk, dv), each in the dtype of its tensor and contiguous."""
    num_queries, num_heads, _ = q.shape
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    if num_queries == 0:
        return dq, dk.zero_(), dv.zero_()
    k, v = aligned(k), aligned(v)
    num_keys, slots = natural_keys(k, block_slot, block_tokens), None
    if block_slot is not None:
        slots = key_rows(cu_seqlens, block_slot, len(k), block_tokens)
        assert_distinct(slots)
        dk.zero_(), dv.zero_()  # rows of no key
    grad_out, grad_lse = grad_out.contiguous(), grad_lse.contiguous()
    configs, shape, topk = configs_for(q.device, q.dtype), _group_shape(q, k), ids.shape[2]
    plan, unions = Rows(*rows.unbind(0)), _unions(union, q, k, ids.shape[2])
    delta = torch.empty_like(lse)
    reads, tile = (grad_out, lse, delta), configs.dq
    keys = max(tile.keys, block_tokens)
    # First, for it fills delta, which the kernels of dk and dv read.
    dq_kernel[(unions.tiles, k.shape[1])](
        q, k, v, tiles(k, keys), tiles(v, keys), out, grad_out, grad_lse, lse, delta, dq, *plan,
        cu_seqlens, *unions.lists, slots, num_queries, unions.tiles, num_heads, unions.word_stride, scale,
        *_strides(q, k, v, out, grad_out), INIT=init_tokens, TOPK=topk, **shape, BLOCK=block_tokens,
        T=unions.queries_in_tile, WORDS=unions.words, BN=keys, **tile.options(),
    )  # fmt: skip
    _window_gradients(q, k, v, reads, dk, dv, plan, cu_seqlens, slots, num_keys, init_tokens, scale)
    if topk > 0 and num_keys >= block_tokens:
        inverse = queries_by_block(
            unions.lists, plan.order, k.shape[1], num_keys, topk=topk, block_tokens=block_tokens,
            queries_in_tile=unions.queries_in_tile,
        )  # fmt: skip
        tile = configs.chosen_dkdv
        chosen_dkdv_kernel[(len(inverse.starts), k.shape[1])](
            q, k, v, *reads, dk, dv, *inverse, slots, len(inverse.starts), num_heads, k.shape[1], scale,
            *_strides(q, k, v, grad_out), **shape, BLOCK=block_tokens, T=_tile_queries(q, k, tile),
            **tile.options(),
        )  # fmt: skip
    return dq, dk, dv


def _init_chunk(most: int, num_rows: int, programs_a_chunk: int) -> int:
    """Return the rows whose init gradients one program sums: `most`, fewer if few programs would run."""
    chunk = most
    while chunk > _MIN_INIT_CHUNK and triton.cdiv(num_rows, chunk) * programs_a_chunk < _MIN_INIT_PROGRAMS:
        chunk //= 2
    return chunk


def _window_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    reads: tuple[Tensor, Tensor, Tensor],
    dk: Tensor,
    dv: Tensor,
    plan: Rows,
    cu_seqlens: Tensor,
    slots: Tensor | None,
    num_keys: int,
    init_tokens: int,
    scale: float,
) -> None:
    """Write the windows' share of dk and dv."""
    configs, shape = configs_for(q.device, q.dtype), _group_shape(q, k)
    tile = configs.window_dkdv
    sizes = (q.shape[1], k.shape[1], scale, *_strides(q, k, v, reads[0]))
    key_tiles = plan_key_tiles(plan, cu_seqlens, num_keys, tile.keys)
    if slots is not None:  # tiles may reach past the last document
        key_tiles.docs.clamp_(max=len(cu_seqlens) - 2)
    init_padded = triton.cdiv(init_tokens, tile.keys) * tile.keys
    chunk = _init_chunk(configs.init_chunk_rows, q.shape[0], k.shape[1] * init_padded // tile.keys)
    chunks = triton.cdiv(q.shape[0], chunk)
    partial = q.new_empty(2, chunks, k.shape[1], init_padded, q.shape[2], dtype=torch.float32)
    common = {"INIT": init_tokens, "CHUNK": chunk, "INIT_PADDED": init_padded}
    common |= {"T": _tile_queries(q, k, tile), "BN": tile.keys}
    if init_tokens > 0:
        init_partial_kernel[(chunks, k.shape[1], init_padded // tile.keys)](
            q, k, v, *reads, partial[0], partial[1], plan.order, plan.doc, plan.init_end, cu_seqlens,
            key_tiles.doc_rows, slots, q.shape[0], *sizes, **common, **shape, **tile.options(),
        )  # fmt: skip
    window_dkdv_kernel[(key_tiles.docs.shape[1] * k.shape[1],)](
        q, k, v, *reads, dk, dv, partial[0], partial[1], plan.order, plan.start, plan.init_end,
        plan.local_start, plan.position, cu_seqlens, key_tiles.doc_rows, key_tiles.docs, key_tiles.rows,
        slots, num_keys, key_tiles.docs.shape[1], *sizes, **common, **shape, **tile.options(),
    )  # fmt: skip
