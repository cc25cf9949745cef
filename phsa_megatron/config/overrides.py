"""Reads KEY=VALUE arguments: group choices and settings, each checked against the schema."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException

from phsa_megatron.config import check_keys, keys
from phsa_megatron.config.errors import ConfigError

GROUPS = ("recipe", "model", "attention", "data", "parallel", "optim", "cluster", "monitoring")
"""The recipe groups: `GROUP=NAME` chooses `recipes/GROUP/NAME.yaml`."""


@dataclass
class Overrides:
    """A command line, taken apart.

    Attributes:
        choices: chosen file of a group, None for `GROUP=null`.
        settings: (key, value, the argument as typed) in the order given.
    """

    choices: dict[str, str | None] = field(default_factory=dict)
    settings: list[tuple[str, Any, str]] = field(default_factory=list)


def parse_overrides(arguments: list[str], options: dict[str, list[str]]) -> Overrides:
    """Take KEY=VALUE arguments apart.

    Args:
        arguments: as typed, one setting each.
        options: the files of each group.

    Raises:
        ConfigError: naming every argument that cannot be used and what to write instead.
    """
    parser = OverridesParser.create()
    parsed, problems = Overrides(), []
    seen: set[str] = set()
    for text in arguments:
        try:
            override = parser.parse_override(text)
        except HydraException as error:
            problems.append(_unreadable(text, error))
            continue
        key = override.key_or_group
        problem = _refusal(override, text) or (f"{key} is given twice; keep one" if key in seen else None)
        seen.add(key)
        if problem is None:
            value = override.value()
            if key in GROUPS:
                problem = choice_problem(key, value, options)
                parsed.choices[key] = value if value is None else str(value)
            else:
                problem = _setting_problem(key, value)
                parsed.settings.append((key, value, text))
        if problem is not None:
            problems.append(problem)
    if problems:
        raise ConfigError("\n".join(problems))
    return parsed


def choice_problem(group: str, value: Any, options: dict[str, list[str]]) -> str | None:
    """Return a message if a group has no such file, else None."""
    if value is None or value in options[group]:
        return None
    if isinstance(value, dict | list):
        setting = "" if group == "recipe" else f"; set single values with {group}.KEY=VALUE"
        return f"{group}={value}: give the name of a file in recipes/{group}{setting}"
    return (
        f"unknown {group} '{value}'.{keys.did_you_mean(str(value), options[group])} "
        f"There are: {', '.join(options[group])}"
    )


def _setting_problem(key: str, value: Any) -> str | None:
    if value == "???":
        return f"{key}=??? sets nothing; give a value"
    if key == "hydra" or key.startswith("hydra."):
        return f"unknown key '{key}': Hydra's own settings are fixed here. Add recipes with --recipes-dir DIR"
    if keys.find(key) is None and keys.find_group(key) is None:
        near_group = keys.nearest(key, [*GROUPS, *keys.groups()], count=1)
        if "." not in key and near_group and near_group[0] in GROUPS:
            return f"unknown key '{key}'. Did you mean {near_group[0]}=NAME?"
        return check_keys.unknown_key(key)
    nested: Any = value
    for name in reversed(key.split(".")):
        nested = {name: nested}
    found = check_keys.problems(nested)
    return found[0][1] if found else None


def _refusal(override: Override, text: str) -> str | None:
    """Return why this form of argument is not taken, or None."""
    key = override.key_or_group
    if override.type in (OverrideType.ADD, OverrideType.FORCE_ADD):
        return (
            f"{text}: write it without '+'. Every setting is in the schema, so there is nothing to add; "
            "a key that the schema lacks is refused."
        )
    if override.type == OverrideType.DEL:
        hint = "set its weight to 0" if key.startswith("data.sources.") else "set it to another value"
        return f"{text}: settings cannot be removed; {hint}"
    if override.package is not None:
        return f"{text}: '@' is not used here; write {key}=VALUE"
    if override.is_sweep_override():
        return (
            f"{text}: this stands for several values, and a run has one. Quote a text with commas "
            f"({key}='...'), put a list in brackets ({key}=[a,b]), or start one run for each value."
        )
    return None


def _unreadable(text: str, error: Exception) -> str:
    if "=" not in text:
        return f"'{text}' is not KEY=VALUE.{keys.did_you_mean(text, list(keys.fields()))}"
    key = text.split("=", 1)[0]
    reason = str(error).splitlines()[0]
    return f"{text}: cannot be read ({reason}). Put quotes around special characters: {key}='...'"
