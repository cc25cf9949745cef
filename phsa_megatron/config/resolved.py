"""The resolved file of a run: exactly the schema's keys, written once and read by every process."""

from __future__ import annotations

import os
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from phsa_megatron.config import check_keys, keys
from phsa_megatron.config.errors import ConfigError
from phsa_megatron.config.schema import TrainConfig
from phsa_megatron.config.yaml_file import read_yaml

_HEADER = """\
# The resolved settings of this run, written by phsa-train. Do not edit: change a recipe or the command line.
"""


def dump(config: TrainConfig) -> str:
    """Return the resolved settings as YAML text."""
    return _HEADER + OmegaConf.to_yaml(OmegaConf.structured(config))


def load(path: str | Path) -> TrainConfig:
    """Read a resolved file.

    A setting that the file lacks takes the schema's default, so that a run made before the setting existed
    can still be read; defaults of new settings keep the earlier behaviour for that reason.

    Raises:
        ConfigError: the file is missing or not YAML, has an unknown key or a wrong type, or lacks a setting
            that has no default.
    """
    path = Path(path)
    file = read_yaml(path)
    found = check_keys.problems(file.values)
    if found:
        lines = [f"  line {file.lines.get(key, '?')}: {message}" for key, message in found]
        raise ConfigError(f"{path} does not fit this version of the schema:\n" + "\n".join(lines))
    tree = OmegaConf.merge(OmegaConf.structured(TrainConfig), file.values)
    assert isinstance(tree, DictConfig)
    missing = sorted(OmegaConf.missing_keys(tree))
    if missing:
        raise ConfigError(f"{path} is not a resolved file: it lacks {', '.join(missing)}")
    return to_config(tree)


def to_config(tree: DictConfig) -> TrainConfig:
    """Return the dataclasses of a typed tree without missing values.

    Raises:
        ConfigError: an interpolation cannot be resolved.
    """
    try:
        config = OmegaConf.to_object(tree)
    except (OmegaConfBaseException, ValueError, TypeError) as error:
        key = getattr(error, "full_key", None)
        field = keys.find(key) if key else None
        expected = f" (expected {field.expected})" if field else ""
        raise ConfigError(f"{key or 'settings'}{expected}: {str(error).splitlines()[0]}") from error
    assert isinstance(config, TrainConfig)
    return config


def write_atomically(path: Path, text: str) -> None:
    """Replace a file; a reader sees the old text or the new one, also after a crash."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
