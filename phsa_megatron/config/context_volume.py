"""What a layer sends between context-parallel processes, in bytes: formulas that counts are held to."""

from __future__ import annotations

from dataclasses import dataclass

from phsa_megatron.config.documents import documents_limit
from phsa_megatron.config.schema import AttentionKind, ContextExchange, Dtype, TrainConfig


@dataclass(frozen=True)
class ExchangedTokens:
    """Tokens of needed blocks that one process sent in one layer and micro-batch: what no setting tells.

    Attributes:
        sent: to others, over both levels if nodes make a difference.
        received: from others.
    """

    sent: int
    received: int


@dataclass(frozen=True)
class ContextVolume:
    """Bytes that one process sends for one layer and one micro-batch.

    A gather sends a process's part to each of the others, and a reduce-scatter sends each of them its part of
    the gradient: the same number, whichever way the library routes it.

    Attributes:
        boundary_keys_bytes: keys at the start of each chunk, for blocks that straddle two chunks.
        pooled_keys_bytes: one vector a block and key-value head.
        block_marks_bytes: which blocks this process needs, one byte a block; 0 if all keys are gathered.
        keys_and_values_bytes: all keys and values once, or those of the blocks that others need.
        gradient_bytes: gradients of keys and values, back to their owners.
    """

    boundary_keys_bytes: int
    pooled_keys_bytes: int
    block_marks_bytes: int
    keys_and_values_bytes: int
    gradient_bytes: int

    @property
    def forward_bytes(self) -> int:
        """Return what one forward pass sends; recomputation sends it again."""
        return (
            self.boundary_keys_bytes
            + self.pooled_keys_bytes
            + self.block_marks_bytes
            + self.keys_and_values_bytes
        )


def context_volume(config: TrainConfig, exchanged: ExchangedTokens | None = None) -> ContextVolume:
    """Return the volume of one layer and micro-batch of this run; all zero at `parallel.context_size=1`.

    Args:
        config: the recipe.
        exchanged: what the blocks needed by other processes came to; None counts all keys: those of a gather,
            or the most that needed blocks can come to.
    """
    return _volume(config, config.parallel.context_size - 1, exchanged)


def volume_across_nodes(config: TrainConfig, exchanged: ExchangedTokens | None = None) -> ContextVolume:
    """Return the part of `context_volume` that goes to other nodes, with `parallel.context_node_size` set.

    Each key crosses to each other node once. Without the hierarchy a process sends to `context_size -
    context_node_size` processes of other nodes instead of to `context_size / context_node_size - 1` nodes.

    Args:
        config: the recipe.
        exchanged: tokens sent to and received from other nodes; None counts all keys.
    """
    node_size = config.parallel.context_node_size
    if node_size is None:
        raise ValueError("parallel.context_node_size is null: nodes make no difference to what is sent")
    return _volume(config, config.parallel.context_size // node_size - 1, exchanged)


def _volume(config: TrainConfig, others: int, exchanged: ExchangedTokens | None) -> ContextVolume:
    size, rows = config.parallel.context_size, config.optim.micro_batch_sequences
    exchange = config.parallel.context_exchange
    element = 2 if config.run.dtype == Dtype.bf16 else 4
    own_tokens = config.data.seq_len_tokens // size
    key = config.model.num_kv_heads // config.parallel.tensor_size * config.model.head_dim * element
    everything = rows * own_tokens * others
    sent, received = (exchanged.sent, exchanged.received) if exchanged else (everything, everything)
    if config.attention.kind == AttentionKind.dense:
        return ContextVolume(0, 0, 0, 2 * sent * key, 2 * received * key)
    m = config.attention.block_tokens
    num_blocks = rows * (config.data.seq_len_tokens // m + documents_limit(config.data))
    return ContextVolume(
        boundary_keys_bytes=rows * 2 * (m - 1) * key * others,
        pooled_keys_bytes=rows * (own_tokens // m) * key * others,
        block_marks_bytes=0 if exchange == ContextExchange.all_gather else num_blocks * others,
        keys_and_values_bytes=2 * sent * key,
        gradient_bytes=2 * received * key,
    )
