"""Reads a YAML file of settings together with the line on which each key stands."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from phsa_megatron.config.errors import ConfigError


@dataclass(frozen=True)
class YamlFile:
    """What a file sets.

    Attributes:
        values: the nested settings, as written.
        lines: line number of each dotted key, branches included.
    """

    values: dict[str, Any]
    lines: dict[str, int]


def read_yaml(path: Path) -> YamlFile:
    """Read one file.

    Raises:
        ConfigError: the file is missing, is not YAML, or is not a mapping of names to settings.
    """
    try:
        text = path.read_text(encoding="utf-8")
        content = OmegaConf.create(text) if text.strip() else OmegaConf.create({})
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {describe_yaml_error(error)}") from error
    if not OmegaConf.is_dict(content) or (root is not None and not isinstance(root, yaml.MappingNode)):
        raise ConfigError(f"{path} must hold a mapping of keys to values, like 'lr: 1.0e-3'")
    values = OmegaConf.to_container(content)
    assert isinstance(values, dict)
    lines = dict(_lines(root, "")) if isinstance(root, yaml.MappingNode) else {}
    return YamlFile({str(key): value for key, value in values.items()}, lines)


def describe_yaml_error(error: Exception) -> str:
    """Return what is wrong and on which line, in one line."""
    if not isinstance(error, yaml.MarkedYAMLError):
        return str(error)
    line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
    return f"{line}{error.problem or error.context}"


def leaves(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of every setting; an empty mapping is a value."""
    for name, value in values.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and value:
            yield from leaves(value, key + ".")
        else:
            yield key, value


def nested(key: str, value: Any) -> dict[str, Any]:
    """Return {'a': {'b': value}} for the key 'a.b'."""
    for name in reversed(key.split(".")):
        value = {name: value}
    assert isinstance(value, dict)
    return value


def _lines(node: yaml.MappingNode, prefix: str) -> Iterator[tuple[str, int]]:
    for name, value in node.value:
        key = f"{prefix}{name.value}"
        yield key, name.start_mark.line + 1
        if isinstance(value, yaml.MappingNode):
            yield from _lines(value, key + ".")
