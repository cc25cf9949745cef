"""The order of a run's sequences, opened from its configuration, with a fingerprint of its ingredients."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from phsa_megatron.config.documents import documents_limit
from phsa_megatron.config.errors import DataError
from phsa_megatron.config.schema import DataConfig, TrainConfig
from phsa_megatron.config.skip_list import number_at, skipped_ranges
from phsa_megatron.data.indexed import IndexedSource
from phsa_megatron.data.sampling import (
    ALGORITHM,
    Piece,
    Sequence,
    TrainingOrder,
    ValidationOrder,
    WeightedSource,
)
from phsa_megatron.data.tokenizer import Tokenizer

Split = Literal["train", "valid"]

__all__ = ["Piece", "Sequence", "SequenceOrder", "Split", "describe_mismatch"]


class SequenceOrder:
    """Sequence number -> source, pieces of documents, tokens; a pure function of (seed, mixture, number).

    Attributes:
        ingredients: all that determines the order, by dotted name; kept with a checkpoint.
        fingerprint: sha256 of the ingredients.
        tokenizer: the run's tokenizer.
        num_sequences: None for training, which is endless; else the number of validation sequences.
        domains: names of the domains, sorted.
    """

    def __init__(self, config: TrainConfig, split: Split, tokenizer: Tokenizer | None = None) -> None:
        """Open the sources of a split.

        Args:
            config: the run's configuration.
            split: train, or valid: `evaluate.num_sequences_per_domain` fixed sequences of each domain.
            tokenizer: the run's tokenizer if it is open already, to save opening it twice.

        Raises:
            DataError: a source is missing, damaged, too small or of another tokenizer; nothing to validate
                on.
        """
        data = config.data
        self.tokenizer = tokenizer or Tokenizer.from_file(data.tokenizer_file, data.eod_token)
        self._skipped = skipped_ranges(data.skip_sequences) if split == "train" else []
        self._sources: dict[str, IndexedSource] = {}
        self._order: TrainingOrder | ValidationOrder
        if split == "train":
            for name, source in data.sources.items():
                self._sources[name] = IndexedSource(source.train_prefix, self.tokenizer.sha256)
            weighted = {
                name: WeightedSource(self._sources[name], source.weight, source.domain)
                for name, source in data.sources.items()
            }
            self._order = TrainingOrder(weighted, data.seq_len_tokens, config.run.seed)
        else:
            for name, source in data.sources.items():
                if source.valid_prefix is not None:
                    self._sources[name] = IndexedSource(source.valid_prefix, self.tokenizer.sha256)
            self._order = ValidationOrder(
                {name: (opened, data.sources[name].domain) for name, opened in self._sources.items()},
                data.seq_len_tokens,
                config.evaluate.num_sequences_per_domain,
            )
            self._check_something_to_validate(data)
        self.domains = sorted({data.sources[name].domain for name in self._sources})
        self.num_sequences = self._order.num_sequences
        self.ingredients = _ingredients(config, split, self.tokenizer, self._sources)
        self.fingerprint = hashlib.sha256(json.dumps(self.ingredients, sort_keys=True).encode()).hexdigest()

    def number(self, position: int) -> int:
        """Return the number of the sequence at a position: sequences that are passed over have none."""
        return number_at(position, self._skipped)

    def sequence(self, position: int) -> Sequence:
        """Return what the sequence at a position is made of; its number, unless some are passed over."""
        return self.sequence_at(self.number(position))

    def sequence_at(self, number: int) -> Sequence:
        """Return what sequence `number` is made of, whether or not it is passed over."""
        return self._order.sequence(number)

    def tokens(self, sequence: Sequence) -> np.ndarray:
        """Return the ids of a sequence's pieces, one after the other: int64 [up to S + 1]."""
        if not sequence.pieces:
            return np.zeros(0, dtype=np.int64)
        source = self._sources[sequence.source]
        parts = [source.tokens(p.document, p.first_token, p.num_tokens) for p in sequence.pieces]
        return np.concatenate(parts).astype(np.int64)

    def epoch_sequences(self) -> dict[str, int]:
        """Return, for each training source, its sequences per epoch; empty for validation."""
        if not isinstance(self._order, TrainingOrder):
            return {}
        return {name: self._order.epoch_sequences(name) for name in self._sources}

    def source(self, name: str) -> IndexedSource:
        """Return an opened source by its name."""
        return self._sources[name]

    def source_names(self) -> list[str]:
        """Return the names of the opened sources, sorted."""
        return sorted(self._sources)

    def _check_something_to_validate(self, data: DataConfig) -> None:
        if not self._sources:
            raise DataError(
                f"no source of data.sources ({', '.join(sorted(data.sources)) or 'empty'}) has a "
                f"valid_prefix, so there is nothing to validate on: set data.sources.NAME.valid_prefix of at "
                f"least one."
            )
        prefixes: dict[str, str] = {}
        for name, opened in self._sources.items():
            if opened.prefix in prefixes:
                raise DataError(
                    f"data.sources.{name} and data.sources.{prefixes[opened.prefix]} have the same "
                    f"valid_prefix {opened.prefix}: its text would count twice. Set valid_prefix of one of "
                    f"them to null."
                )
            prefixes[opened.prefix] = name


def _ingredients(
    config: TrainConfig, split: Split, tokenizer: Tokenizer, sources: Mapping[str, IndexedSource]
) -> dict[str, Any]:
    data = config.data
    ingredients: dict[str, Any] = {
        "algorithm": ALGORITHM,
        "split": split,
        "data.seq_len_tokens": data.seq_len_tokens,
        "data.isolate_documents": data.isolate_documents,
        "data.max_documents_per_sequence": documents_limit(data),
        "data.tokenizer_file": tokenizer.sha256,
    }
    total = sum(data.sources[name].weight for name in sorted(sources))
    for name in sorted(sources):
        if split == "train":
            ingredients[f"data.sources.{name}.weight"] = data.sources[name].weight / total
        ingredients[f"data.sources.{name}.domain"] = data.sources[name].domain
        ingredients[f"data.sources.{name}.content"] = sources[name].content_sha256
    if split == "train":
        ingredients["run.seed"] = config.run.seed
    else:
        ingredients["evaluate.num_sequences_per_domain"] = config.evaluate.num_sequences_per_domain
    return ingredients


def describe_mismatch(saved: Mapping[str, Any], current: Mapping[str, Any]) -> str | None:
    """Return what changed between two orders and what would follow from going on, or None if nothing did.

    Args:
        saved: `SequenceOrder.ingredients` of the checkpoint.
        current: those of the run that wants to go on from it.
    """
    changes = []
    for key in sorted({*saved, *current}):
        if saved.get(key) != current.get(key) or (key in saved) != (key in current):
            before = _shown(saved[key]) if key in saved else "absent"
            after = _shown(current[key]) if key in current else "absent"
            changes.append(f"  {key}: {before} in the checkpoint, {after} now")
    if not changes:
        return None
    return (
        "the order of the data is not the one that the checkpoint was trained with:\n"
        + "\n".join(changes)
        + "\nSequence number n would be other text: the run would see some sequences again and never see "
        "others, and would not be the run that was interrupted. Restore these settings and files to resume, "
        "or start a new stage from the weights with run.init_from=RUN and a new run.name."
    )


def _shown(value: Any) -> str:
    if isinstance(value, str) and len(value) == 64:
        return f"sha256 {value[:16]}"
    if isinstance(value, float):
        return f"share {value:.6g}"
    return str(value)
