"""Attention of one query a head over init, local and chosen tokens, cut into splits, and their sum.

The keys of a sequence are numbered by slots of fixed meaning: [0, init) the init window, [init, init + local)
the local window, then m slots for each chosen block. Slots without a token are masked. A sequence that is
attended to densely has its tokens in the slots of their own positions.
"""

# Arguments of Triton functions are pointers, blocks and scalars of no Python type.
# ruff: noqa: ANN001, ANN201
# mypy: disallow-untyped-defs=false, disallow-untyped-decorators=false
# mypy: disallow-untyped-calls=false, disallow-incomplete-defs=false

from __future__ import annotations

import triton
import triton.language as tl

from phsa_kernels.decode.score import NO_KEY, block_of, candidate_bounds, load_group
from phsa_kernels.primitives import LOG2_E, LOWEST, product

_PAST_ALL = tl.constexpr(2147483647)


@triton.jit
def merge_chunks(
    BEST, pair, num_chunks, used_chunks, TOPK: tl.constexpr, SLOTS: tl.constexpr, N: tl.constexpr
):
    """Return the best TOPK blocks [SLOTS] of all chunks, best first, -1 where there are none.

    N: chunks * TOPK padded to a power of two.
    """
    n, slot = tl.arange(0, N), tl.arange(0, SLOTS)
    key = tl.load(BEST + pair * num_chunks * TOPK + n, mask=n < used_chunks * TOPK, other=NO_KEY)
    ids = tl.full([SLOTS], -1, tl.int32)
    for j in range(TOPK):
        best = tl.max(key, 0)
        ids = tl.where(slot == j, block_of(best), ids)
        key = tl.where(key == best, NO_KEY, key)
    return ids


@triton.jit
def store_ascending(IDS, ids, TOPK: tl.constexpr, SLOTS: tl.constexpr):
    """Store ids [SLOTS] in ascending order, -1 last."""
    slot = tl.arange(0, SLOTS)
    order = tl.where(ids < 0, _PAST_ALL, ids)
    before = (order[None, :] < order[:, None]) | (
        (order[None, :] == order[:, None]) & (slot[None, :] < slot[:, None])
    )
    tl.store(IDS + tl.sum(before.to(tl.int32), 1), ids, mask=slot < TOPK)


@triton.jit
def slot_keys(
    t, ids, length, dense, INIT: tl.constexpr, LOCAL: tl.constexpr, BLOCK: tl.constexpr, SLOTS: tl.constexpr
):
    """Return (position, whether there is a token) of the slots t."""
    local_start = tl.maximum((length - 1) // BLOCK - LOCAL // BLOCK + 1, 0) * BLOCK
    j = (t - INIT - LOCAL) // BLOCK
    chosen = tl.sum(tl.where(j[:, None] == tl.arange(0, SLOTS)[None, :], ids[None, :], 0), 1)
    in_init, in_local = t < INIT, t < INIT + LOCAL
    position = tl.where(
        in_init | dense, t, tl.where(in_local, local_start + t - INIT, chosen * BLOCK + t % BLOCK)
    )
    # Init ends where local begins: each token counts once.
    end = tl.where(in_init & (dense == 0), tl.minimum(INIT, local_start), length)
    return position, (position < end) & (dense | in_local | ((chosen >= 0) & (j < SLOTS)))


@triton.jit(do_not_specialize=["num_chunks", "split_keys", "dense_len"])
def attend_kernel(
    Q, K, V, LENGTHS, BEST, IDS, PART, PEAK, TOTAL, scale, num_chunks, split_keys, dense_len, stride_qb,
    stride_qh, stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh, HKV: tl.constexpr,
    GROUP: tl.constexpr, HEADS: tl.constexpr, INIT: tl.constexpr, LOCAL: tl.constexpr,
    BLOCK: tl.constexpr, TOPK: tl.constexpr, SLOTS: tl.constexpr, CHUNK: tl.constexpr,
    MERGED: tl.constexpr, D: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """PART [pair, split, head of the group, D]: sums of a split's values, under the PEAK and TOTAL beside it.

    SLOTS: TOPK padded to a power of two; slots of ids past TOPK hold -1. IDS[pair]: the chosen blocks.
    """
    split, pair = tl.program_id(0), tl.program_id(1)
    row, head = pair // HKV, pair % HKV
    length = tl.load(LENGTHS + row)
    dense = length <= dense_len
    first = split * split_keys
    ids = tl.full([SLOTS], -1, tl.int32)
    end = tl.where(dense, length, INIT + LOCAL + TOPK * BLOCK)
    end = tl.where(length > 0, tl.minimum(end, first + split_keys), 0)
    if TOPK > 0:  # noqa: SIM102 - the compiler leaves the whole branch out
        if first + split_keys > INIT + LOCAL:
            _, candidates_end = candidate_bounds(length, dense_len, INIT, LOCAL, BLOCK)
            used = tl.cdiv(tl.maximum(candidates_end, 0), CHUNK)
            ids = merge_chunks(BEST, pair, num_chunks, used, TOPK, SLOTS, MERGED)
            if first <= INIT + LOCAL:
                store_ascending(IDS + pair * TOPK, ids, TOPK, SLOTS)
    if first < end:
        q = load_group(Q, row, head, stride_qb, stride_qh, GROUP, HEADS, D)
        d, r = tl.arange(0, D), tl.arange(0, HEADS)
        keys = K + row.to(tl.int64) * stride_kb + head * stride_kh
        values = V + row.to(tl.int64) * stride_vb + head * stride_vh
        peak = tl.full([HEADS], LOWEST, tl.float32)
        total = tl.zeros([HEADS], tl.float32)
        sums = tl.zeros([HEADS, D], tl.float32)
        for top in range(first, end, BN):
            t = top + tl.arange(0, BN)
            position, ok = slot_keys(t, ids, length, dense, INIT, LOCAL, BLOCK, SLOTS)
            at = position.to(tl.int64)
            ok = ok & (t < end)
            key = tl.load(keys + (at * stride_kn)[:, None] + d[None, :], mask=ok[:, None], other=0.0)
            value = tl.load(values + (at * stride_vn)[:, None] + d[None, :], mask=ok[:, None], other=0.0)
            exponent = tl.where(ok[None, :], product(q, tl.trans(key)) * (scale * LOG2_E), float("-inf"))
            above = tl.maximum(peak, tl.max(exponent, 1))
            shrink = tl.exp2(peak - above)
            probability = tl.exp2(exponent - above[:, None])
            total = total * shrink + tl.sum(probability, 1)
            sums = sums * shrink[:, None] + product(probability.to(value.dtype), value)
            peak = above
        place = (pair.to(tl.int64) * tl.num_programs(0) + split) * GROUP + r
        tl.store(PEAK + place, peak, mask=r < GROUP)
        tl.store(TOTAL + place, total, mask=r < GROUP)
        tl.store(PART + (place * D)[:, None] + d[None, :], sums, mask=(r < GROUP)[:, None])


@triton.jit(do_not_specialize=["num_splits", "sparse_splits", "split_keys", "dense_len"])
def combine_kernel(
    LENGTHS, PART, PEAK, TOTAL, OUT, LSE, num_splits, sparse_splits, split_keys, dense_len,
    HKV: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """One program for each (sequence, query head): adds the splits up, B at a time, in their order."""
    index = tl.program_id(0)
    pair, r = index // GROUP, index % GROUP
    length = tl.load(LENGTHS + pair // HKV)
    used = tl.where(length <= dense_len, tl.cdiv(length, split_keys), sparse_splits)
    used = tl.where(length > 0, used, 0)
    d = tl.arange(0, D)
    peak = tl.full([1], LOWEST, tl.float32)
    total = tl.zeros([1], tl.float32)
    sums = tl.zeros([D], tl.float32)
    for top in range(0, used, B):
        split = top + tl.arange(0, B)
        ok = split < used
        place = (pair.to(tl.int64) * num_splits + split) * GROUP + r
        its_peak = tl.load(PEAK + place, mask=ok, other=LOWEST)
        its_total = tl.load(TOTAL + place, mask=ok, other=0.0)
        part = tl.load(PART + (place * D)[:, None] + d[None, :], mask=ok[:, None], other=0.0)
        above = tl.maximum(peak, tl.max(its_peak, 0))
        weight = tl.exp2(its_peak - above)
        shrink = tl.exp2(peak - above)
        total = total * shrink + tl.sum(its_total * weight, 0)
        sums = sums * shrink + tl.sum(part * weight[:, None], 0)
        peak = above
    some = total > 0
    out = tl.where(some, sums / tl.where(some, total, 1.0), 0.0)
    tl.store(OUT + index.to(tl.int64) * D + d, out.to(OUT.dtype.element_ty))
    lse = tl.where(some, (peak + tl.log2(tl.where(some, total, 1.0))) / LOG2_E, float("-inf"))
    tl.store(LSE + index + tl.arange(0, 1), lse)
