"""Forward: a tile of T queries x R heads walks init, local and the union of its chosen blocks."""

# Arguments of Triton functions are pointers, blocks and scalars of no Python type.
# ruff: noqa: ANN001, ANN201
# mypy: disallow-untyped-defs=false, disallow-untyped-decorators=false
# mypy: disallow-untyped-calls=false, disallow-incomplete-defs=false

from __future__ import annotations

import triton
import triton.language as tl

from phsa_kernels.primitives import LOG2_E, MASKED, load_rows, product, row_offset


@triton.jit
def inner_range(LOCAL_START, POSITION, top, bottom, last, BN: tl.constexpr):
    """Return (first local key of any row, first and end of the whole steps that every row sees in full)."""
    lowest = tl.load(LOCAL_START + top)
    first = lowest + tl.cdiv(tl.load(LOCAL_START + bottom) - lowest, BN) * BN
    first = tl.minimum(first, last)
    return lowest, first, first + tl.maximum(tl.load(POSITION + top) + 1 - first, 0) // BN * BN


@triton.jit
def attend_keys(
    acc, peak, total, q, K, V, key, key_ok, seen, kv_head, stride_kt, stride_kh, stride_vt, stride_vh, scale,
    D: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """One online-softmax step over the keys [BN]; with MASK, row m attends to those with seen[m]."""
    k = load_rows(K, key, kv_head, stride_kt, stride_kh, key_ok, D)
    v = load_rows(V, key, kv_head, stride_vt, stride_vh, key_ok, D)
    score = product(q, tl.trans(k)) * (scale * LOG2_E)
    if MASK:
        score = tl.where(seen, score, MASKED)
    new_peak = tl.maximum(peak, tl.max(score, 1))
    p = tl.exp2(score - new_peak[:, None])
    shrink = tl.exp2(peak - new_peak)
    acc = acc * shrink[:, None] + product(p.to(v.dtype), v)
    return acc, new_peak, total * shrink + tl.sum(p, 1)


@triton.jit
def forward_kernel(
    Q,
    K,
    V,
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
    stride_ot,
    stride_oh,
    INIT: tl.constexpr,
    TOPK: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    D: tl.constexpr,
    T: tl.constexpr,
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
    acc = tl.zeros([T * GROUP_PADDED, D], tl.float32)
    peak = tl.full([T * GROUP_PADDED], MASKED, tl.float32)
    total = tl.zeros([T * GROUP_PADDED], tl.float32)
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
            acc, peak, total = attend_keys(
                acc, peak, total, q, K, V, key, key < end, seen, kv_head, stride_kt, stride_kh, stride_vt,
                stride_vh, scale, D, True,
            )  # fmt: skip
    last = tl.load(POSITION + bottom) + 1
    lowest, first_inner, end_inner = inner_range(LOCAL_START, POSITION, top, bottom, last, BN)
    for first in range(lowest, first_inner, BN):
        key = first + n
        seen = (key[None, :] >= local_start[:, None]) & (key[None, :] <= position[:, None])
        acc, peak, total = attend_keys(
            acc, peak, total, q, K, V, key, key < last, seen, kv_head, stride_kt, stride_kh, stride_vt,
            stride_vh, scale, D, True,
        )  # fmt: skip
    for first in range(first_inner, end_inner, BN):
        key = first + n
        acc, peak, total = attend_keys(
            acc, peak, total, q, K, V, key, key < last, key < last, kv_head, stride_kt, stride_kh, stride_vt,
            stride_vh, scale, D, False,
        )  # fmt: skip
    for first in range(end_inner, last, BN):
        key = first + n
        seen = (key[None, :] >= local_start[:, None]) & (key[None, :] <= position[:, None])
        acc, peak, total = attend_keys(
            acc, peak, total, q, K, V, key, key < last, seen, kv_head, stride_kt, stride_kh, stride_vt,
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
            acc, peak, total = attend_keys(
                acc, peak, total, q, K, V, key, entry < count, seen, kv_head, stride_kt, stride_kh, stride_vt,
                stride_vh, scale, D, True,
            )  # fmt: skip
    out = row_offset(query, head, stride_ot, stride_oh)[:, None] + tl.arange(0, D)[None, :]
    tl.store(OUT + out, (acc / total[:, None]).to(OUT.dtype.element_ty), mask=ok[:, None])
    lse = (peak + tl.log2(total)) / LOG2_E
    tl.store(LSE + query.to(tl.int64) * num_heads + head, lse, mask=ok)
