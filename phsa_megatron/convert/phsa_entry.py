"""The entry `phsa` in config.json of an exported folder: the attention's settings and the punctuation set.

The set is written as ids with its hash, so that whoever opens the folder attends with exactly the table that
the model was trained with, or learns that the tokenizer is another one.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from phsa_megatron.attention.punctuation import PunctuationTable
from phsa_megatron.config.errors import ConfigError
from phsa_megatron.config.schema import AttentionConfig

KEY = "phsa"
_VERSION = 1
# How a machine computes is not a property of the model.
_LEFT_OUT = ("impl",)


def phsa_entry(attention: AttentionConfig, table: PunctuationTable) -> dict[str, Any]:
    """Return the entry, plain values only."""
    settings = {name: value for name, value in asdict(attention).items() if name not in _LEFT_OUT}
    return {
        "version": _VERSION,
        "attention": {
            name: str(value) if isinstance(value, str) else value for name, value in settings.items()
        },
        "punctuation": {
            "name": table.name,
            "sha256": table.sha256,
            "num_tokens": len(table.is_punctuation),
            "ids": table.is_punctuation.nonzero().flatten().tolist(),
        },
    }


def read_phsa_entry(entry: dict[str, Any], source: Path | str) -> tuple[AttentionConfig, PunctuationTable]:
    """Return the settings and the punctuation table of an entry.

    Args:
        entry: what `phsa_entry` returned.
        source: where it was found, for messages.

    Raises:
        ConfigError: it was written by another version, has unknown settings, or its ids do not have its hash.
    """
    if entry.get("version") != _VERSION:
        raise ConfigError(
            f"{source}: the entry '{KEY}' in config.json has version {entry.get('version')!r}, this code "
            f"reads {_VERSION}: use the version of phsa-megatron that wrote it, or export again"
        )
    try:
        merged = OmegaConf.merge(OmegaConf.structured(AttentionConfig), entry["attention"])
        attention = OmegaConf.to_object(merged)
        punctuation = entry["punctuation"]
        flags = torch.zeros(punctuation["num_tokens"], dtype=torch.bool)
        flags[torch.tensor(punctuation["ids"], dtype=torch.int64)] = True
        table = PunctuationTable.of_flags(punctuation["name"], flags)
        written = punctuation["sha256"]
    except (OmegaConfBaseException, KeyError, TypeError, IndexError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{source}: the entry '{KEY}' in config.json cannot be read: {reason}") from error
    assert isinstance(attention, AttentionConfig)
    if table.sha256 != written:
        raise ConfigError(
            f"{source}: the punctuation ids in config.json have hash {table.sha256[:16]}, "
            f"{written[:16]} is written beside them: the file was changed by hand; export it again"
        )
    return attention, table


def check_same_table(ours: PunctuationTable, theirs: PunctuationTable, what: str) -> None:
    """Refuse a tokenizer whose punctuation set is not the one that a folder names.

    Raises:
        ConfigError: with both names and hashes.
    """
    if ours.sha256 != theirs.sha256:
        raise ConfigError(
            f"{what}: its punctuation set is {ours.name} ({ours.sha256[:16]}), the folder's config.json has "
            f"{theirs.name} ({theirs.sha256[:16]}): a model runs with the set that it was trained with; "
            "give the tokenizer and the settings of the folder"
        )
