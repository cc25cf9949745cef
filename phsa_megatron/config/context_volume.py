"""What a layer's attention sends between context-parallel processes, in bytes, from shapes alone."""

from __future__ import annotations

from dataclasses import dataclass

from phsa_megatron.config.schema import AttentionKind, Dtype, TrainConfig


@dataclass(frozen=True)
class ContextVolume:
    """Bytes that one process sends for one layer and one micro-batch.

    A gather sends a process's part to each of the CP - 1 others, and a reduce-scatter sends each of them its
    part of the gradient: the same number, whichever way the library routes it.

    Attributes:
        boundary_keys_bytes: keys at the start of each chunk, for blocks that straddle two chunks.
        pooled_keys_bytes: one vector a block and key-value head.
        keys_and_values_bytes: all keys and values, once.
        gradient_bytes: their gradients.
    """

    boundary_keys_bytes: int
    pooled_keys_bytes: int
    keys_and_values_bytes: int
    gradient_bytes: int

    @property
    def forward_bytes(self) -> int:
        """Return what one forward pass sends; recomputation sends it again."""
        return self.boundary_keys_bytes + self.pooled_keys_bytes + self.keys_and_values_bytes


def context_volume(config: TrainConfig) -> ContextVolume:
    """Return the volume of one layer and micro-batch of this run; all zero at `parallel.context_size=1`."""
    size, rows = config.parallel.context_size, config.optim.micro_batch_sequences
    element = 2 if config.run.dtype == Dtype.bf16 else 4
    others = size - 1
    own_tokens = config.data.seq_len_tokens // size
    key = config.model.num_kv_heads // config.parallel.tensor_size * config.model.head_dim * element
    both = 2 * rows * own_tokens * key * others
    if config.attention.kind == AttentionKind.dense:
        return ContextVolume(0, 0, both, both)
    m = config.attention.block_tokens
    return ContextVolume(
        boundary_keys_bytes=rows * 2 * (m - 1) * key * others,
        pooled_keys_bytes=rows * (own_tokens // m) * key * others,
        keys_and_values_bytes=both,
        gradient_bytes=both,
    )
