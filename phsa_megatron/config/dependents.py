"""Finds what was derived from a setting by changing the setting and deriving again."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import asdict
from enum import Enum
from typing import Any

from phsa_megatron.config import keys
from phsa_megatron.config.derive import derive
from phsa_megatron.config.errors import ConfigError
from phsa_megatron.config.schema import TrainConfig
from phsa_megatron.config.yaml_file import leaves


def dependents(config: TrainConfig, key: str) -> dict[str, Any]:
    """Return the derived values that change when a setting changes, with their present values.

    Nothing is declared by hand, so the answer cannot go stale: it holds for this very configuration. A value
    that no tried change moves (`attention.train_topk` under dense attention) is not in the answer.
    """
    now = _values(config)
    touched: set[str] = set()
    for base in (config, _with_many_processes(config)):
        before = _values(base)
        for changed in _variants(base, key):
            try:
                after = _values(changed)
            except ArithmeticError:
                continue  # this variant makes no sense; the others speak
            touched |= {name for name in before if before[name] != after.get(name)}
    return {name: value for name, value in now.items() if name in touched}


def _with_many_processes(config: TrainConfig) -> TrainConfig:
    """Return a larger run of the same model: with one process, parallel sizes could not change at all."""
    larger = copy.deepcopy(config)
    larger.cluster.processes_per_node *= 64
    larger.optim.global_batch_sequences *= 64
    return larger


def _values(config: TrainConfig) -> dict[str, Any]:
    values = asdict(derive(config))
    del values["lines"]
    return dict(leaves(values))


def _variants(config: TrainConfig, key: str) -> Iterator[TrainConfig]:
    """Yield configurations that differ in one setting."""
    field = keys.find(key)
    if field is None:
        raise ConfigError(f"unknown key '{key}'.{keys.suggest_key(key)}")
    *path, name = key.split(".")
    for value in _other_values(_get(config, key), field):
        changed = copy.deepcopy(config)
        target: Any = changed
        for part in path:
            target = target[part] if isinstance(target, dict) else getattr(target, part)
        setattr(target, name, value)
        yield changed


def _get(config: TrainConfig, key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = value[part] if isinstance(value, dict) else getattr(value, part)
    return value


def _other_values(value: Any, field: keys.Field) -> list[Any]:
    plain = field.plain_type
    if isinstance(plain, type) and issubclass(plain, Enum):
        return [member for member in plain if member != value]
    if plain is bool:
        return [not value]
    if plain in (int, float):
        start = 1 if value is None else value
        tried = [start * 2, start + 1, start * 64, start // 2 if plain is int else start / 2, start - 1]
        return [number for number in tried if number != value and number >= 0]
    return []
