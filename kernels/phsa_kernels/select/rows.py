"""Which rows and blocks a program of the select kernels takes."""

# Arguments of Triton functions are pointers, blocks and scalars of no Python type.
# ruff: noqa: ANN001, ANN201
# mypy: disallow-untyped-defs=false, disallow-untyped-decorators=false
# mypy: disallow-untyped-calls=false, disallow-incomplete-defs=false

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def block_range(first, last, ok, BN: tl.constexpr):
    """Return (begin, first_inner, end_inner, end) of a tile whose row m looks at the blocks [first, last).

    Every row that is `ok` looks at all blocks of the whole steps in [first_inner, end_inner).
    """
    end = tl.max(tl.where(ok, last, 0), 0)
    begin = tl.minimum(tl.min(tl.where(ok, first, 2147483647), 0), end)
    lowest = tl.maximum(tl.max(tl.where(ok, first, 0), 0), begin)
    highest = tl.min(tl.where(ok, last, 2147483647), 0)
    first_inner = tl.minimum(begin + tl.cdiv(lowest - begin, BN) * BN, end)
    return begin, first_inner, first_inner + tl.maximum(highest - first_inner, 0) // BN * BN, end


@triton.jit
def last_rows_first(num_queries, num_heads, T: tl.constexpr):
    """Return the program's rows: the last tile of every head first, for its rows have the most blocks."""
    return (tl.cdiv(num_queries, T) - 1 - tl.program_id(0) // num_heads) * T + tl.arange(0, T)


@triton.jit
def candidate_range(
    Q_POS, Q_DOC, CU_BLOCKS, row, ok, INIT_BLOCKS: tl.constexpr, LOCAL_BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Return (first pooled row of each row's document, its first candidate, the end of its candidates)."""
    doc = tl.load(Q_DOC + row, mask=ok, other=0)
    document = tl.load(CU_BLOCKS + doc, mask=ok, other=0)
    current = tl.load(Q_POS + row, mask=ok, other=0) // BLOCK
    return document, document + INIT_BLOCKS, document + tl.where(ok, current - LOCAL_BLOCKS + 1, 0)


@triton.jit
def candidate_steps(first, last, ok, BN: tl.constexpr):
    """Return `block_range` of the rows that have candidates; with rows that have none no step is inner."""
    begin, first_inner, end_inner, end = block_range(first, last, ok & (first < last), BN)
    without = tl.sum((ok & (first >= last)).to(tl.int32), 0) > 0
    return begin, first_inner, tl.where(without, first_inner, end_inner), end
