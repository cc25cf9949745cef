"""Which tokens of a sequence a context-parallel process owns.

A sequence is cut into 2 * CP chunks of equal length, and process r owns two of them:

- zigzag: chunks r and 2 * CP - 1 - r. Every process has as many causal (query, key) pairs as any other.
  megatron-core slices its rotary frequencies and shifts the targets of multi-token prediction this way.
- contiguous: chunks 2 * r and 2 * r + 1, one piece of the sequence. `model/rotary.py` slices the frequencies.
"""

from __future__ import annotations

import torch
from torch import Tensor

from phsa_megatron.config.schema import ContextSharding
from phsa_megatron.config.sequence_chunks import own_chunks


def own_positions(
    seq_len_tokens: int,
    size: int,
    rank: int,
    sharding: ContextSharding = ContextSharding.zigzag,
    device: torch.device | None = None,
) -> Tensor:
    """Return int64 [S / CP]: the positions in a sequence that process `rank` of `size` owns, ascending.

    Raises:
        ValueError: the sequence does not divide into 2 * `size` chunks.
    """
    if size == 1:
        return torch.arange(seq_len_tokens, device=device)
    if seq_len_tokens % (2 * size):
        raise ValueError(f"{seq_len_tokens} tokens do not divide into 2 x {size} chunks")
    chunk = seq_len_tokens // (2 * size)
    inside = torch.arange(chunk, device=device)
    return torch.cat([number * chunk + inside for number in own_chunks(size, rank, sharding)])


def own_part(
    rows: Tensor, size: int, rank: int, sharding: ContextSharding = ContextSharding.zigzag
) -> Tensor:
    """Return [b, S / CP]: the columns of `rows` [b, S] that process `rank` of `size` owns."""
    if size == 1:
        return rows
    return rows.index_select(1, own_positions(rows.shape[1], size, rank, sharding, rows.device))


def natural_order(size: int, sharding: ContextSharding = ContextSharding.zigzag) -> list[int]:
    """Return the place of chunk 0, 1, ... 2 * CP - 1 among the chunks of all processes, laid end to end."""
    places = [0] * (2 * size)
    for rank in range(size):
        for place, number in enumerate(own_chunks(size, rank, sharding)):
            places[number] = 2 * rank + place
    return places
