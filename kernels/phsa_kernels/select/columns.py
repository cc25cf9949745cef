"""The best one or two blocks of a query by columns: no branch, no exchange between threads in a step.

A step scores BN blocks. Each of the BN columns keeps the best two of its own blocks over all steps (the best
one for k = 1), and the row's best are picked among the columns at the end: of one column no more than k
blocks can be among the row's best k. All heads of a group are the rows of one product.

Blocks come in ascending order and replace only by a strictly greater score, and the lowest block is picked
among equal ones: the lower block wins every tie.
"""

# Arguments of Triton functions are pointers, blocks and scalars of no Python type.
# ruff: noqa: ANN001, ANN201
# mypy: disallow-untyped-defs=false, disallow-untyped-decorators=false
# mypy: disallow-untyped-calls=false, disallow-incomplete-defs=false

from __future__ import annotations

import triton
import triton.language as tl

from phsa_kernels.primitives import LOG2_E, block_products, load_rows, row_offset
from phsa_kernels.select.rows import candidate_range, candidate_steps, last_rows_first

_NONE = tl.constexpr(2147483647)  # above every block


@triton.jit
def group_scores(
    dot, norm, scale, scale_log2, SOFTMAX: tl.constexpr, HEADS: tl.constexpr, T: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """Return the scores [T, BN] of the products of stacked heads: row r * T + t is head r of query t."""
    if SOFTMAX:
        by_head = tl.exp2(dot * scale_log2 - norm[:, None])
    else:
        by_head = dot * scale
    return tl.sum(tl.reshape(by_head, [HEADS, T, BN]), 0)


@triton.jit
def keep(best, best_step, second, second_step, score, step, TWO: tl.constexpr):
    """Enter the scores of a step into the columns' best."""
    first = score > best
    if TWO:
        also = score > second
        second_step = tl.where(first, best_step, tl.where(also, step, second_step))
        second = tl.where(first, best, tl.where(also, score, second))
    return tl.where(first, score, best), tl.where(first, step, best_step), second, second_step


@triton.jit
def keep_edge(
    best, best_step, second, second_step, from_step, to_step, begin, first, last, q, norm, POOLED,
    kv_head, scale, scale_log2, TWO: tl.constexpr, SOFTMAX: tl.constexpr, VECTORS: tl.constexpr,
    HEADS: tl.constexpr, D: tl.constexpr, T: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Enter steps of which some row has only some blocks as candidates."""
    n = tl.arange(0, BN)
    for step in range(from_step, to_step):
        block = begin + step * BN + n
        dot = block_products(q, POOLED, begin + step * BN, kv_head, VECTORS, BN, D)
        score = group_scores(dot, norm, scale, scale_log2, SOFTMAX, HEADS, T, BN)
        candidate = (block[None, :] >= first[:, None]) & (block[None, :] < last[:, None])
        score = tl.where(candidate, score, float("-inf"))
        best, best_step, second, second_step = keep(best, best_step, second, second_step, score, step, TWO)
    return best, best_step, second, second_step


@triton.jit
def lowest_of_the_best(score, block):
    """Return each row's lowest block among those with its highest score."""
    return tl.min(tl.where(score == tl.max(score, 1)[:, None], block, _NONE), 1)


@triton.jit
def select_columns_kernel(
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
    INIT_BLOCKS: tl.constexpr,
    LOCAL_BLOCKS: tl.constexpr,
    TOPK: tl.constexpr,
    SOFTMAX: tl.constexpr,
    VECTORS: tl.constexpr,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    D: tl.constexpr,
    T: tl.constexpr,
    BN: tl.constexpr,
):
    """IDS[i, kv head] = the best TOPK (1 or 2) candidates of each query, ascending, -1 at the end.

    HEADS: GROUP padded to a power of two.
    """
    num_kv_heads = num_heads // GROUP
    kv_head = tl.program_id(0) % num_kv_heads
    row = last_rows_first(num_queries, num_kv_heads, T)
    ok = row < num_queries
    document, first, last = candidate_range(
        Q_POS, Q_DOC, CU_BLOCKS, row, ok, INIT_BLOCKS, LOCAL_BLOCKS, BLOCK
    )
    m = tl.arange(0, HEADS * T)
    head = kv_head * GROUP + m // T
    query = tl.min(row, 0) + m % T
    is_head = (query < num_queries) & (m // T < GROUP)
    q = load_rows(Q, query, head, stride_qt, stride_qh, is_head, D)
    # exp2(-infinity): heads that pad the group add nothing. Their products are 0, and so are raw scores.
    norm = tl.full([HEADS * T], float("inf"), tl.float32)
    if SOFTMAX:
        norm = tl.load(NORM + query.to(tl.int64) * num_heads + head, mask=is_head, other=float("inf"))
    scale_log2 = scale * LOG2_E
    best = tl.full([T, BN], float("-inf"), tl.float32)
    best_step = tl.full([T, BN], -1, tl.int32)
    second, second_step = best, best_step
    n = tl.arange(0, BN)
    begin, first_inner, end_inner, end = candidate_steps(first, last, ok, BN)
    inner = tl.cdiv(first_inner - begin, BN)
    tail = inner + (end_inner - first_inner) // BN
    best, best_step, second, second_step = keep_edge(
        best, best_step, second, second_step, 0, inner, begin, first, last, q, norm, POOLED, kv_head,
        scale, scale_log2, TOPK == 2, SOFTMAX, VECTORS, HEADS, D, T, BN,
    )  # fmt: skip
    for step in range(inner, tail):
        dot = block_products(q, POOLED, begin + step * BN, kv_head, VECTORS, BN, D)
        score = group_scores(dot, norm, scale, scale_log2, SOFTMAX, HEADS, T, BN)
        best, best_step, second, second_step = keep(
            best, best_step, second, second_step, score, step, TOPK == 2
        )
    best, best_step, second, second_step = keep_edge(
        best, best_step, second, second_step, tail, tl.cdiv(end - begin, BN), begin, first, last, q,
        norm, POOLED, kv_head, scale, scale_log2, TOPK == 2, SOFTMAX, VECTORS, HEADS, D, T, BN,
    )  # fmt: skip
    out = IDS + row_offset(row, kv_head, num_kv_heads * TOPK, TOPK)
    block = tl.where(best_step < 0, _NONE, begin + best_step * BN + n[None, :])
    low = lowest_of_the_best(best, block)
    if TOPK == 2:
        second_block = tl.where(second_step < 0, _NONE, begin + second_step * BN + n[None, :])
        taken = block == low[:, None]
        other = lowest_of_the_best(tl.where(taken, second, best), tl.where(taken, second_block, block))
        low, high = tl.minimum(low, other), tl.maximum(low, other)
        tl.store(out + 1, tl.where(high == _NONE, -1, high - document), mask=ok)
    tl.store(out, tl.where(low == _NONE, -1, low - document), mask=ok)
