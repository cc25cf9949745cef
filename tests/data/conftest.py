"""A small tokenizer and prepared sets of it, for the tests of this room."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from phsa_megatron.config.schema import SourceConfig, TrainConfig
from phsa_megatron.data.bpe import train_bpe
from phsa_megatron.data.prepare import PrepareRequest, prepare

WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat,",
    "and",
    "the",
    "dog",
    "ran",
    "off.",
    "why",
    "not?",
    "red",
    "blue",
]
WORDS += ["今天天气很好，我们去散步。", "他说：好的！", "green"]


def prose(seed: int, num_words: int) -> str:
    """Return words in a random order that depends on the seed alone."""
    return " ".join(random.Random(seed).choices(WORDS, k=num_words))


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE of 300 tokens."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_bpe([prose(i, 300) for i in range(20)], vocab_size=300).save(str(path))
    return path


@pytest.fixture(scope="session")
def make_set(tokenizer_file: Path) -> Callable[[Path, Sequence[str]], Path]:
    """A function that prepares texts as a set and returns its prefix."""

    def make(prefix: Path, texts: Sequence[str]) -> Path:
        prefix.parent.mkdir(parents=True, exist_ok=True)
        source = prefix.with_name(prefix.name + "_text.jsonl")
        source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
        prepare(PrepareRequest([source], prefix, tokenizer_file))
        return prefix

    return make


@pytest.fixture(scope="session")
def mixture(
    tmp_path_factory: pytest.TempPathFactory,
    make_set: Callable[[Path, Sequence[str]], Path],
    tokenizer_file: Path,
) -> Callable[[], TrainConfig]:
    """A function that returns a fresh configuration: two sources, two domains, sequences of 32 tokens."""
    folder = tmp_path_factory.mktemp("sets")
    lengths = {"big": [1, 3, 40, 7, 120, 2, 1, 90, 15, 64] * 4, "small": [30, 5, 80, 11, 1, 1, 1, 50]}
    for name, sizes in lengths.items():
        make_set(folder / f"{name}_train", [prose(i, size) for i, size in enumerate(sizes)])
        make_set(folder / f"{name}_valid", [prose(1000 + i, size) for i, size in enumerate(sizes[:6])])

    def config() -> TrainConfig:
        fresh = TrainConfig()
        fresh.data.seq_len_tokens = 32
        fresh.data.max_documents_per_sequence = 8
        fresh.data.tokenizer_file = str(tokenizer_file)
        fresh.model.vocab_size = 300
        fresh.run.train_steps = 10
        fresh.evaluate.num_sequences_per_domain = 5
        fresh.data.sources = {
            name: SourceConfig(
                weight=weight,
                domain=f"domain_{name}",
                train_prefix=str(folder / f"{name}_train"),
                valid_prefix=str(folder / f"{name}_valid"),
            )
            for name, weight in (("big", 3.0), ("small", 1.0))
        }
        return fresh

    return config
