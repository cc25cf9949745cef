"""Selection fused with its scoring: nothing of size [queries x blocks] is ever written.

softmax_sum needs each head's normalizer first: one sweep over the pooled keys for it, one for the scores.
The running top-k compares fp32 scores. Blocks come in ascending order and enter only by a strictly greater
score, and of equal worst entries the highest block leaves: the lower block wins every tie.
"""

# Arguments of Triton functions are pointers, blocks and scalars of no Python type.
# ruff: noqa: ANN001, ANN201
# mypy: disallow-untyped-defs=false, disallow-untyped-decorators=false
# mypy: disallow-untyped-calls=false, disallow-incomplete-defs=false

from __future__ import annotations

import triton
import triton.language as tl

from phsa_kernels.primitives import LOG2_E, LOWEST, load_all_rows, load_rows, product, row_offset


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
def add_to_normalizer(peak, total, q, keys, seen, scale_log2, MASK: tl.constexpr):
    """One step of the running maximum of the products (the scale is positive) and sum of exponentials."""
    score = product(q, tl.trans(keys))
    if MASK:
        score = tl.where(seen, score, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(score, 1))
    shift = new_peak * scale_log2
    total = total * tl.exp2((peak - new_peak) * scale_log2)  # difference first, as in attend/forward.py
    return new_peak, total + tl.sum(tl.exp2(score * scale_log2 - shift[:, None]), 1)


@triton.jit
def last_rows_first(num_queries, num_heads, T: tl.constexpr):
    """Return the program's rows: the last tile of every head first, for its rows have the most blocks."""
    return (tl.cdiv(num_queries, T) - 1 - tl.program_id(0) // num_heads) * T + tl.arange(0, T)


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
    stride_pb,
    stride_ph,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    D: tl.constexpr,
    T: tl.constexpr,
    BN: tl.constexpr,
):
    """NORM[i, head] = log2 of the sum of exp of the scores of all blocks before the query's own."""
    head = tl.program_id(0) % num_heads
    row = last_rows_first(num_queries, num_heads, T)
    ok = row < num_queries
    doc = tl.load(Q_DOC + row, mask=ok, other=0)
    first = tl.load(CU_BLOCKS + doc, mask=ok, other=0)
    last = first + tl.where(ok, tl.load(Q_POS + row, mask=ok, other=0) // BLOCK, 0)
    q = load_rows(Q, row, head, stride_qt, stride_qh, ok, D)
    scale_log2 = scale * LOG2_E
    peak = tl.full([T], LOWEST, tl.float32)
    total = tl.zeros([T], tl.float32)
    n = tl.arange(0, BN)
    begin, first_inner, end_inner, end = block_range(first, last, ok, BN)
    head_steps = tl.cdiv(first_inner - begin, BN)
    for step in range(head_steps + tl.cdiv(end - end_inner, BN)):
        at_head = step < head_steps
        block = tl.where(at_head, begin + step * BN, end_inner + (step - head_steps) * BN) + n
        keys = load_rows(POOLED, block, head // GROUP, stride_pb, stride_ph, block < end, D)
        below = block < tl.where(at_head, first_inner, end)
        seen = (block[None, :] >= first[:, None]) & (block[None, :] < last[:, None]) & below[None, :]
        peak, total = add_to_normalizer(peak, total, q, keys, seen, scale_log2, True)
    for top in range(first_inner, end_inner, BN):
        keys = load_all_rows(POOLED, top + n, head // GROUP, stride_pb, stride_ph, D)
        peak, total = add_to_normalizer(peak, total, q, keys, ok, scale_log2, False)
    # A row without any block gets -infinity; its candidates are none, so the value is never used.
    tl.store(NORM + row.to(tl.int64) * num_heads + head, peak * scale_log2 + tl.log2(total), mask=ok)


@triton.jit
def select_kernel(
    Q,
    POOLED,
    Q_POS,
    Q_DOC,
    CU_BLOCKS,
    NORM,
    IDS,
    num_queries,
    num_heads,
    scale,
    stride_qt,
    stride_qh,
    stride_pb,
    stride_ph,
    INIT_BLOCKS: tl.constexpr,
    LOCAL_BLOCKS: tl.constexpr,
    TOPK: tl.constexpr,
    TOPK_PADDED: tl.constexpr,
    SOFTMAX: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    D: tl.constexpr,
    T: tl.constexpr,
    BN: tl.constexpr,
):
    """IDS[i, kv head] = the best TOPK candidates of each query, ascending, -1 at the end."""
    num_kv_heads = num_heads // GROUP
    kv_head = tl.program_id(0) % num_kv_heads
    row = last_rows_first(num_queries, num_kv_heads, T)
    ok = row < num_queries
    doc = tl.load(Q_DOC + row, mask=ok, other=0)
    document = tl.load(CU_BLOCKS + doc, mask=ok, other=0)
    current = tl.load(Q_POS + row, mask=ok, other=0) // BLOCK
    first = document + INIT_BLOCKS
    last = document + tl.where(ok, current - LOCAL_BLOCKS + 1, 0)
    slot = tl.arange(0, TOPK_PADDED)
    scale_log2 = scale * LOG2_E
    # Empty entries have distinct ids below 0, so that one new block replaces one of them; slots past TOPK are
    # never the worst.
    best_id = tl.zeros([T, TOPK_PADDED], tl.int32) - 1 - slot[None, :]
    never = tl.where(slot < TOPK, float("-inf"), float("inf"))
    best = tl.zeros([T, TOPK_PADDED], tl.float32) + never[None, :]
    n = tl.arange(0, BN)
    some = ok & (first < last)
    begin, first_inner, end_inner, end = block_range(first, last, some, BN)
    # With rows that have no candidate at all, every step is masked.
    end_inner = tl.where(tl.sum((ok & (first >= last)).to(tl.int32), 0) > 0, first_inner, end_inner)
    # Loaded a step ahead by hand: the compiler does not pipeline a loop with a loop in it.
    keys = load_rows(POOLED, begin + n, kv_head, stride_pb, stride_ph, begin + n < end, D)
    for step in range(begin, end, BN):
        block = step + n
        ahead = block + BN
        next_keys = load_rows(POOLED, ahead, kv_head, stride_pb, stride_ph, ahead < end, D)
        score = tl.zeros([T, BN], tl.float32)
        for r in tl.static_range(GROUP):
            head = kv_head * GROUP + r
            q = load_rows(Q, row, head, stride_qt, stride_qh, ok, D)
            dot = product(q, tl.trans(keys))
            if SOFTMAX:
                norm = tl.load(NORM + row.to(tl.int64) * num_heads + head, mask=ok, other=0.0)
                score += tl.exp2(dot * scale_log2 - norm[:, None])
            else:
                score += dot * scale
        keys = next_keys
        if (step < first_inner) | (step >= end_inner):
            candidate = (block[None, :] >= first[:, None]) & (block[None, :] < last[:, None])
            score = tl.where(candidate, score, float("-inf"))
        worst = tl.min(best, 1)
        top = tl.max(score, 1)
        while tl.max((top > worst).to(tl.int32), 0) > 0:
            enters = top > worst
            at = tl.min(tl.where(score == top[:, None], block[None, :], 2147483647), 1)
            is_worst = best == worst[:, None]
            leaves = tl.max(tl.where(is_worst, best_id, -2147483647), 1)
            hit = is_worst & (best_id == leaves[:, None]) & enters[:, None]
            best = tl.where(hit, top[:, None], best)
            best_id = tl.where(hit, at[:, None], best_id)
            score = tl.where(block[None, :] == at[:, None], float("-inf"), score)
            worst = tl.min(best, 1)
            top = tl.max(score, 1)
    chosen = tl.where((best_id >= 0) & (slot < TOPK)[None, :], best_id - document[:, None], 2147483647)
    chosen = tl.sort(chosen, 1)
    chosen = tl.where(chosen == 2147483647, -1, chosen)
    out = IDS + row_offset(row, kv_head, num_kv_heads * TOPK, TOPK)[:, None] + slot[None, :]
    tl.store(out, chosen, mask=ok[:, None] & (slot < TOPK)[None, :])
