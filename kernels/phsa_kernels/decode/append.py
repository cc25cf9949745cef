"""The append kernel: a token's key and value into the caches, and the open block's running sums."""

# Arguments of Triton functions are pointers, blocks and scalars of no Python type.
# ruff: noqa: ANN001, ANN201
# mypy: disallow-untyped-defs=false, disallow-untyped-decorators=false
# mypy: disallow-untyped-calls=false, disallow-incomplete-defs=false

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def append_kernel(
    K, V, MARKS, LENGTHS, K_CACHE, V_CACHE, POOLED, OPEN_SUMS, OPEN_MARKS, capacity, mean_weight, stride_kb,
    stride_kh, stride_vb, stride_vh, stride_kcb, stride_kcn, stride_kch, stride_vcb, stride_vcn, stride_vch,
    stride_pb, stride_pn, stride_ph, HKV: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """One program for each (sequence, key-value head)."""
    pair = tl.program_id(0)
    row, head = pair // HKV, pair % HKV
    position = tl.load(LENGTHS + row) - 1
    if (position >= 0) & (position < capacity):
        d = tl.arange(0, D)
        big = row.to(tl.int64)
        at = position.to(tl.int64)
        key = tl.load(K + big * stride_kb + head * stride_kh + d)
        value = tl.load(V + big * stride_vb + head * stride_vh + d)
        tl.store(K_CACHE + big * stride_kcb + at * stride_kcn + head * stride_kch + d, key)
        tl.store(V_CACHE + big * stride_vcb + at * stride_vcn + head * stride_vch + d, value)
        marked = tl.load(MARKS + row).to(tl.int32)
        within = position % BLOCK
        sums = OPEN_SUMS + pair.to(tl.int64) * (2 * D) + d
        goes_on = within > 0
        wide = key.to(tl.float32)
        total = tl.load(sums, mask=goes_on & (d < D), other=0.0) + wide
        marked_total = tl.load(sums + D, mask=goes_on & (d < D), other=0.0) + tl.where(marked != 0, wide, 0.0)
        count = tl.load(OPEN_MARKS + pair, mask=goes_on, other=0) + marked
        tl.store(sums, total)
        tl.store(sums + D, marked_total)
        tl.store(OPEN_MARKS + pair, count)
        if within == BLOCK - 1:
            mean = total / BLOCK
            both = mean_weight * mean + (1.0 - mean_weight) * (marked_total / tl.maximum(count, 1))
            pooled = tl.where(count > 0, both, mean)
            block = (position // BLOCK).to(tl.int64)
            out = POOLED + big * stride_pb + block * stride_pn + head * stride_ph + d
            tl.store(out, pooled.to(POOLED.dtype.element_ty))
