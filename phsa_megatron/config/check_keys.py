"""Checks names and types of settings against the schema, with messages for the person who wrote them."""

from __future__ import annotations

from dataclasses import field, make_dataclass
from functools import cache
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from phsa_megatron.config import keys
from phsa_megatron.config.yaml_file import leaves


def unknown_key(key: str) -> str | None:
    """Return a message if the schema has no such setting or group, else None."""
    if keys.find(key) is not None or keys.find_group(key) is not None:
        return None
    return f"unknown key '{key}'.{keys.suggest_key(key)} List a group's keys with: phsa-train explain GROUP"


def wrong_type(key: str, value: Any) -> str | None:
    """Return a message if the schema does not take this value for a known key, else None.

    Interpolations (`${...}`) are left for composition, which knows what they stand for.
    """
    if isinstance(value, str) and "${" in value:
        return None
    setting = keys.find(key)
    if setting is None:
        return None if isinstance(value, dict) else _group_needs_keys(key, value)
    try:
        OmegaConf.merge(_one_field(setting.key), {"value": value})
    except (OmegaConfBaseException, ValueError, TypeError):
        choices = keys.did_you_mean(str(value), setting.choices)
        return f"{key}={value!r}: expected {setting.expected}, got {_describe(value)}.{choices}"
    return None


def problems(values: dict[str, Any]) -> list[tuple[str, str]]:
    """Return (key, message) of every unknown key and wrong type in nested settings."""
    found = []
    reported: set[str] = set()
    for key, value in leaves(values):
        unknown = _first_unknown_prefix(key)
        message = unknown_key(unknown) if unknown else wrong_type(key, value)
        if message is not None and (unknown or key) not in reported:
            reported.add(unknown or key)
            found.append((unknown or key, message))
    return found


def _first_unknown_prefix(key: str) -> str | None:
    parts = key.split(".")
    for count in range(1, len(parts) + 1):
        prefix = ".".join(parts[:count])
        setting = keys.find(prefix)
        if setting is not None and count < len(parts) and keys.find_group(prefix + ".x") is None:
            return ".".join(parts[: count + 1])  # a plain setting that was given keys of its own
        if setting is None and keys.find_group(prefix) is None:
            return prefix
    return None


def _group_needs_keys(key: str, value: Any) -> str:
    example = keys.keys_under(keys.find_group(key) or key)[0].rsplit(".", 1)[-1]
    return f"{key}={value!r}: '{key}' is a group of settings; set one of them, like {key}.{example}=..."


def _describe(value: Any) -> str:
    if value is None:
        return "null"
    name = {bool: "true or false", int: "a whole number", float: "a number", str: "the text"}.get(type(value))
    if name == "the text":
        return f"the text {value!r}"
    return name or f"a {type(value).__name__}"


@cache
def _one_field(pattern: str) -> DictConfig:
    """Return a typed tree with one field of a setting's type: cheaper to check against than all."""
    annotation = keys.fields()[pattern].annotation
    tree = OmegaConf.structured(make_dataclass("OneField", [("value", annotation, field(default=MISSING))]))
    assert isinstance(tree, DictConfig)
    return tree
