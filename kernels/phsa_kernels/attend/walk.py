"""The walk of a query tile over its keys, shared by forward and dQ.

Three loops over steps of BN keys:

- steps that every row of the tile sees in full, without a mask: init, if it is whole steps, and the inside
  of the local window;
- edges, keys in a row that some rows see: what is left of init, and the end of the local window;
- the list, single blocks: the first blocks of the local window, which only the tile's first rows see, and
  the union of the chosen blocks. One bit per query says who sees a block.

A tile is regular if its queries are consecutive tokens of one document, fewer than the local window holds. In
any other tile all of init and of the local windows are edges.
"""

# Arguments of Triton functions are pointers, blocks and scalars of no Python type.
# ruff: noqa: ANN001, ANN201
# mypy: disallow-untyped-defs=false, disallow-untyped-decorators=false
# mypy: disallow-untyped-calls=false, disallow-incomplete-defs=false

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile_ranges(
    DOC, START, LOCAL_START, POSITION, top, bottom, INIT: tl.constexpr, BLOCK: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    """Return where a tile's loops begin and end.

    (full init steps, full steps, edge init steps, edge steps, first inner key, first key of the last edges,
    end of the keys, first listed local key, number of listed local blocks).
    """
    last = tl.load(POSITION + bottom) + 1
    lowest = tl.load(LOCAL_START + top)
    first_position = tl.load(POSITION + top)
    doc, last_doc = tl.load(DOC + top), tl.load(DOC + bottom)
    first_inner = tl.load(LOCAL_START + bottom)
    regular = (
        (doc == last_doc) & (last - 1 - first_position == bottom - top) & (first_inner <= first_position)
    )
    first_inner = tl.where(regular, first_inner, lowest)
    inner = tl.where(regular, tl.maximum(first_position + 1 - first_inner, 0) // BN, 0)
    end_inner = first_inner + inner * BN
    INIT_STEPS: tl.constexpr = (INIT + BN - 1) // BN
    full_init = 0
    if INIT % BN == 0:
        full_init = tl.where(regular & (lowest - tl.load(START + top) >= INIT), INIT_STEPS, 0)
    edge_init = tl.where(full_init > 0, 0, (last_doc - doc + 1) * INIT_STEPS)
    edges = edge_init + tl.cdiv(last - end_inner, BN)
    return (
        full_init, full_init + inner, edge_init, edges, first_inner, end_inner, last, lowest,
        (first_inner - lowest) // BLOCK,
    )  # fmt: skip


@triton.jit
def full_step(step, full_init, start, first_inner, BN: tl.constexpr):
    """Return the first key of a step that all rows see."""
    return tl.where(step < full_init, start + step * BN, first_inner + (step - full_init) * BN)


@triton.jit
def edge_step(
    step, edge_init, CU_SEQLENS, doc, last_doc, end_inner, last, start, init_end, local_start, position,
    INIT: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Return (first key, end of the keys to read, lowest and end of each row's own keys) of a step."""
    first = end_inner + (step - edge_init) * BN
    end = last
    low, high = local_start, position + 1
    if INIT > 0:
        INIT_STEPS: tl.constexpr = (INIT + BN - 1) // BN
        is_init = step < edge_init
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
def queries_of_first_listed(POSITION, top, start, last, local_blocks, BLOCK: tl.constexpr):
    """Return how many of a regular tile's queries see the first of its listed local blocks.

    A query that is n blocks before the tile's last sees n blocks before that query's window.
    """
    block = (last - 1 - start) // BLOCK - local_blocks
    return (block + 1) * BLOCK - (tl.load(POSITION + top) - start)


@triton.jit
def first_bits(count):
    """Return words whose lowest `count` bits are set, for every count."""
    some = tl.minimum(tl.maximum(count, 0), 31)
    return tl.where(count >= 32, -1, (1 << some) - 1)


@triton.jit
def list_step(
    first, local_blocks, count, lowest, seen_by_first, base, word_stride, FIRST_TOKEN, BITS, low_bit,
    high_bit, BLOCK: tl.constexpr, WORDS: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Return (keys [BN], which may be read, which row sees which [rows, BN]) of blocks from `first` on.

    The list begins with `local_blocks` blocks of the local window; the tile's first `seen_by_first` queries
    see the first of them, and BLOCK queries more each next one. `count` chosen blocks follow.
    """
    n = tl.arange(0, BN)
    place = first + n // BLOCK
    entry = place - local_blocks
    is_local = entry < 0
    ok = entry < count
    is_chosen = ok & (entry >= 0)
    token = tl.load(FIRST_TOKEN + base + entry, mask=is_chosen, other=0)
    key = tl.where(is_local, lowest + place * BLOCK, token) + n % BLOCK
    seen_by = seen_by_first + place * BLOCK
    bits = tl.load(BITS + base + entry, mask=is_chosen, other=0)
    sees = tl.where(is_local, first_bits(seen_by), bits)[None, :] & low_bit[:, None]
    if WORDS == 2:
        bits = tl.load(BITS + word_stride + base + entry, mask=is_chosen, other=0)
        bits = tl.where(is_local, first_bits(seen_by - 32), bits)
        sees = sees | (bits[None, :] & high_bit[:, None])
    return key, ok, sees != 0
