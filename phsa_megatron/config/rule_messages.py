"""How a rule between settings is written, and how a broken one reads: field, value, rule and fix."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from phsa_megatron.config.schema import TrainConfig

Rule = Callable[[TrainConfig], Iterator[str]]


def broken(field: str, value: object, rule: str, fix: str) -> str:
    """Return the message of a broken rule."""
    return f"{field}={value}: {rule}; {fix}"


def multiples_around(number: int, unit: int) -> str:
    """Return the positive multiples of `unit` next to `number`: one if `number` is smaller than `unit`."""
    below = number // unit * unit
    return f"{below} or {below + unit}" if below else str(unit)
