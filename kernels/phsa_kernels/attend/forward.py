"""Forward: a tile of T queries x R heads walks its windows and the union of its chosen blocks."""

# Arguments of Triton functions are pointers, blocks and scalars of no Python type.
# ruff: noqa: ANN001, ANN201
# mypy: disallow-untyped-defs=false, disallow-untyped-decorators=false
# mypy: disallow-untyped-calls=false, disallow-incomplete-defs=false

from __future__ import annotations

import triton
import triton.language as tl

from phsa_kernels.attend.slots import load_keys, load_tile_of_keys
from phsa_kernels.attend.walk import (
    edge_step,
    full_step,
    list_step,
    queries_of_first_listed,
    tile_ranges,
)
from phsa_kernels.primitives import LOG2_E, LOWEST, load_rows, product, row_offset


@triton.jit
def attend_keys(acc, peak, total, q, k, v, seen, scale, MASK: tl.constexpr):
    """One online-softmax step over the keys [BN]; with MASK, row m attends to those with seen[m].

    `peak` is the largest product so far, before the (positive) scale, which is folded into the exponent.
    """
    score = product(q, tl.trans(k))
    if MASK:
        score = tl.where(seen, score, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(score, 1))
    shift = new_peak * scale
    p = tl.exp2(score * scale - shift[:, None])
    # Difference first: fused, `LOWEST * scale - shift` leaves the rounding of a huge number, not 0, in a row
    # that has seen no key yet, and its power of two is infinite.
    shrink = tl.exp2((peak - new_peak) * scale)
    acc = acc * shrink[:, None] + product(p.to(v.dtype), v)
    return acc, new_peak, total * shrink + tl.sum(p, 1)


@triton.jit
def forward_kernel(
    Q,
    K,
    V,
    KEYS,
    VALUES,
    OUT,
    LSE,
    ORDER,
    DOC,
    START,
    INIT_END,
    LOCAL_START,
    POSITION,
    CU_SEQLENS,
    FIRST_TOKEN,
    BITS,
    COUNT,
    KEY_ROWS,
    num_rows,
    num_tiles,
    num_heads,
    word_stride,
    scale,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    stride_ot,
    stride_oh,
    INIT: tl.constexpr,
    TOPK: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    D: tl.constexpr,
    T: tl.constexpr,
    WORDS: tl.constexpr,
    BN: tl.constexpr,
):
    """OUT, LSE (natural logarithm) of the tile's rows; every key counts once."""
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    m = tl.arange(0, T * GROUP_PADDED)
    t = m // GROUP_PADDED
    head = kv_head * GROUP + m % GROUP_PADDED
    i = tile * T + t
    ok = (i < num_rows) & (m % GROUP_PADDED < GROUP)
    query = tl.load(ORDER + i, mask=ok, other=0)
    start = tl.load(START + i, mask=ok, other=0)
    init_end = tl.load(INIT_END + i, mask=ok, other=0)
    local_start = tl.load(LOCAL_START + i, mask=ok, other=0)
    position = tl.load(POSITION + i, mask=ok, other=-1)
    q = load_rows(Q, query, head, stride_qt, stride_qh, ok, D)
    scale_log2 = scale * LOG2_E
    acc = tl.zeros([T * GROUP_PADDED, D], tl.float32)
    peak = tl.full([T * GROUP_PADDED], LOWEST, tl.float32)
    total = tl.zeros([T * GROUP_PADDED], tl.float32)
    n = tl.arange(0, BN)
    top = tile * T
    bottom = tl.minimum(top + T, num_rows) - 1
    (
        full_init, full_steps, edge_init, edges, first_inner, end_inner, last, lowest, local_blocks
    ) = tile_ranges(DOC, START, LOCAL_START, POSITION, top, bottom, INIT, BLOCK, BN)  # fmt: skip
    doc, last_doc, top_start = tl.load(DOC + top), tl.load(DOC + bottom), tl.load(START + top)
    for step in range(full_steps):
        first = full_step(step, full_init, top_start, first_inner, BN)
        k, v = load_tile_of_keys(
            K, V, KEYS, VALUES, KEY_ROWS, first, kv_head, stride_kt, stride_kh, stride_vt, stride_vh, BN, D
        )
        acc, peak, total = attend_keys(acc, peak, total, q, k, v, ok, scale_log2, False)
    for step in range(edges):
        first, end, low, high = edge_step(
            step, edge_init, CU_SEQLENS, doc, last_doc, end_inner, last, start, init_end, local_start,
            position, INIT, BN,
        )  # fmt: skip
        key = first + n
        k, v = load_keys(
            K, V, KEY_ROWS, key, key < end, kv_head, stride_kt, stride_kh, stride_vt, stride_vh, D
        )
        seen = (key[None, :] >= low[:, None]) & (key[None, :] < high[:, None])
        acc, peak, total = attend_keys(acc, peak, total, q, k, v, seen, scale_log2, True)
    low_bit = tl.where(t < 32, 1 << (t % 32), 0)
    high_bit = tl.where(t < 32, 0, 1 << (t % 32))
    base = (kv_head.to(tl.int64) * num_tiles + tile) * (T * TOPK)
    count = 0
    if TOPK > 0:
        count = tl.load(COUNT + kv_head * num_tiles + tile)
    seen_by_first = queries_of_first_listed(POSITION, top, top_start, last, local_blocks, BLOCK)
    for first in range(0, local_blocks + count, BN // BLOCK):
        key, key_ok, seen = list_step(
            first, local_blocks, count, lowest, seen_by_first, base, word_stride, FIRST_TOKEN, BITS, low_bit,
            high_bit, BLOCK, WORDS, BN,
        )  # fmt: skip
        k, v = load_keys(K, V, KEY_ROWS, key, key_ok, kv_head, stride_kt, stride_kh, stride_vt, stride_vh, D)
        acc, peak, total = attend_keys(acc, peak, total, q, k, v, seen, scale_log2, True)
    out = row_offset(query, head, stride_ot, stride_oh)[:, None] + tl.arange(0, D)[None, :]
    tl.store(OUT + out, (acc / total[:, None]).to(OUT.dtype.element_ty), mask=ok[:, None])
    lse = (peak * scale_log2 + tl.log2(total)) / LOG2_E
    tl.store(LSE + query.to(tl.int64) * num_heads + head, lse, mask=ok)
