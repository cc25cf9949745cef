"""Which two of the 2 * CP chunks of a sequence a context-parallel process owns."""

from __future__ import annotations

from phsa_megatron.config.schema import ContextSharding


def own_chunks(size: int, rank: int, sharding: ContextSharding = ContextSharding.zigzag) -> tuple[int, int]:
    """Return the two chunks of process `rank` of `size`, in the order in which it holds them."""
    if sharding == ContextSharding.contiguous:
        return 2 * rank, 2 * rank + 1
    return rank, 2 * size - 1 - rank
