"""What context parallelism makes one process read and write besides attention: bytes, counted from the code.

A process attends with its own queries, but keys of all processes pass through its memory: no more processes
make that smaller. Counted are passes over keys, values and their gradients that a single process does not
make (`attention/context_parallel.py`, `gathered_keys.py`, `block_exchange.py`) and what the kernels of dK and
dV move for keys of others. The plan divides by the speed of a copy. Not counted: boundary keys, marks, and
the gradients of slices of dense attention.
"""

from __future__ import annotations

from dataclasses import dataclass

from phsa_megatron.config.activations import element_bytes, head_widths, own_tokens
from phsa_megatron.config.flops import is_dense
from phsa_megatron.config.schema import ContextExchange, ContextSharding, TrainConfig


@dataclass(frozen=True)
class ContextCopies:
    """Bytes read and written on one process for one layer and micro-batch; 0 without context parallelism.

    Attributes:
        forward_bytes: own keys and pooled keys brought into order, and keys and values of all.
        backward_bytes: their gradients on the way back.
        gradient_bytes: of the kernels of dK and dV, for keys of others: all keys are read and all gradients
            written, and both once more, with gradients read too, where one of the own queries chose the
            block.
    """

    forward_bytes: float
    backward_bytes: float
    gradient_bytes: float


def copied_frac(config: TrainConfig) -> float:
    """Return the part of all keys that an all-gather leaves in another order than that of tokens."""
    parallel = config.parallel
    if parallel.context_size == 1:
        return 0.0
    if config.optim.micro_batch_sequences > 1 or parallel.context_node_size is not None:
        return 1.0
    return 0.5 if parallel.context_sharding == ContextSharding.zigzag else 0.0


def context_copies(config: TrainConfig) -> ContextCopies:
    """Return the copies of this run.

    With `context_exchange=block_sparse` and `auto` all keys are taken to be needed, as in
    `context_volume`, and nodes to make no difference.
    """
    size, attention = config.parallel.context_size, config.attention
    if size == 1:
        return ContextCopies(0.0, 0.0, 0.0)
    own = own_tokens(config) * head_widths(config)[1] * element_bytes(config)
    all_keys = size * own
    forward = gradients = 0.0
    if not is_dense(config.data.seq_len_tokens, attention):
        m = attention.block_tokens
        # Own keys are joined with the boundary keys and put in slots; pooled keys are ordered, and the
        # places of no block cleared.
        forward += 4 * own + 4 * all_keys / m
        # Choices there are for each block; no more than one is needed to read and write it.
        chosen = min(1.0, m * attention.train_topk / size)
        gradients = (1 - 1 / size) * 4 * all_keys + max(0.0, chosen - 1 / size) * 6 * all_keys
    if config.parallel.context_exchange != ContextExchange.all_gather:
        sparse, backward = _block_copies(own, all_keys, 4 / element_bytes(config))
        return ContextCopies(forward + sparse, backward, gradients)
    moved = copied_frac(config)
    if moved == 1.0:
        forward += 4 * own  # joined before they are sent
    return ContextCopies(forward + moved * 4 * all_keys, moved * 4 * all_keys, gradients)


def _block_copies(own: float, all_keys: float, wide: float) -> tuple[float, float]:
    """Return the bytes of the block-sparse exchange (forward, backward); `wide`: fp32 over the dtype."""
    # Joined; picked for the receivers; put in slots.
    forward = 4 * own + 4 * all_keys + 4 * all_keys
    # Gradients of slots cleared, picked and joined; what returns is widened and added to sums, then narrowed.
    widened = 2 * (1 + wide) * (wide > 1)
    backward = (10 + widened + 6 * wide) * all_keys + (2 * wide + widened) * own
    return forward, backward
