"""Rotary frequencies of the tokens that a context-parallel process owns, where megatron's own cut differs."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from torch import Tensor

from phsa_megatron.config.schema import ContextSharding
from phsa_megatron.parallel.sequence_sharding import own_positions


class ContiguousRotaryEmbedding(RotaryEmbedding):  # type: ignore[misc]
    """Frequencies of one contiguous piece of the sequence; megatron knows zigzag chunks only."""

    # Megatron keeps its own the same way: the frequencies of a length are those of every layer and step.
    @lru_cache(maxsize=32)  # noqa: B019
    def forward(
        self, max_seq_len: int, offset: int = 0, packed_seq: bool = False, cp_group: Any = None
    ) -> Tensor:
        """Return [max_seq_len / CP, 1, 1, dim]: the angles of this process's positions.

        Args:
            max_seq_len: S, tokens of the whole sequence.
            offset: position of its first token.
            packed_seq: must be false: documents lie inside rows here.
            cp_group: as megatron passes it; None takes the group of the model.
        """
        if packed_seq:
            raise ValueError("packed_seq=True: contiguous sharding cuts rows, not packed sequences")
        group = self.cp_group if cp_group is None else cp_group
        angles: Tensor = self.get_emb(max_seq_len, offset)
        own = own_positions(
            max_seq_len, group.size(), group.rank(), ContextSharding.contiguous, angles.device
        )
        return angles.index_select(0, own)
