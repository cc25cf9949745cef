"""`phsa-train explain KEY`: what a setting is, what it is now, who set it, and what follows from it."""

from __future__ import annotations

from enum import Enum
from typing import Any

from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table
from rich.text import Text

from phsa_megatron.config import keys
from phsa_megatron.config.compose import Tree, compose_tree
from phsa_megatron.config.dependents import dependents
from phsa_megatron.config.errors import ConfigError
from phsa_megatron.config.ranges import RANGES
from phsa_megatron.config.resolved import to_config
from phsa_megatron.config.resume_rules import RULES
from phsa_megatron.config.validate import validate


def explain(key: str, composed: Tree, console: Console) -> None:
    """Print a setting, or all settings of a group.

    Args:
        key: dotted key of a setting or a group.
        composed: settings, complete or not.
        console: where to print.

    Raises:
        ConfigError: the schema has no such key.
    """
    if keys.find_group(key) is not None or (keys.find(key) is not None and _has_children(key, composed)):
        console.print(_group_table(key, composed))
        return
    field = keys.find(key)
    if field is None:
        raise ConfigError(f"unknown key '{key}'.{keys.suggest_key(key)} Groups: {', '.join(keys.groups())}")
    console.print(_setting_table(key, field, composed))


def explain_overview(composed: Tree, console: Console) -> None:
    """Print all groups with what they hold."""
    table = Table("group", "what it holds", "chosen file", title="phsa-train explain GROUP or KEY")
    for group, meaning in keys.groups().items():
        table.add_row(group, meaning.splitlines()[0], composed.choices.get(group) or "")
    console.print(table)


def derived_from(key: str, composed: Tree) -> dict[str, Any] | str:
    """Return derived values that depend on a setting, or in words why that cannot be said here."""
    if composed.missing():
        return "choose a recipe to see (recipe=NAME)"
    config = to_config(composed.tree)
    try:
        validate(config)
    except ConfigError as error:
        return f"the settings break a rule: {error}"
    return dependents(config, key)


def _setting_table(key: str, field: keys.Field, composed: Tree) -> Table:
    table = Table(show_header=False, title=key, title_justify="left")
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")

    def row(name: str, value: str) -> None:
        table.add_row(name, Text(value))

    row("value", _shown(composed, key))
    row("unit", field.unit)
    row("meaning", field.meaning)
    row("set by", _origin(composed, key))
    row("type", field.expected)
    allowed = RANGES.get(field.key)
    if allowed is not None:
        row("range", str(allowed))
    row("default", "none: it must be set" if field.required else _text(field.default))
    rule = RULES[field.key]
    row("on resume", ("may change: " if rule.allowed else "may not change: ") + rule.consequence)
    if key in composed.provenance:
        follows = derived_from(key, composed)
        if isinstance(follows, dict):
            follows = "\n".join(f"{name} = {_text(value)}" for name, value in follows.items())
        row("derived from it", follows or "nothing")
    return table


def _group_table(group: str, composed: Tree) -> Table:
    pattern, field = keys.find_group(group), keys.find(group)
    meaning = keys.groups()[pattern].splitlines()[0] if pattern else (field.meaning if field else "")
    table = Table(title=f"{group}: {meaning}", title_justify="left")
    table.add_column("key", no_wrap=True)
    for name in ("value", "unit", "set by", "meaning"):
        table.add_column(name, overflow="fold")
    shown = [key for key in composed.provenance if key.startswith(group + ".")]
    for key in shown or [k for k in keys.fields() if k.startswith((pattern or group) + ".")]:
        field = keys.find(key)
        if field is not None:
            name = key.removeprefix(group + ".")
            cells = (name, _shown(composed, key), field.unit, _origin(composed, key), field.meaning)
            table.add_row(*(Text(cell) for cell in cells))
    return table


def _has_children(key: str, composed: Tree) -> bool:
    return any(known.startswith(key + ".") for known in composed.provenance)


def _shown(composed: Tree, key: str) -> str:
    if key in composed.missing():
        return "not set"
    return _text(OmegaConf.select(composed.tree, key))


def _origin(composed: Tree, key: str) -> str:
    if key in composed.missing():
        return "nobody yet"
    return str(composed.provenance.get(key, ""))


def _text(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, int):
        return f"{value:,}"
    return str(value)


def main(overrides: list[str], key: str | None, recipes_dir: Any, console: Console) -> None:
    """Compose and print; see `explain`."""
    composed = compose_tree(overrides, recipes_dir)
    if key is None:
        explain_overview(composed, console)
    else:
        explain(key, composed, console)
