"""The best layout for other numbers of GPUs and other context lengths: the points of the plot."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from phsa_megatron.config.derive import world_size
from phsa_megatron.config.errors import ConfigError
from phsa_megatron.config.planning.machine import Machine
from phsa_megatron.config.planning.reasons import layout_text
from phsa_megatron.config.planning.search import make_plan
from phsa_megatron.config.schema import AttentionKind, TrainConfig

CONTEXTS = tuple(32768 * 2**i for i in range(6))
"""32k to 1M tokens."""


@dataclass(frozen=True)
class Point:
    """The best layout of one run.

    Attributes:
        attention: phsa or dense.
        gpus: of the run.
        seq_len_tokens: of a sequence.
        tokens_per_s: over all GPUs; None if no layout fits.
        gpu_hours_per_billion: of a billion tokens.
        layout: in words, or why there is none.
    """

    attention: str
    gpus: int
    seq_len_tokens: int
    tokens_per_s: float | None
    gpu_hours_per_billion: float | None
    layout: str


def gpu_counts(config: TrainConfig, most_gpus: int) -> list[int]:
    """Return whole hosts, doubling from one up to `most_gpus`."""
    counts, gpus = [], config.cluster.processes_per_node
    while gpus <= most_gpus:
        counts.append(gpus)
        gpus *= 2
    return counts


def runs_by_gpus(config: TrainConfig, most_gpus: int) -> list[TrainConfig]:
    """Return the run on other numbers of GPUs, at its context length and batch, PHSA beside dense."""
    return [run for gpus in gpu_counts(config, most_gpus) for run in attentions(_on(config, gpus))]


def runs_by_context(config: TrainConfig) -> list[TrainConfig]:
    """Return the run from 32k to 1M tokens a sequence, on its GPUs with its tokens a step, likewise."""
    return [run for length in CONTEXTS for run in attentions(_at_length(config, length))]


def attentions(config: TrainConfig) -> Iterator[TrainConfig]:
    """Yield the run, and after a PHSA run the dense one that is otherwise alike."""
    yield config
    if config.attention.kind == AttentionKind.phsa:
        yield replace(config, attention=replace(config.attention, kind=AttentionKind.dense))


def best_point(config: TrainConfig, machine: Machine) -> Point:
    """Return the fastest layout that fits, or a point without one."""
    gpus, length = world_size(config), config.data.seq_len_tokens
    kind = config.attention.kind.value
    try:
        plan = make_plan(config, machine)
    except ConfigError as error:
        return Point(kind, gpus, length, None, None, str(error).splitlines()[-1].strip())
    if not plan.fitting:
        least = min(estimate.over_gib for estimate in plan.too_big)
        return Point(kind, gpus, length, None, None, f"no layout fits: the smallest is {least:.1f} GiB over")
    best = plan.fitting[0]
    hours = gpus / 3600 / best.tokens_per_s * 1e9
    return Point(kind, gpus, length, best.tokens_per_s, hours, layout_text(best))


def _on(config: TrainConfig, gpus: int) -> TrainConfig:
    nodes = gpus // config.cluster.processes_per_node
    return replace(config, cluster=replace(config.cluster, num_nodes=nodes))


def _at_length(config: TrainConfig, length: int) -> TrainConfig:
    tokens = config.optim.global_batch_sequences * config.data.seq_len_tokens
    optim = replace(config.optim, global_batch_sequences=max(1, tokens // length), micro_batch_sequences=1)
    return replace(config, optim=optim, data=replace(config.data, seq_len_tokens=length))
