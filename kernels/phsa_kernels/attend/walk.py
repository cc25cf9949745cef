"""The walk of a query tile over its keys, shared by forward and dQ.

Three loops: steps at the edges of the windows (init, both ends of the local window) with a mask; the inner
steps of the local window, which every row of the tile sees in full, without one; the union of chosen blocks.
"""

# Arguments of Triton functions are pointers, blocks and scalars of no Python type.
# ruff: noqa: ANN001, ANN201
# mypy: disallow-untyped-defs=false, disallow-untyped-decorators=false
# mypy: disallow-untyped-calls=false, disallow-incomplete-defs=false

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def inner_range(LOCAL_START, POSITION, top, bottom, BN: tl.constexpr):
    """Return (first local key of any row, first and end of the whole steps all rows see, last key)."""
    last = tl.load(POSITION + bottom) + 1
    lowest = tl.load(LOCAL_START + top)
    first = lowest + tl.cdiv(tl.load(LOCAL_START + bottom) - lowest, BN) * BN
    first = tl.minimum(first, last)
    return lowest, first, first + tl.maximum(tl.load(POSITION + top) + 1 - first, 0) // BN * BN, last


@triton.jit
def edge_steps(doc, last_doc, lowest, first_inner, end_inner, last, INIT: tl.constexpr, BN: tl.constexpr):
    """Return how many steps the init windows of the tile's documents take, and all edges together."""
    INIT_STEPS: tl.constexpr = (INIT + BN - 1) // BN
    init = (last_doc - doc + 1) * INIT_STEPS
    return init, init + tl.cdiv(first_inner - lowest, BN) + tl.cdiv(last - end_inner, BN)


@triton.jit
def edge_step(
    step, init_steps, CU_SEQLENS, doc, last_doc, lowest, first_inner, end_inner, last, start, init_end,
    local_start, position, INIT: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Return (first key, end of the keys to read, lowest and end of each row's own keys) of a step."""
    local = step - init_steps
    head_steps = tl.cdiv(first_inner - lowest, BN)
    first = tl.where(local < head_steps, lowest + local * BN, end_inner + (local - head_steps) * BN)
    end = last
    low, high = local_start, position + 1
    if INIT > 0:
        INIT_STEPS: tl.constexpr = (INIT + BN - 1) // BN
        is_init = step < init_steps
        own = tl.minimum(doc + step // INIT_STEPS, last_doc)
        begin = tl.load(CU_SEQLENS + own)
        init_last = tl.minimum(begin + INIT, tl.load(CU_SEQLENS + own + 1))
        first = tl.where(is_init, begin + step % INIT_STEPS * BN, first)
        end = tl.where(is_init, init_last, end)
        low = tl.where(is_init, start, low)
        # Rows of the next document see keys past this one's end, but in that document's own steps.
        high = tl.where(is_init, tl.minimum(init_end, init_last), high)
    return first, end, low, high


@triton.jit
def union_step(
    first, count, base, word_stride, FIRST_TOKEN, BITS, low_bit, high_bit, BLOCK: tl.constexpr,
    WORDS: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Return (keys [BN], which may be read, which row chose which [rows, BN]) of the entries from `first`."""
    n = tl.arange(0, BN)
    entry = first + n // BLOCK
    ok = entry < count
    key = tl.load(FIRST_TOKEN + base + entry, mask=ok, other=0) + n % BLOCK
    chose = tl.load(BITS + base + entry, mask=ok, other=0)[None, :] & low_bit[:, None]
    if WORDS == 2:
        high = tl.load(BITS + word_stride + base + entry, mask=ok, other=0)
        chose = chose | (high[None, :] & high_bit[:, None])
    return key, ok, chose != 0
