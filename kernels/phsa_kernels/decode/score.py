"""Scores of all blocks before the current one, and the best k of each chunk of them.

softmax_sum needs each head's normalizer over all blocks before the group's scores can be compared. So the
score kernel writes dot products (fp32, in powers of two) and each program's own maximum and sum; the choose
kernel adds the latter up, every program in the same order, before it compares.
"""

# Arguments of Triton functions are pointers, blocks and scalars of no Python type.
# ruff: noqa: ANN001, ANN201
# mypy: disallow-untyped-defs=false, disallow-untyped-decorators=false
# mypy: disallow-untyped-calls=false, disallow-incomplete-defs=false

from __future__ import annotations

import triton
import triton.language as tl

from phsa_kernels.primitives import LOG2_E, LOWEST, product

# Below the key of every candidate.
NO_KEY = tl.constexpr(-9223372036854775808)


@triton.jit
def load_group(Q, row, head, stride_qb, stride_qh, GROUP: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr):
    """Load the queries [HEADS, D] of a group, zeros past its GROUP heads."""
    r = tl.arange(0, HEADS)
    offset = row.to(tl.int64) * stride_qb + (head * GROUP + r) * stride_qh
    return tl.load(Q + offset[:, None] + tl.arange(0, D)[None, :], mask=(r < GROUP)[:, None], other=0.0)


# Numbers that say how a step is cut are no reason to compile another kernel.
@triton.jit(do_not_specialize=["split_blocks", "dense_len"])
def score_kernel(
    Q, POOLED, LENGTHS, SCORES, PEAK, TOTAL, scale, num_blocks, split_blocks, dense_len, stride_qb,
    stride_qh, stride_pb, stride_pn, stride_ph, HKV: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr,
    SOFTMAX: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """SCORES[pair, head of the group, block], or [pair, block] summed over the group without softmax.

    PEAK and TOTAL [pair, split, head of the group]: maximum and sum of base-2 exponentials of a split.
    """
    split, pair = tl.program_id(0), tl.program_id(1)
    row, head = pair // HKV, pair % HKV
    length = tl.load(LENGTHS + row)
    first = split * split_blocks
    end = tl.minimum((length - 1) // BLOCK, first + split_blocks)
    end = tl.where(length > dense_len, end, 0)
    if first < end:
        q = load_group(Q, row, head, stride_qb, stride_qh, GROUP, HEADS, D)
        r, d = tl.arange(0, HEADS), tl.arange(0, D)
        keys = POOLED + row.to(tl.int64) * stride_pb + head * stride_ph
        rows_out = 1
        if SOFTMAX:
            rows_out = GROUP
        out = SCORES + pair.to(tl.int64) * rows_out * num_blocks
        peak = tl.full([HEADS, BN], LOWEST, tl.float32)
        total = tl.zeros([HEADS, BN], tl.float32)
        for top in range(first, end, BN):
            n = top + tl.arange(0, BN)
            seen = n < end
            offset = n.to(tl.int64) * stride_pn
            tile = tl.load(keys + offset[:, None] + d[None, :], mask=seen[:, None], other=0.0)
            dot = product(q, tl.trans(tile))
            if SOFTMAX:
                exponent = tl.where(seen[None, :], dot * (scale * LOG2_E), float("-inf"))
                where = out + r[:, None] * num_blocks + n[None, :]
                tl.store(where, exponent, mask=(r < GROUP)[:, None] & seen[None, :])
                above = tl.maximum(peak, exponent)
                total = total * tl.exp2(peak - above) + tl.exp2(exponent - above)
                peak = above
            else:
                tl.store(out + n, tl.sum(dot, 0) * scale, mask=seen)
        if SOFTMAX:
            top_of_row = tl.max(peak, 1)
            sum_of_row = tl.sum(total * tl.exp2(peak - top_of_row[:, None]), 1)
            place = (pair * tl.num_programs(0) + split) * GROUP + r
            tl.store(PEAK + place, top_of_row, mask=r < GROUP)
            tl.store(TOTAL + place, sum_of_row, mask=r < GROUP)


@triton.jit
def comparable(score, block):
    """Return int64 keys that order by score and, among equal scores, by the lower block first."""
    score = tl.where(score == 0.0, 0.0, score)  # -0 and 0 are equal scores
    bits = score.to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return (ordered.to(tl.int64) << 32) | (0x7FFFFFFF - block).to(tl.int64)


@triton.jit
def block_of(key):
    """Return the block of a key that `comparable` made; -1 of NO_KEY."""
    return tl.where(key == NO_KEY, -1, 0x7FFFFFFF - (key & 0xFFFFFFFF).to(tl.int32))


@triton.jit
def candidate_bounds(length, dense_len, INIT: tl.constexpr, LOCAL: tl.constexpr, BLOCK: tl.constexpr):
    """Return (first candidate, past the last one); none where the sequence is attended to densely."""
    last = (length - 1) // BLOCK - LOCAL // BLOCK
    return INIT // BLOCK, tl.where((length > dense_len) & (length > 0), last + 1, 0)


@triton.jit(do_not_specialize=["num_splits", "split_blocks", "dense_len"])
def choose_kernel(
    LENGTHS, SCORES, PEAK, TOTAL, BEST, num_blocks, num_splits, split_blocks, dense_len, HKV: tl.constexpr,
    GROUP: tl.constexpr, SOFTMAX: tl.constexpr, INIT: tl.constexpr, LOCAL: tl.constexpr,
    BLOCK: tl.constexpr, TOPK: tl.constexpr, SPLITS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """BEST[pair, chunk, j]: the chunk's j-th best candidate as a comparable key; chunks without any: nothing.

    SPLITS: splits of the score kernel, padded to a power of two.
    """
    chunk, pair = tl.program_id(0), tl.program_id(1)
    length = tl.load(LENGTHS + pair // HKV)
    first, end = candidate_bounds(length, dense_len, INIT, LOCAL, BLOCK)
    if chunk * CHUNK < end:
        block = chunk * CHUNK + tl.arange(0, CHUNK)
        candidate = (block >= first) & (block < end)
        score = tl.zeros([CHUNK], tl.float32)
        if SOFTMAX:
            split = tl.arange(0, SPLITS)
            used = split < tl.cdiv((length - 1) // BLOCK, split_blocks)
            for r in tl.static_range(GROUP):
                place = (pair * num_splits + split) * GROUP + r
                peak = tl.load(PEAK + place, mask=used, other=LOWEST)
                total = tl.load(TOTAL + place, mask=used, other=0.0)
                highest = tl.max(peak, 0)
                norm = highest + tl.log2(tl.sum(total * tl.exp2(peak - highest), 0))
                mine = SCORES + (pair.to(tl.int64) * GROUP + r) * num_blocks
                exponent = tl.load(mine + block, mask=candidate, other=float("-inf"))
                score += tl.exp2(exponent - norm)
        else:
            score = tl.load(SCORES + pair.to(tl.int64) * num_blocks + block, mask=candidate, other=0.0)
        key = tl.where(candidate, comparable(score, block), NO_KEY)
        out = BEST + (pair * tl.num_programs(0) + chunk) * TOPK
        for j in range(TOPK):
            best = tl.max(key, 0)
            tl.store(out + j, best)
            key = tl.where(key == best, NO_KEY, key)
