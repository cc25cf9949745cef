"""Launches of the select kernels."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from phsa_kernels.configs import configs_for
from phsa_kernels.primitives import aligned, tiles
from phsa_kernels.select.columns import select_columns_kernel
from phsa_kernels.select.list import select_list_kernel
from phsa_kernels.select.normalizer import normalizer_kernel

# Columns keep all heads of a group and k entries a column in registers.
_COLUMNS_MAX_GROUP = 4
_COLUMNS_MAX_TOPK = 2
# The queries of all heads of a tile stay in shared memory.
_QUERIES_MAX_BYTES = 128 * 1024


def _rows_that_fit(rows: int, group: int, q: Tensor) -> int:
    """Return how many queries a tile takes: `rows`, fewer of many or wide heads."""
    while (
        rows > 16
        and triton.next_power_of_2(group) * rows * q.shape[2] * q.element_size() > _QUERIES_MAX_BYTES
    ):
        rows //= 2
    return rows


def select_blocks(
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
    num_queries, num_heads, head_dim = q.shape
    num_kv_heads, vectors = pooled.shape[1:3]
    group = num_heads // num_kv_heads
    ids = q.new_empty(num_queries, num_kv_heads, topk, dtype=torch.int32)
    if num_queries == 0 or pooled.shape[0] == 0:
        return ids.fill_(-1)
    configs = configs_for(q.device, q.dtype)
    norm = q.new_empty(num_queries, num_heads if softmax else 0, dtype=torch.float32)
    # The vectors of a head's blocks lie like heads beside each other.
    pooled = aligned(pooled.flatten(1, 2))
    where = (q_pos, q_doc, cu_blocks)
    sizes = (num_queries, num_heads, scale, q.stride(0), q.stride(1))
    shape: dict[str, Any] = {"GROUP": group, "BLOCK": block_tokens, "D": head_dim, "VECTORS": vectors}
    if softmax:
        tile = configs.normalizer
        normalizer_kernel[(triton.cdiv(num_queries, tile.rows) * num_heads,)](
            q,
            tiles(pooled, tile.keys),
            *where,
            norm,
            *sizes,
            **shape,
            T=tile.rows,
            BN=tile.keys,
            **tile.options(),
        )
    shape |= {"INIT_BLOCKS": init_tokens // block_tokens, "LOCAL_BLOCKS": local_tokens // block_tokens}
    shape |= {"TOPK": topk, "SOFTMAX": softmax}
    if topk <= _COLUMNS_MAX_TOPK and group <= _COLUMNS_MAX_GROUP:
        tile = configs.select_columns
        rows = _rows_that_fit(tile.rows, group, q)
        select_columns_kernel[(triton.cdiv(num_queries, rows) * num_kv_heads,)](
            q, tiles(pooled, tile.keys), *where, norm, ids, *sizes, **shape,
            HEADS=triton.next_power_of_2(group), T=rows, BN=tile.keys, **tile.options(),
        )  # fmt: skip
    else:
        tile = configs.select_list
        rows = _rows_that_fit(tile.rows, group, q)
        select_list_kernel[(triton.cdiv(num_queries, rows) * num_kv_heads,)](
            q, pooled, *where, norm, ids, *sizes, pooled.stride(0), pooled.stride(1), **shape,
            TOPK_PADDED=triton.next_power_of_2(topk), T=rows, BN=tile.keys, **tile.options(),
        )  # fmt: skip
    return ids
