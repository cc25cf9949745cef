"""Launches of the attention kernels, forward and backward."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from phsa_kernels.attend.backward import chosen_dkdv_kernel, delta_kernel, dq_kernel
from phsa_kernels.attend.forward import forward_kernel
from phsa_kernels.attend.plan import Rows, block_starts, plan_rows, queries_by_block
from phsa_kernels.attend.union import union_kernel
from phsa_kernels.attend.window_backward import init_partial_kernel, window_dkdv_kernel
from phsa_kernels.configs import Launch, configs_for

_MAX_TILE_QUERIES = 32  # one bit each


def _group_shape(q: Tensor, k: Tensor) -> dict[str, int]:
    group = q.shape[1] // k.shape[1]
    return {"GROUP": group, "GROUP_PADDED": triton.next_power_of_2(group), "D": q.shape[2]}


def _tile_queries(q: Tensor, k: Tensor, tile: Launch) -> int:
    """Return the queries of a tile: its rows shared among the heads of a group, at most one bit each."""
    return min(_MAX_TILE_QUERIES, max(1, tile.rows // _group_shape(q, k)["GROUP_PADDED"]))


def _union_tile(q: Tensor, k: Tensor) -> int:
    """Return the tile size that forward and dQ share, because they share the unions."""
    return _tile_queries(q, k, configs_for(q.device).forward)


def _options(tile: Launch) -> dict[str, int]:
    return {"num_warps": tile.num_warps, "num_stages": tile.num_stages}


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for tensor in tensors for stride in tensor.stride()[:2]]


def saved_shapes(q: Tensor, k: Tensor, ids: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of `rows` and `union`, int32.

    rows [6, Tq]: the columns of `Rows`. union [Hkv * tiles * (2 T k + 1)]: first tokens, bits, counts.
    """
    queries_in_tile = _union_tile(q, k)
    tiles = -(-q.shape[0] // queries_in_tile)
    return (6, q.shape[0]), (k.shape[1] * tiles * (2 * queries_in_tile * ids.shape[2] + 1),)


def _split_union(union: Tensor, num_kv_heads: int, num_tiles: int) -> tuple[Tensor, Tensor, Tensor]:
    counts = num_kv_heads * num_tiles
    entries = (len(union) - counts) // 2
    first_token, bits, count = union.split_with_sizes([entries, entries, counts])
    return first_token, bits, count


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (out, lse, rows, union)."""
    rows_shape, union_shape = saved_shapes(q, k, ids)
    num_queries, num_heads, head_dim = q.shape
    num_kv_heads, topk = k.shape[1], ids.shape[2]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = q.new_empty(num_queries, num_heads, dtype=torch.float32)
    union = torch.zeros(union_shape, dtype=torch.int32, device=q.device)
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
    tile = configs_for(q.device).forward
    queries_in_tile = _union_tile(q, k)
    tiles = triton.cdiv(num_queries, queries_in_tile)
    lists = _split_union(union, num_kv_heads, tiles)
    if topk > 0:
        union_kernel[(tiles, num_kv_heads)](
            ids, rows.order, rows.start, rows.init_end, rows.local_start, *lists, num_queries, tiles,
            num_kv_heads, TOPK=topk, TOPK_PADDED=triton.next_power_of_2(topk), BLOCK=block_tokens,
            T=queries_in_tile,
        )  # fmt: skip
    forward_kernel[(tiles, num_kv_heads)](
        q, k, v, out, lse, *rows, cu_seqlens, *lists, num_queries, tiles, num_heads, scale,
        *_strides(q, k, v, out), INIT=init_tokens, TOPK=topk, **_group_shape(q, k), BLOCK=block_tokens,
        T=queries_in_tile, BN=max(tile.keys, block_tokens), **_options(tile),
    )  # fmt: skip
    return out, lse, torch.stack(rows), union


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
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (dq, dk, dv), each in the dtype of its tensor and contiguous."""
    num_queries, num_heads, head_dim = q.shape
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dk, dv = (torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (k, v))
    if num_queries == 0:
        return dq, dk, dv
    grad_out, grad_lse = grad_out.contiguous(), grad_lse.contiguous()
    configs, shape = configs_for(q.device), _group_shape(q, k)
    plan = Rows(*rows.unbind(0))
    tile, queries_in_tile = configs.dq, _union_tile(q, k)
    tiles = triton.cdiv(num_queries, queries_in_tile)
    delta = torch.empty_like(lse)
    delta_kernel[(triton.cdiv(num_queries, 32), num_heads)](
        out, grad_out, grad_lse, delta, num_queries, num_heads, *_strides(out, grad_out), D=head_dim, T=32
    )
    reads = (grad_out, lse, delta)
    dq_kernel[(tiles, k.shape[1])](
        q, k, v, *reads, dq, *plan, cu_seqlens, *_split_union(union, k.shape[1], tiles), num_queries, tiles,
        num_heads, scale, *_strides(q, k, v, grad_out), INIT=init_tokens, TOPK=ids.shape[2], **shape,
        BLOCK=block_tokens, T=queries_in_tile, BN=max(tile.keys, block_tokens), **_options(tile),
    )  # fmt: skip
    num_blocks = k.shape[0] // block_tokens
    chosen = ids.shape[2] > 0 and num_blocks > 0
    if chosen:
        starts = block_starts(cu_seqlens, k.shape[0], block_tokens)
        inverse = queries_by_block(ids, plan, cu_seqlens, num_blocks, block_tokens)
        tile = configs.chosen_dkdv
        chosen_dkdv_kernel[(num_blocks, k.shape[1])](
            q, k, v, *reads, dk, dv, starts, *inverse, num_blocks, num_heads, k.shape[1], scale,
            *_strides(q, k, v, grad_out), **shape, BLOCK=block_tokens, T=_tile_queries(q, k, tile),
            **_options(tile),
        )  # fmt: skip
    _window_gradients(q, k, v, reads, dk, dv, plan, cu_seqlens, init_tokens, scale, add=chosen)
    return dq, dk, dv


def _window_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    reads: tuple[Tensor, Tensor, Tensor],
    dk: Tensor,
    dv: Tensor,
    plan: Rows,
    cu_seqlens: Tensor,
    init_tokens: int,
    scale: float,
    *,
    add: bool,
) -> None:
    """Add the windows' share to dk and dv (overwrite unless `add`)."""
    configs, shape = configs_for(q.device), _group_shape(q, k)
    tile, chunk = configs.window_dkdv, configs.init_chunk_rows
    sizes = (q.shape[1], k.shape[1], scale, *_strides(q, k, v, reads[0]))
    first_key = torch.arange(0, k.shape[0], tile.keys, device=q.device, dtype=torch.int32)
    last_key = (first_key + tile.keys - 1).clamp(max=k.shape[0] - 1)
    doc_rows = torch.searchsorted(plan.position, cu_seqlens).to(torch.int32)
    tile_docs = torch.searchsorted(cu_seqlens, torch.stack([first_key, last_key]), right=True) - 1
    tile_rows = torch.stack(
        [
            torch.searchsorted(plan.position, first_key),
            torch.searchsorted(plan.local_start, last_key, right=True),
        ]
    )
    init_padded = triton.cdiv(init_tokens, tile.keys) * tile.keys
    chunks = triton.cdiv(q.shape[0], chunk)
    partial = q.new_empty(2, chunks, k.shape[1], init_padded, q.shape[2], dtype=torch.float32)
    common = {"CHUNK": chunk, "INIT_PADDED": init_padded, "T": _tile_queries(q, k, tile), "BN": tile.keys}
    if init_tokens > 0:
        init_partial_kernel[(chunks, k.shape[1], init_padded // tile.keys)](
            q, k, v, *reads, partial[0], partial[1], plan.order, plan.doc, plan.init_end, cu_seqlens,
            doc_rows, q.shape[0], *sizes, **common, **shape, **_options(tile),
        )  # fmt: skip
    window_dkdv_kernel[(len(first_key), k.shape[1])](
        q, k, v, *reads, dk, dv, partial[0], partial[1], plan.order, plan.start, plan.init_end,
        plan.local_start, plan.position, cu_seqlens, doc_rows, tile_docs.to(torch.int32),
        tile_rows.to(torch.int32), k.shape[0], len(first_key), *sizes, INIT=init_tokens, ADD=add,
        **common, **shape, **_options(tile),
    )  # fmt: skip
