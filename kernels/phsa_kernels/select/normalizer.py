"""First sweep of softmax_sum over the pooled keys: each head's normalizer, before any block can be compared.

The running maximum and sum are kept four to a row, for the columns c with equal c // 2 % 4: the columns that
one thread of a tensor-core product holds. No step exchanges anything between threads; the end joins the four.
"""

# Arguments of Triton functions are pointers, blocks and scalars of no Python type.
# ruff: noqa: ANN001, ANN201
# mypy: disallow-untyped-defs=false, disallow-untyped-decorators=false
# mypy: disallow-untyped-calls=false, disallow-incomplete-defs=false

from __future__ import annotations

import triton
import triton.language as tl

from phsa_kernels.primitives import LOG2_E, LOWEST, block_products, load_rows
from phsa_kernels.select.rows import block_range, last_rows_first


@triton.jit
def add_to_normalizer(
    peak, total, score, seen, scale_log2, MASK: tl.constexpr, T: tl.constexpr, BN: tl.constexpr
):
    """One step of the running maxima [T, 4] of the products (the scale is positive) and of the sums."""
    if MASK:
        score = tl.where(seen, score, float("-inf"))
    score = tl.reshape(score, [T, BN // 8, 4, 2])
    new_peak = tl.maximum(peak, tl.max(tl.max(score, 3), 1))
    shift = new_peak * scale_log2
    total = total * tl.exp2((peak - new_peak) * scale_log2)  # difference first, as in attend/forward.py
    power = tl.exp2(score * scale_log2 - shift[:, None, :, None])
    return new_peak, total + tl.sum(tl.sum(power, 3), 1)


@triton.jit
def normalizer_kernel(
    Q,
    POOLED,
    Q_POS,
    Q_DOC,
    CU_BLOCKS,
    NORM,
    num_queries,
    num_heads,
    scale,
    stride_qt,
    stride_qh,
    VECTORS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    D: tl.constexpr,
    T: tl.constexpr,
    BN: tl.constexpr,
):
    """NORM[i, head], log2 of the sum of exp of the scores of all blocks before the query's own."""
    head = tl.program_id(0) % num_heads
    row = last_rows_first(num_queries, num_heads, T)
    ok = row < num_queries
    doc = tl.load(Q_DOC + row, mask=ok, other=0)
    first = tl.load(CU_BLOCKS + doc, mask=ok, other=0)
    last = first + tl.where(ok, tl.load(Q_POS + row, mask=ok, other=0) // BLOCK, 0)
    q = load_rows(Q, row, head, stride_qt, stride_qh, ok, D)
    scale_log2 = scale * LOG2_E
    peak = tl.full([T, 4], LOWEST, tl.float32)
    total = tl.zeros([T, 4], tl.float32)
    n = tl.arange(0, BN)
    begin, first_inner, end_inner, end = block_range(first, last, ok, BN)
    head_steps = tl.cdiv(first_inner - begin, BN)
    for step in range(head_steps + tl.cdiv(end - end_inner, BN)):
        at_head = step < head_steps
        top = tl.where(at_head, begin + step * BN, end_inner + (step - head_steps) * BN)
        block = top + n
        below = block < tl.where(at_head, first_inner, end)
        seen = (block[None, :] >= first[:, None]) & (block[None, :] < last[:, None]) & below[None, :]
        dot = block_products(q, POOLED, top, head // GROUP, VECTORS, BN, D)
        peak, total = add_to_normalizer(peak, total, dot, seen, scale_log2, True, T, BN)
    for top in range(first_inner, end_inner, BN):
        dot = block_products(q, POOLED, top, head // GROUP, VECTORS, BN, D)
        peak, total = add_to_normalizer(peak, total, dot, ok, scale_log2, False, T, BN)
    row_peak = tl.max(peak, 1)
    row_total = tl.sum(total * tl.exp2((peak - row_peak[:, None]) * scale_log2), 1)
    # A row without any block gets -infinity; its candidates are none, so the value is never used.
    norm = row_peak * scale_log2 + tl.log2(row_total)
    tl.store(NORM + row.to(tl.int64) * num_heads + head, norm, mask=ok)
