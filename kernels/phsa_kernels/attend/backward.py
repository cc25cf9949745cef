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

from phsa_kernels.attend.forward import inner_range
from phsa_kernels.primitives import LOG2_E, load_rows, product, row_offset


@triton.jit
def delta_kernel(
    OUT, GRAD_OUT, GRAD_LSE, DELTA, num_queries, num_heads, stride_ot, stride_oh, stride_gt, stride_gh,
    D: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """DELTA = sum over D of out * d out, less d lse: what softmax's backward takes off every d score."""
    row = tl.program_id(0) * T + tl.arange(0, T)
    head = tl.program_id(1)
    ok = row < num_queries
    out = load_rows(OUT, row, head, stride_ot, stride_oh, ok, D).to(tl.float32)
    grad = load_rows(GRAD_OUT, row, head, stride_gt, stride_gh, ok, D).to(tl.float32)
    offset = row.to(tl.int64) * num_heads + head
    grad_lse = tl.load(GRAD_LSE + offset, mask=ok, other=0.0)
    tl.store(DELTA + offset, tl.sum(out * grad, 1) - grad_lse, mask=ok)


@triton.jit
def query_gradient(
    dq, q, grad, lse, delta, K, V, key, key_ok, seen, kv_head, stride_kt, stride_kh, stride_vt, stride_vh,
    scale, D: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """Add the share of the keys [BN] to dq / scale; with MASK, row m attends to those with seen[m]."""
    k = load_rows(K, key, kv_head, stride_kt, stride_kh, key_ok, D)
    v = load_rows(V, key, kv_head, stride_vt, stride_vh, key_ok, D)
    score = product(q, tl.trans(k)) * (scale * LOG2_E)
    p = tl.exp2(score - lse[:, None])
    if MASK:
        p = tl.where(seen, p, 0.0)
    ds = p * (product(grad, tl.trans(v)) - delta[:, None])
    return dq + product(ds.to(k.dtype), k)


@triton.jit
def dq_kernel(
    Q,
    K,
    V,
    GRAD_OUT,
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
    num_rows,
    num_tiles,
    num_heads,
    scale,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    stride_gt,
    stride_gh,
    INIT: tl.constexpr,
    TOPK: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    D: tl.constexpr,
    T: tl.constexpr,
    BN: tl.constexpr,
):
    """DQ (contiguous [Tq, Hq, D]) of the tile's rows: the walk of `forward_kernel` once more."""
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
    delta = tl.load(DELTA + at, mask=ok, other=0.0)
    dq = tl.zeros([T * GROUP_PADDED, D], tl.float32)
    n = tl.arange(0, BN)
    top = tile * T
    bottom = tl.minimum(top + T, num_rows) - 1
    for doc in range(tl.load(DOC + top), tl.load(DOC + bottom) + 1):
        begin = tl.load(CU_SEQLENS + doc)
        end = tl.minimum(begin + INIT, tl.load(CU_SEQLENS + doc + 1))
        for first in range(begin, end, BN):
            key = first + n
            # Rows of the next document see keys past this one's end, but in that document's own turn.
            seen = (key[None, :] >= start[:, None]) & (key[None, :] < tl.minimum(init_end, end)[:, None])
            dq = query_gradient(
                dq, q, grad, lse, delta, K, V, key, key < end, seen, kv_head, stride_kt, stride_kh, stride_vt,
                stride_vh, scale, D, True,
            )  # fmt: skip
    last = tl.load(POSITION + bottom) + 1
    lowest, first_inner, end_inner = inner_range(LOCAL_START, POSITION, top, bottom, last, BN)
    for first in range(lowest, first_inner, BN):
        key = first + n
        seen = (key[None, :] >= local_start[:, None]) & (key[None, :] <= position[:, None])
        dq = query_gradient(
            dq, q, grad, lse, delta, K, V, key, key < last, seen, kv_head, stride_kt, stride_kh, stride_vt,
            stride_vh, scale, D, True,
        )  # fmt: skip
    for first in range(first_inner, end_inner, BN):
        key = first + n
        dq = query_gradient(
            dq, q, grad, lse, delta, K, V, key, key < last, key < last, kv_head, stride_kt, stride_kh,
            stride_vt, stride_vh, scale, D, False,
        )  # fmt: skip
    for first in range(end_inner, last, BN):
        key = first + n
        seen = (key[None, :] >= local_start[:, None]) & (key[None, :] <= position[:, None])
        dq = query_gradient(
            dq, q, grad, lse, delta, K, V, key, key < last, seen, kv_head, stride_kt, stride_kh, stride_vt,
            stride_vh, scale, D, True,
        )  # fmt: skip
    if TOPK > 0:
        base = (kv_head.to(tl.int64) * num_tiles + tile) * (T * TOPK)
        count = tl.load(COUNT + kv_head * num_tiles + tile)
        for j in range(0, count, BN // BLOCK):
            entry = j + n // BLOCK
            key = tl.load(FIRST_TOKEN + base + entry, mask=entry < count, other=0) + n % BLOCK
            bits = tl.load(BITS + base + entry, mask=entry < count, other=0)
            seen = ((bits[None, :] >> t[:, None]) & 1) != 0
            dq = query_gradient(
                dq, q, grad, lse, delta, K, V, key, entry < count, seen, kv_head, stride_kt, stride_kh,
                stride_vt, stride_vh, scale, D, True,
            )  # fmt: skip
    out = row_offset(query, head, num_heads * D, D)[:, None] + tl.arange(0, D)[None, :]
    tl.store(DQ + out, (dq * scale).to(DQ.dtype.element_ty), mask=ok[:, None])


@triton.jit
def key_gradients(
    dk, dv, k, v, Q, GRAD_OUT, LSE, DELTA, query, head, ok, seen, num_heads, stride_qt, stride_qh, stride_gt,
    stride_gh, scale, D: tl.constexpr,
):  # fmt: skip
    """Add the share of the rows [M] to dk / scale and dv; seen [keys, M]: keys are the products' rows."""
    q = load_rows(Q, query, head, stride_qt, stride_qh, ok, D)
    grad = load_rows(GRAD_OUT, query, head, stride_gt, stride_gh, ok, D)
    at = query.to(tl.int64) * num_heads + head
    lse = tl.load(LSE + at, mask=ok, other=0.0) * LOG2_E
    delta = tl.load(DELTA + at, mask=ok, other=0.0)
    score = product(k, tl.trans(q)) * (scale * LOG2_E)
    p = tl.where(seen, tl.exp2(score - lse[None, :]), 0.0)
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
    BLOCK_START,
    QUERIES,
    OFFSETS,
    ENDS,
    num_blocks,
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
    """DK, DV (contiguous [Tk, Hkv, D]) of one block from the queries that chose it, in their order."""
    block = tl.program_id(0)
    kv_head = tl.program_id(1)
    start = tl.load(BLOCK_START + block)
    key = start + tl.arange(0, BLOCK)
    key_ok = (key >= 0) & (start >= 0)
    k = load_rows(K, key, kv_head, stride_kt, stride_kh, key_ok, D)
    v = load_rows(V, key, kv_head, stride_vt, stride_vh, key_ok, D)
    dk = tl.zeros([BLOCK, D], tl.float32)
    dv = tl.zeros([BLOCK, D], tl.float32)
    m = tl.arange(0, T * GROUP_PADDED)
    r = m % GROUP_PADDED
    end = tl.load(ENDS + kv_head * num_blocks + block)
    for j in range(tl.load(OFFSETS + kv_head * num_blocks + block), end, T):
        entry = j + m // GROUP_PADDED
        query = tl.load(QUERIES + entry, mask=entry < end, other=-1)
        ok = (query >= 0) & (r < GROUP)
        query = tl.maximum(query, 0)
        dk, dv = key_gradients(
            dk, dv, k, v, Q, GRAD_OUT, LSE, DELTA, query, kv_head * GROUP + r, ok, ok[None, :], num_heads,
            stride_qt, stride_qh, stride_gt, stride_gh, scale, D,
        )  # fmt: skip
    out = row_offset(key, kv_head, num_kv_heads * D, D)[:, None] + tl.arange(0, D)[None, :]
    tl.store(DK + out, (dk * scale).to(DK.dtype.element_ty), mask=key_ok[:, None])
    tl.store(DV + out, dv.to(DV.dtype.element_ty), mask=key_ok[:, None])
