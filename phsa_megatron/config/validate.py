"""Every rule between settings, one small function each, and one message for all that are broken.

A rule yields messages made by `broken`: field, value, rule and fix. Rules of the layout are in
`parallel_rules.py`, of the attention in `attention_rules.py`, of `compute` in `compute_rules.py`, of the
cluster in `validate_cluster.py`, ranges of single numbers in `ranges.py`; types and names are checked
earlier, by the schema.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from phsa_megatron.config import keys
from phsa_megatron.config.attention_rules import ATTENTION_RULES
from phsa_megatron.config.compute_rules import COMPUTE_RULES
from phsa_megatron.config.errors import ConfigError
from phsa_megatron.config.parallel_rules import PARALLEL_RULES
from phsa_megatron.config.ranges import RANGES
from phsa_megatron.config.rule_messages import Rule, broken, multiples_around
from phsa_megatron.config.schema import Device, KernelImpl, LrSchedule, TrainConfig
from phsa_megatron.config.skip_list import skipped_ranges
from phsa_megatron.config.validate_cluster import CLUSTER_RULES
from phsa_megatron.config.validate_health import gpu_scores, local_copy, watchdog_timeouts
from phsa_megatron.config.yaml_file import leaves


def validate(config: TrainConfig, *, trains: bool = True) -> None:
    """Check all rules.

    Args:
        config: the settings.
        trains: whether somebody trains with them; else there may be no text to train on.

    Raises:
        ConfigError: with one line for each broken rule.
    """
    broken = list(_ranges(config))
    # Rules divide and compare: they run only on numbers that make sense by themselves.
    if not broken:
        broken = [message for rule in RULES if trains or rule != _sources for message in rule(config)]
    if broken:
        raise ConfigError("\n".join(broken))


def _ranges(config: TrainConfig) -> Iterator[str]:
    values: dict[str, Any] = dict(leaves(asdict(config)))
    for key, value in values.items():
        field = keys.find(key)
        allowed = RANGES.get(field.key) if field else None
        if allowed is not None and value is not None and not allowed.holds(value):
            yield broken(key, value, f"it must be {allowed}", f"set {key} accordingly")


def _run_name(config: TrainConfig) -> Iterator[str]:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", config.run.name):
        yield broken(
            "run.name",
            repr(config.run.name),
            "it names a folder: letters, digits, '.', '_' and '-', not starting with a sign",
            "choose another name",
        )


def _skip_list(config: TrainConfig) -> Iterator[str]:
    try:
        skipped_ranges(config.data.skip_sequences)
    except ConfigError as error:
        yield str(error)


def _heads_divide(config: TrainConfig) -> Iterator[str]:
    query, kv = config.model.num_query_heads, config.model.num_kv_heads
    if query % kv:
        yield broken(
            "model.num_query_heads",
            query,
            f"query heads divide evenly among model.num_kv_heads={kv}",
            f"use {multiples_around(query, kv)} query heads",
        )


def _head_dim_even(config: TrainConfig) -> Iterator[str]:
    if config.model.head_dim % 2:
        yield broken(
            "model.head_dim",
            config.model.head_dim,
            "RoPE turns pairs of channels",
            "use an even number",
        )


def _max_documents(config: TrainConfig) -> Iterator[str]:
    most, length = config.data.max_documents_per_sequence, config.data.seq_len_tokens
    if most is not None and most > length:
        yield broken(
            "data.max_documents_per_sequence",
            most,
            f"a sequence of data.seq_len_tokens={length} holds at most that many documents",
            f"use at most {length}, or null",
        )


def _sources(config: TrainConfig) -> Iterator[str]:
    weights = [source.weight for source in config.data.sources.values()]
    if not any(weight > 0 for weight in weights):
        yield broken(
            "data.sources",
            f"{len(weights)} sources",
            "at least one source has a positive weight",
            "choose a mixture (data=NAME) or set data.sources.NAME.weight",
        )


def _validation_text(config: TrainConfig) -> Iterator[str]:
    every = config.evaluate.every_steps
    if every > 0 and not any(source.valid_prefix for source in config.data.sources.values()):
        yield broken(
            "evaluate.every_steps",
            every,
            "evaluation needs a source with validation text, and none has a valid_prefix",
            "set data.sources.NAME.valid_prefix, or evaluate.every_steps=0",
        )


def _device_and_impl(config: TrainConfig) -> Iterator[str]:
    impl, device = config.attention.impl, config.cluster.device
    if impl == KernelImpl.triton and device == Device.cpu:
        yield broken(
            "attention.impl",
            impl,
            "Triton kernels need a GPU, and cluster.device is cpu",
            "set attention.impl=reference or cluster.device=cuda",
        )


def _schedule_lengths(config: TrainConfig) -> Iterator[str]:
    optim, steps = config.optim, config.run.train_steps
    # A warm-up that fills the run by itself is the next rule's.
    if optim.warmup_steps < steps < optim.warmup_steps + optim.decay_steps:
        yield broken(
            "optim.warmup_steps",
            optim.warmup_steps,
            f"warm-up and optim.decay_steps={optim.decay_steps} fit into run.train_steps={steps}",
            "shorten one of them, or train for more steps",
        )


def _warmup(config: TrainConfig) -> Iterator[str]:
    warmup, steps = config.optim.warmup_steps, config.run.train_steps
    if warmup >= steps:
        # megatron's schedule refuses it too, but by an assertion, after processes have started.
        yield broken(
            "optim.warmup_steps",
            warmup,
            f"the warm-up ends before the last of run.train_steps={steps} steps",
            f"use at most {steps - 1}, or train for more steps",
        )


def _cosine(config: TrainConfig) -> Iterator[str]:
    optim = config.optim
    if optim.schedule == LrSchedule.cosine and optim.decay_steps:
        yield broken(
            "optim.decay_steps",
            optim.decay_steps,
            "optim.schedule=cosine decays over all steps after the warm-up",
            "set optim.decay_steps=0, or optim.schedule=wsd",
        )


def _learning_rates(config: TrainConfig) -> Iterator[str]:
    optim = config.optim
    if optim.min_lr > optim.lr:
        yield broken(
            "optim.min_lr", optim.min_lr, f"it is at most optim.lr={optim.lr}", "lower it, or raise optim.lr"
        )


RULES: tuple[Rule, ...] = (
    _run_name,
    _skip_list,
    *ATTENTION_RULES,
    _heads_divide,
    _head_dim_even,
    _max_documents,
    _sources,
    _validation_text,
    *PARALLEL_RULES,
    *COMPUTE_RULES,
    _device_and_impl,
    _schedule_lengths,
    _warmup,
    _cosine,
    _learning_rates,
    watchdog_timeouts,
    gpu_scores,
    local_copy,
    *CLUSTER_RULES,
)
"""All rules, in the order of their messages."""
