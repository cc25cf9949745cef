"""Backward: dQ over the same tile unions as forward; dK and dV key by key, without atomics.

Every sum has one fixed order, so two runs agree bit for bit: there is no other mode.
"""

# Arguments of Triton functions are pointers, blocks and scalars of no Python type.
# ruff: noqa: ANN001, ANN201
# mypy: disallow-untyped-defs=false, disallow-untyped-decorators=false
# mypy: disallow-untyped-calls=false, disallow-incomplete-defs=false

from __future__ import annotations

import triton
import triton.language as tl

from phsa_kernels.attend.slots import load_all_keys, load_keys, load_tile_of_keys
from phsa_kernels.attend.walk import (
    edge_step,
    full_step,
    list_step,
    queries_of_first_listed,
    tile_ranges,
)
from phsa_kernels.primitives import LOG2_E, load_rows, product, row_offset


@triton.jit
def query_gradient(dq, q, grad, lse, delta, k, v, seen, scale_log2, MASK: tl.constexpr):
    """Add the share of the keys [BN] to dq / scale; with MASK, row m attends to those with seen[m]."""
    p = tl.exp2(product(q, tl.trans(k)) * scale_log2 - lse[:, None])
    if MASK:
        p = tl.where(seen, p, 0.0)
    ds = p * (product(grad, tl.trans(v)) - delta[:, None])
    return dq + product(ds.to(k.dtype), k)


@triton.jit
def dq_kernel(
    Q,
    K,
    V,
    KEYS,
    VALUES,
    OUT,
    GRAD_OUT,
    GRAD_LSE,
    LSE,
    DELTA,
    DQ,
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
    stride_gt,
    stride_gh,
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
    """DQ (contiguous [Tq, Hq, D]) of the tile's rows: the walk of `forward_kernel` once more.

    DELTA (contiguous [Tq, Hq], for the kernels of dK and dV) = sum over D of out * d out, less d lse: what
    softmax's backward takes off every d score.
    """
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
    grad = load_rows(GRAD_OUT, query, head, stride_gt, stride_gh, ok, D)
    at = query.to(tl.int64) * num_heads + head
    lse = tl.load(LSE + at, mask=ok, other=0.0) * LOG2_E
    out = load_rows(OUT, query, head, stride_ot, stride_oh, ok, D)
    delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1) - tl.load(GRAD_LSE + at, mask=ok, other=0.0)
    tl.store(DELTA + at, delta, mask=ok)
    scale_log2 = scale * LOG2_E
    dq = tl.zeros([T * GROUP_PADDED, D], tl.float32)
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
        dq = query_gradient(dq, q, grad, lse, delta, k, v, ok, scale_log2, False)
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
        dq = query_gradient(dq, q, grad, lse, delta, k, v, seen, scale_log2, True)
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
        dq = query_gradient(dq, q, grad, lse, delta, k, v, seen, scale_log2, True)
    at = row_offset(query, head, num_heads * D, D)[:, None] + tl.arange(0, D)[None, :]
    tl.store(DQ + at, (dq * scale).to(DQ.dtype.element_ty), mask=ok[:, None])


@triton.jit
def key_gradients(
    dk, dv, k, v, Q, GRAD_OUT, LSE, DELTA, query, head, ok, seen, num_heads, stride_qt, stride_qh, stride_gt,
    stride_gh, scale_log2, D: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """Add the share of the rows [M] to dk / scale and dv; with MASK, key n is seen by those with seen[n].

    Keys are the products' rows. A row that is not `ok` is loaded as zeros and adds nothing in either case.
    """
    q = load_rows(Q, query, head, stride_qt, stride_qh, ok, D)
    grad = load_rows(GRAD_OUT, query, head, stride_gt, stride_gh, ok, D)
    at = query.to(tl.int64) * num_heads + head
    lse = tl.load(LSE + at, mask=ok, other=0.0) * LOG2_E
    delta = tl.load(DELTA + at, mask=ok, other=0.0)
    p = tl.exp2(product(k, tl.trans(q)) * scale_log2 - lse[None, :])
    if MASK:
        p = tl.where(seen, p, 0.0)
    dv += product(p.to(grad.dtype), grad)
    ds = p * (product(v, tl.trans(grad)) - delta[None, :])
    dk += product(ds.to(q.dtype), q)
    return dk, dv


@triton.jit
def chosen_dkdv_kernel(
    Q,
    K,
    V,
    GRAD_OUT,
    LSE,
    DELTA,
    DK,
    DV,
    QUERIES,
    COUNTS,
    ENDS,
    STARTS,
    KEY_ROWS,
    num_slots,
    num_heads,
    num_kv_heads,
    scale,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    stride_gt,
    stride_gh,
    GROUP: tl.constexpr,
    GROUP_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    D: tl.constexpr,
    T: tl.constexpr,
):
    """Add to DK, DV (contiguous [Tk, Hkv, D]) of one block what its queries give, in their order."""
    slot = tl.program_id(0)
    kv_head = tl.program_id(1)
    count = tl.load(COUNTS + kv_head * num_slots + slot)
    if count > 0:  # STARTS is not filled where nobody chose the block
        key = tl.load(STARTS + slot) + tl.arange(0, BLOCK)
        if KEY_ROWS is not None:  # dk and dv lie as k and v do
            key = tl.load(KEY_ROWS + key)
        k, v = load_all_keys(K, V, None, key, kv_head, stride_kt, stride_kh, stride_vt, stride_vh, D)
        scale_log2 = scale * LOG2_E
        dk = tl.zeros([BLOCK, D], tl.float32)
        dv = tl.zeros([BLOCK, D], tl.float32)
        m = tl.arange(0, T * GROUP_PADDED)
        r = m % GROUP_PADDED
        end = tl.load(ENDS + kv_head * num_slots + slot)
        for j in range(end - count, end, T):
            entry = j + m // GROUP_PADDED
            ok = (entry < end) & (r < GROUP)
            query = tl.load(QUERIES + entry, mask=entry < end, other=0)
            dk, dv = key_gradients(
                dk, dv, k, v, Q, GRAD_OUT, LSE, DELTA, query, kv_head * GROUP + r, ok, ok[None, :], num_heads,
                stride_qt, stride_qh, stride_gt, stride_gh, scale_log2, D, False,
            )  # fmt: skip
        out = row_offset(key, kv_head, num_kv_heads * D, D)[:, None] + tl.arange(0, D)[None, :]
        dk = dk * scale + tl.load(DK + out).to(tl.float32)
        dv += tl.load(DV + out).to(tl.float32)
        tl.store(DK + out, dk.to(DK.dtype.element_ty))
        tl.store(DV + out, dv.to(DV.dtype.element_ty))
