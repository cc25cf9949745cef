"""The best k blocks of a query by a running list: any k, any group of heads.

The list compares fp32 scores. Blocks come in ascending order and enter only by a strictly greater score, and
of equal worst entries the highest block leaves: the lower block wins every tie.
"""

# Arguments of Triton functions are pointers, blocks and scalars of no Python type.
# ruff: noqa: ANN001, ANN201
# mypy: disallow-untyped-defs=false, disallow-untyped-decorators=false
# mypy: disallow-untyped-calls=false, disallow-incomplete-defs=false

from __future__ import annotations

import triton
import triton.language as tl

from phsa_kernels.primitives import LOG2_E, load_rows, product, row_offset
from phsa_kernels.select.rows import candidate_range, candidate_steps, last_rows_first


@triton.jit
def select_list_kernel(
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
    VECTORS: tl.constexpr,
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
    document, first, last = candidate_range(
        Q_POS, Q_DOC, CU_BLOCKS, row, ok, INIT_BLOCKS, LOCAL_BLOCKS, BLOCK
    )
    slot = tl.arange(0, TOPK_PADDED)
    scale_log2 = scale * LOG2_E
    # Empty entries have distinct ids below 0, so that one new block replaces one of them; slots past TOPK are
    # never the worst.
    best_id = tl.zeros([T, TOPK_PADDED], tl.int32) - 1 - slot[None, :]
    never = tl.where(slot < TOPK, float("-inf"), float("inf"))
    best = tl.zeros([T, TOPK_PADDED], tl.float32) + never[None, :]
    n = tl.arange(0, BN)
    begin, first_inner, end_inner, end = candidate_steps(first, last, ok, BN)
    # Loaded a step ahead by hand: the compiler does not pipeline a loop with a loop in it.
    vector = kv_head * VECTORS
    keys = load_rows(POOLED, begin + n, vector, stride_pb, stride_ph, begin + n < end, D)
    for step in range(begin, end, BN):
        block = step + n
        ahead = block + BN
        next_keys = load_rows(POOLED, ahead, vector, stride_pb, stride_ph, ahead < end, D)
        score = tl.zeros([T, BN], tl.float32)
        for r in tl.static_range(GROUP):
            head = kv_head * GROUP + r
            q = load_rows(Q, row, head, stride_qt, stride_qh, ok, D)
            dot = product(q, tl.trans(keys))
            if VECTORS == 2:
                others = load_rows(POOLED, block, vector + 1, stride_pb, stride_ph, block < end, D)
                dot = tl.maximum(dot, product(q, tl.trans(others)))
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
