"""The union of a query tile's chosen blocks, each with one bit per query of the tile."""

# Arguments of Triton functions are pointers, blocks and scalars of no Python type.
# ruff: noqa: ANN001, ANN201
# mypy: disallow-untyped-defs=false, disallow-untyped-decorators=false
# mypy: disallow-untyped-calls=false, disallow-incomplete-defs=false

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def union_kernel(
    IDS,
    ORDER,
    START,
    INIT_END,
    LOCAL_START,
    FIRST_TOKEN,
    BITS,
    COUNT,
    num_rows,
    num_tiles,
    num_kv_heads,
    word_stride,
    TOPK: tl.constexpr,
    TOPK_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    T: tl.constexpr,
    WORDS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Sort the tile's (block, query) pairs, keep each block once, and collect its queries' bits.

    FIRST_TOKEN: [Hkv, tiles, T * TOPK]. BITS: [WORDS, Hkv, tiles, T * TOPK], 32 queries a word, `word_stride`
    entries apart. COUNT: [Hkv, tiles]. Blocks inside a query's windows are left out: the window loops see
    those keys. WIDE: a position times T does not fit 31 bits.
    """
    tile = tl.program_id(0)
    head = tl.program_id(1)
    entry = tl.arange(0, T * TOPK_PADDED)
    t = entry // TOPK_PADDED
    j = entry % TOPK_PADDED
    i = tile * T + t
    ok = (i < num_rows) & (j < TOPK)
    query = tl.load(ORDER + i, mask=ok, other=0)
    id = tl.load(IDS + (query.to(tl.int64) * num_kv_heads + head) * TOPK + j, mask=ok, other=-1)
    token = tl.load(START + i, mask=ok, other=0) + id * BLOCK
    ok = ok & (id >= 0)
    ok = ok & (token >= tl.load(INIT_END + i, mask=ok, other=0))
    ok = ok & (token < tl.load(LOCAL_START + i, mask=ok, other=0))
    NONE: tl.constexpr = 0x7FFFFFFFFFFFFFFF if WIDE else 0x7FFFFFFF
    if WIDE:
        pair = tl.sort(tl.where(ok, token.to(tl.int64) * T + t, NONE))
    else:
        pair = tl.sort(tl.where(ok, token * T + t, NONE))
    base = (head.to(tl.int64) * num_tiles + tile) * (T * TOPK)
    present = pair != NONE
    block = (pair // T).to(tl.int32)
    # The neighbour's value comes through the list's own memory; the list is written over it afterwards.
    inside = entry < T * TOPK
    tl.store(FIRST_TOKEN + base + entry, block, mask=inside & present)
    tl.debug_barrier()
    before = tl.load(FIRST_TOKEN + base + entry - 1, mask=(entry > 0) & inside & present, other=-1)
    tl.debug_barrier()
    is_new = present & (block != before)
    place = tl.cumsum(is_new.to(tl.int32), 0) - 1
    tl.store(FIRST_TOKEN + base + place, block, mask=is_new)
    for word in tl.static_range(WORDS):
        tl.store(BITS + word * word_stride + base + place, tl.zeros_like(place), mask=is_new)
    tl.debug_barrier()
    query_in_tile = (pair % T).to(tl.int32)
    word_of_query = (query_in_tile // 32) * word_stride
    tl.atomic_or(BITS + word_of_query + base + place, 1 << (query_in_tile % 32), mask=present, sem="relaxed")
    tl.store(COUNT + head * num_tiles + tile, tl.sum(is_new.to(tl.int32), 0))
