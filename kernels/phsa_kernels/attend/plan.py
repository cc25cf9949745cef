"""Where each query looks, as tensors of fixed shape: no value ever reaches the host.

Queries are put in the order of their keys (documents lie one after another), so that a tile of consecutive
rows looks at one short stretch of keys whatever order the caller's queries have. All positions here count
tokens from the start of k, not of a document.
"""

# Arguments of Triton functions are pointers, blocks and scalars of no Python type.
# ruff: noqa: ANN001, ANN201
# mypy: disallow-untyped-decorators=false, disallow-untyped-calls=false

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from phsa_kernels.primitives import first_above

_ROWS_A_PROGRAM = 256
_TILES_A_PROGRAM = 32


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


@triton.jit
def position_kernel(  # type: ignore[no-untyped-def]
    Q_POS, Q_DOC, CU_SEQLENS, POSITION, UNORDERED, num_queries, B: tl.constexpr
):
    """POSITION[i] = position of query i in k; UNORDERED becomes 1 if any query is before its predecessor."""
    i = tl.program_id(0) * B + tl.arange(0, B)
    ok = i < num_queries
    start = tl.load(CU_SEQLENS + tl.load(Q_DOC + i, mask=ok, other=0), mask=ok, other=0)
    position = start + tl.load(Q_POS + i, mask=ok, other=0)
    tl.store(POSITION + i, position, mask=ok)
    after = ok & (i > 0)
    doc_before = tl.load(Q_DOC + i - 1, mask=after, other=0)
    before = tl.load(CU_SEQLENS + doc_before, mask=after, other=0) + tl.load(
        Q_POS + i - 1, mask=after, other=0
    )
    if tl.max((after & (before > position)).to(tl.int32), 0) > 0:
        tl.store(UNORDERED, 1)


@triton.jit
def rows_kernel(  # type: ignore[no-untyped-def]
    Q_DOC,
    CU_SEQLENS,
    POSITION,
    UNORDERED,
    ROWS,
    num_queries,
    init_tokens,
    local_tokens,
    dense_len_tokens,
    BLOCK: tl.constexpr,
    B: tl.constexpr,
):
    """ROWS int32 [6, Tq]: the columns of `Rows`.

    Queries that come in key order keep their places. Any others are ranked by counting those before each:
    quadratic, but one launch that reads nothing back, and no caller that cares for time has such queries.
    """
    i = tl.program_id(0) * B + tl.arange(0, B)
    ok = i < num_queries
    position = tl.load(POSITION + i, mask=ok, other=0)
    row = i
    if tl.load(UNORDERED) != 0:
        row = tl.zeros_like(i)
        for first in range(0, num_queries, 64):
            j = first + tl.arange(0, 64)
            other = tl.load(POSITION + j, mask=j < num_queries, other=2147483647)
            earlier = (other[None, :] == position[:, None]) & (j[None, :] < i[:, None])
            earlier = earlier | (other[None, :] < position[:, None])
            row += tl.sum(earlier.to(tl.int32), 1)
    doc = tl.load(Q_DOC + i, mask=ok, other=0)
    start = tl.load(CU_SEQLENS + doc, mask=ok, other=0)
    length = tl.load(CU_SEQLENS + doc + 1, mask=ok, other=0) - start
    window = (position - start) // BLOCK * BLOCK - local_tokens + BLOCK
    window = tl.where(length <= dense_len_tokens, 0, tl.maximum(window, 0))
    local_start = start + window
    init_end = tl.minimum(start + init_tokens, local_start)
    column = ROWS + row
    stride = tl.full([1], num_queries, tl.int64)
    tl.store(column, i, mask=ok)
    tl.store(column + stride, doc, mask=ok)
    tl.store(column + 2 * stride, start, mask=ok)
    tl.store(column + 3 * stride, init_end, mask=ok)
    tl.store(column + 4 * stride, local_start, mask=ok)
    tl.store(column + 5 * stride, position, mask=ok)


def plan_rows(
    q_pos: Tensor,
    q_doc: Tensor,
    cu_seqlens: Tensor,
    *,
    init_tokens: int,
    local_tokens: int,
    block_tokens: int,
    dense_len_tokens: int,
) -> Tensor:
    """Return what each query sees, int32 [6, Tq]: the columns of `Rows`."""
    num_queries = len(q_pos)
    rows = q_pos.new_empty(6, num_queries)
    position = torch.empty_like(q_pos)
    unordered = q_pos.new_zeros(1)
    grid = (triton.cdiv(num_queries, _ROWS_A_PROGRAM),)
    position_kernel[grid](q_pos, q_doc, cu_seqlens, position, unordered, num_queries, B=_ROWS_A_PROGRAM)
    rows_kernel[grid](
        q_doc, cu_seqlens, position, unordered, rows, num_queries, init_tokens, local_tokens,
        dense_len_tokens, BLOCK=block_tokens, B=_ROWS_A_PROGRAM,
    )  # fmt: skip
    return rows


class KeyTiles(NamedTuple):
    """Which rows look at each tile of consecutive keys, int32.

    rows [4, tiles]: first and end of the rows whose local window touches the tile, and of those among them
    that see all of it. docs [2, tiles]: first and last document of its keys. doc_rows [N + 1]: first row of
    each document.
    """

    rows: Tensor
    docs: Tensor
    doc_rows: Tensor


@triton.jit
def key_tiles_kernel(  # type: ignore[no-untyped-def]
    LOCAL_START,
    POSITION,
    CU_SEQLENS,
    TILE_ROWS,
    TILE_DOCS,
    DOC_ROWS,
    num_rows,
    row_steps,
    num_docs,
    doc_steps,
    num_keys,
    num_tiles,
    BN: tl.constexpr,
    B: tl.constexpr,
):
    """Fill `KeyTiles`: the first programs take tiles of BN keys, the others documents."""
    item = tl.program_id(0) * B + tl.arange(0, B)
    if tl.program_id(0) * B < num_tiles:
        ok = item < num_tiles
        first = tl.minimum(item * BN, num_keys - 1)
        last = tl.minimum(first + BN, num_keys) - 1
        out = TILE_ROWS + item
        tl.store(out, first_above(POSITION, num_rows, row_steps, first, False), mask=ok)
        tl.store(out + num_tiles, first_above(LOCAL_START, num_rows, row_steps, last, True), mask=ok)
        tl.store(out + 2 * num_tiles, first_above(POSITION, num_rows, row_steps, last, False), mask=ok)
        tl.store(out + 3 * num_tiles, first_above(LOCAL_START, num_rows, row_steps, first, True), mask=ok)
        out = TILE_DOCS + item
        tl.store(out, first_above(CU_SEQLENS, num_docs + 1, doc_steps, first, True) - 1, mask=ok)
        tl.store(out + num_tiles, first_above(CU_SEQLENS, num_docs + 1, doc_steps, last, True) - 1, mask=ok)
    else:
        doc = item - tl.cdiv(num_tiles, B) * B
        ok = doc <= num_docs
        start = tl.load(CU_SEQLENS + doc, mask=ok, other=0)
        tl.store(DOC_ROWS + doc, first_above(POSITION, num_rows, row_steps, start, False), mask=ok)


def plan_key_tiles(rows: Rows, cu_seqlens: Tensor, num_keys: int, keys_in_tile: int) -> KeyTiles:
    """Return which rows look at each tile of `keys_in_tile` keys."""
    num_tiles, num_rows = triton.cdiv(num_keys, keys_in_tile), len(rows.position)
    found = KeyTiles(
        cu_seqlens.new_empty(4, num_tiles),
        cu_seqlens.new_empty(2, num_tiles),
        torch.empty_like(cu_seqlens),
    )
    grid = (triton.cdiv(num_tiles, _TILES_A_PROGRAM) + triton.cdiv(len(cu_seqlens), _TILES_A_PROGRAM),)
    key_tiles_kernel[grid](
        rows.local_start, rows.position, cu_seqlens, *found, num_rows, num_rows.bit_length(),
        len(cu_seqlens) - 1, len(cu_seqlens).bit_length(), num_keys, num_tiles, BN=keys_in_tile,
        B=_TILES_A_PROGRAM, num_warps=1,
    )  # fmt: skip
    return found
