"""Which queries chose each block, for dK and dV: the unions turned round by a counting sort.

No sort and no order left to chance: rows are cut into chunks of tiles, one program counts the choices of each
block through its chunk tile by tile, and a running sum over chunks and blocks gives every (tile, block) pair
its place. A block's queries therefore stand in row order, and sums over them are the same in every run.

Blocks are counted in slots: block starts of a document are a block apart and only complete blocks are ever
chosen, so `first token // block` is a slot of its own for every block of every document.
"""

# Arguments of Triton functions are pointers, blocks and scalars of no Python type.
# ruff: noqa: ANN001, ANN201
# mypy: disallow-untyped-decorators=false, disallow-untyped-calls=false

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from phsa_kernels.primitives import count_bits

# Counters take [chunks, Hkv, slots] int32: 4 * 64 / block bytes a token and head, at any number of tiles.
_MAX_CHUNKS = 64
_SLOTS_A_PROGRAM = 32


class BlockQueries(NamedTuple):
    """Slot s of head h owns `queries[ends[h, s] - counts[h, s] : ends[h, s]]`; keys begin at starts[s]."""

    queries: Tensor
    counts: Tensor
    ends: Tensor
    starts: Tensor


@triton.jit
def count_kernel(  # type: ignore[no-untyped-def]
    FIRST_TOKEN,
    BITS,
    COUNT,
    RANK,
    COUNTERS,
    STARTS,
    num_tiles,
    num_kv_heads,
    num_slots,
    tiles_in_chunk,
    word_stride,
    ENTRIES: tl.constexpr,
    WORDS: tl.constexpr,
    BLOCK: tl.constexpr,
    E: tl.constexpr,
):
    """RANK of a (tile, block) pair: how often the chunk's earlier tiles chose it; COUNTERS: totals."""
    chunk = tl.program_id(0)
    head = tl.program_id(1)
    counters = COUNTERS + (chunk.to(tl.int64) * num_kv_heads + head) * num_slots
    end = tl.minimum(chunk * tiles_in_chunk + tiles_in_chunk, num_tiles)
    for tile in range(chunk * tiles_in_chunk, end):
        base = (head.to(tl.int64) * num_tiles + tile) * ENTRIES
        count = tl.load(COUNT + head * num_tiles + tile)
        for first in range(0, count, E):
            entry = first + tl.arange(0, E)
            ok = entry < count
            token = tl.load(FIRST_TOKEN + base + entry, mask=ok, other=0)
            choices = tl.zeros([E], tl.int32)
            for word in tl.static_range(WORDS):
                bits = tl.load(BITS + word * word_stride + base + entry, mask=ok, other=0)
                choices += count_bits(bits)
            # A tile names a block once, so no two lanes touch one counter; the next tile may, hence barriers.
            counter = counters + token // BLOCK
            before = tl.load(counter, mask=ok, other=0)
            tl.store(RANK + base + entry, before, mask=ok)
            tl.store(counter, before + choices, mask=ok)
            tl.store(STARTS + token // BLOCK, token, mask=ok)  # every writer writes the same
            tl.debug_barrier()


@triton.jit
def chunk_sums_kernel(  # type: ignore[no-untyped-def]
    COUNTERS, COUNTS, num_chunks, num_counters, C: tl.constexpr, S: tl.constexpr
):
    """Replace every counter by the sum over the chunks before its own; COUNTS [Hkv * slots]: over all."""
    slot = tl.program_id(0) * S + tl.arange(0, S)
    chunk = tl.arange(0, C)
    ok = (chunk < num_chunks)[:, None] & (slot < num_counters)[None, :]
    counter = COUNTERS + chunk.to(tl.int64)[:, None] * num_counters + slot[None, :]
    own = tl.load(counter, mask=ok, other=0)
    tl.store(counter, tl.cumsum(own, 0) - own, mask=ok)
    tl.store(COUNTS + slot, tl.sum(own, 0), mask=slot < num_counters)


@triton.jit
def place_kernel(  # type: ignore[no-untyped-def]
    ORDER,
    FIRST_TOKEN,
    BITS,
    COUNT,
    RANK,
    COUNTERS,
    COUNTS,
    ENDS,
    QUERIES,
    num_rows,
    num_tiles,
    num_kv_heads,
    num_slots,
    tiles_in_chunk,
    word_stride,
    ENTRIES: tl.constexpr,
    WORDS: tl.constexpr,
    BLOCK: tl.constexpr,
    T: tl.constexpr,
    E: tl.constexpr,
):
    """Write each tile's queries to their places in QUERIES, in the order of the tile's rows."""
    tile = tl.program_id(0)
    head = tl.program_id(1)
    base = (head.to(tl.int64) * num_tiles + tile) * ENTRIES
    counters = COUNTERS + ((tile // tiles_in_chunk).to(tl.int64) * num_kv_heads + head) * num_slots
    count = tl.load(COUNT + head * num_tiles + tile)
    lane = tl.arange(0, T // WORDS)
    for first in range(0, count, E):
        entry = first + tl.arange(0, E)
        ok = entry < count
        slot = tl.load(FIRST_TOKEN + base + entry, mask=ok, other=0) // BLOCK
        place = tl.load(ENDS + head * num_slots + slot, mask=ok, other=0)
        place -= tl.load(COUNTS + head * num_slots + slot, mask=ok, other=0)
        place += tl.load(counters + slot, mask=ok, other=0)
        place += tl.load(RANK + base + entry, mask=ok, other=0)
        for word in tl.static_range(WORDS):
            bits = tl.load(BITS + word * word_stride + base + entry, mask=ok, other=0)
            i = tile * T + word * 32 + lane
            query = tl.load(ORDER + i, mask=i < num_rows, other=0)
            earlier = count_bits(bits[:, None] & ((1 << lane) - 1)[None, :])
            chose = ((bits[:, None] >> lane[None, :]) & 1) != 0
            tl.store(QUERIES + place[:, None] + earlier, query[None, :], mask=chose)
            place += count_bits(bits)


def queries_by_block(
    lists: tuple[Tensor, Tensor, Tensor],
    order: Tensor,
    num_kv_heads: int,
    num_keys: int,
    *,
    topk: int,
    block_tokens: int,
    queries_in_tile: int,
) -> BlockQueries:
    """Turn the unions `lists` (first tokens, bits, counts) round."""
    first_token, bits, _ = lists
    num_slots = triton.cdiv(num_keys, block_tokens)
    num_tiles = triton.cdiv(len(order), queries_in_tile)
    tiles_in_chunk = triton.cdiv(num_tiles, _MAX_CHUNKS)
    num_chunks = triton.cdiv(num_tiles, tiles_in_chunk)
    counters = order.new_zeros(num_chunks, num_kv_heads, num_slots)
    starts, counts = order.new_empty(num_slots), order.new_empty(num_kv_heads, num_slots)
    rank, queries = torch.empty_like(first_token), order.new_empty(len(order) * num_kv_heads * topk)
    sizes = (num_tiles, num_kv_heads, num_slots, tiles_in_chunk, len(first_token))
    entries = queries_in_tile * topk
    shape = {"ENTRIES": entries, "WORDS": len(bits) // len(first_token), "BLOCK": block_tokens}
    count_kernel[(num_chunks, num_kv_heads)](
        *lists, rank, counters, starts, *sizes, **shape, E=min(256, triton.next_power_of_2(entries))
    )
    chunk_sums_kernel[(triton.cdiv(counts.numel(), _SLOTS_A_PROGRAM),)](
        counters, counts, num_chunks, counts.numel(), C=_MAX_CHUNKS, S=_SLOTS_A_PROGRAM
    )
    ends = counts.flatten().cumsum(0)
    place_kernel[(num_tiles, num_kv_heads)](
        order, *lists, rank, counters, counts, ends, queries, len(order), *sizes, **shape,
        T=queries_in_tile, E=min(32, triton.next_power_of_2(entries)),
    )  # fmt: skip
    return BlockQueries(queries, counts, ends, starts)
