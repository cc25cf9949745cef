"""The time of a layer's attention on one context-parallel process: its share of the rows, and its copies.

The rows are of one process, so that a share of them lacks what `config/context_copies.py` counts. Nothing
here is fitted to times of context-parallel processes; `docs/layouts.md` has both side by side.
"""

from __future__ import annotations

from dataclasses import replace

from phsa_megatron.config.context_copies import ContextCopies, context_copies
from phsa_megatron.config.planning.attention_time import AttentionTime, attention_time
from phsa_megatron.config.planning.machine import Machine
from phsa_megatron.config.schema import ContextSharding, TrainConfig


def process_attention(
    config: TrainConfig,
    machine: Machine,
    copies: ContextCopies | None = None,
    document_tokens: float | None = None,
) -> AttentionTime:
    """Return the time of one layer's attention for one micro-batch on the process that takes longest.

    Args:
        config: the run.
        machine: whose speed of a copy is read.
        copies: what the run's code moves; None is this version's code.
        document_tokens: see `attention_time`; None takes every sequence to be one document.

    Raises:
        ConfigError: the run's attention has no measured rows at all.
    """
    share = attention_time(config, document_tokens, machine.packed_slowdown.value)
    if config.parallel.context_size == 1:
        return share
    moved = context_copies(config) if copies is None else copies
    waiting = (_scoring_balance(config) - 1) * share.select_ms
    forward = share.forward_ms + waiting + 1e3 * machine.copy_s(moved.forward_bytes)
    backward = share.backward_ms + 1e3 * machine.copy_s(moved.backward_bytes + moved.gradient_bytes)
    return replace(share, forward_ms=forward, backward_ms=backward, select_ms=share.select_ms + waiting)


def _scoring_balance(config: TrainConfig) -> float:
    """Return what the busiest process scores over the mean: a query scores the blocks before it."""
    parallel = config.parallel
    return 1.0 if parallel.context_sharding == ContextSharding.zigzag else 2.0 - 1.0 / parallel.context_size
