"""Where each query looks, as tensors of fixed shape: no value ever reaches the host.

Queries are put in the order of their keys (documents lie one after another), so that a tile of consecutive
rows looks at one short stretch of keys whatever order the caller's queries have. All positions here count
tokens from the start of k, not of a document.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from phsa_kernels.api import block_boundaries


class Rows(NamedTuple):
    """Int32 [Tq] each, in key order: row i is the query `order[i]`.

    It sees the keys [start, init_end), [local_start, position] and its chosen blocks between the two.
    """

    order: Tensor
    doc: Tensor
    start: Tensor
    init_end: Tensor
    local_start: Tensor
    position: Tensor


def plan_rows(
    q_pos: Tensor,
    q_doc: Tensor,
    cu_seqlens: Tensor,
    *,
    init_tokens: int,
    local_tokens: int,
    block_tokens: int,
    dense_len_tokens: int,
) -> Rows:
    """Return what each query sees; a document of up to `dense_len_tokens` is local as a whole."""
    position, order = (cu_seqlens[q_doc] + q_pos).sort(stable=True)
    doc = q_doc[order]
    start = cu_seqlens[doc]
    window = (position - start) // block_tokens * block_tokens - local_tokens + block_tokens
    window = torch.where(cu_seqlens[doc + 1] - start <= dense_len_tokens, 0, window)
    local_start = start + window.clamp(min=0)
    init_end = torch.minimum(start + init_tokens, local_start)
    columns = (order, doc, start, init_end, local_start, position)
    return Rows(*(x.to(torch.int32).contiguous() for x in columns))


def block_starts(cu_seqlens: Tensor, num_tokens: int, block_tokens: int) -> Tensor:
    """Return int32 [NB]: the first token of each complete block of all documents, -1 past the last."""
    cu_blocks = block_boundaries(cu_seqlens, block_tokens)
    row = torch.arange(num_tokens // block_tokens, device=cu_seqlens.device, dtype=torch.int32)
    doc = torch.searchsorted(cu_blocks, row, right=True) - 1
    inside = doc < len(cu_seqlens) - 1
    doc = torch.where(inside, doc, 0)
    start = cu_seqlens[doc] + (row - cu_blocks[doc]) * block_tokens
    return torch.where(inside, start, -1).to(torch.int32)


class BlockQueries(NamedTuple):
    """Which queries chose each block: block b of head h owns `queries[offsets[h, b] : ends[h, b]]`."""

    queries: Tensor
    offsets: Tensor
    ends: Tensor


def queries_by_block(
    ids: Tensor,
    rows: Rows,
    cu_seqlens: Tensor,
    num_blocks: int,
    block_tokens: int,
) -> BlockQueries:
    """Invert the choice: a stable sort by (head, block), so that sums over a block's queries keep one order.

    A block that lies in a query's windows, or that the query names twice, is dropped (marked -1).
    """
    num_queries, num_heads, topk = ids.shape
    by_row = ids[rows.order].permute(1, 0, 2)  # [Hkv, Tq, k]
    token = rows.start[:, None] + by_row * block_tokens
    chosen = (by_row >= 0) & (token >= rows.init_end[:, None]) & (token < rows.local_start[:, None])
    block = block_boundaries(cu_seqlens, block_tokens)[rows.doc][:, None] + by_row
    head = torch.arange(num_heads, device=ids.device, dtype=torch.int32)[:, None, None]
    key = (head * (num_blocks + 1) + torch.where(chosen, block, num_blocks)).to(torch.int32).flatten()
    key, entry = key.sort(stable=True)
    query = rows.order[entry % (num_queries * topk) // topk]
    again = torch.zeros_like(key, dtype=torch.bool)
    again[1:] = (key[1:] == key[:-1]) & (query[1:] == query[:-1])
    wanted = (head[:, 0] * (num_blocks + 1) + torch.arange(num_blocks + 1, device=ids.device)).to(torch.int32)
    offsets = torch.searchsorted(key, wanted.contiguous()).to(torch.int32)
    return BlockQueries(
        torch.where(again, -1, query).to(torch.int32),
        offsets[:, :-1].contiguous(),
        offsets[:, 1:].contiguous(),
    )
