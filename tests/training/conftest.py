"""A tiny run made on the fly: tokenizer, two prepared sources, and a model that trains in a second."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from omegaconf import OmegaConf
from tokenizers import Tokenizer as HuggingFaceTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from phsa_megatron.config.prepare_run import prepare_run_folder
from phsa_megatron.config.resolved import to_config
from phsa_megatron.config.run_folder import RunFolder
from phsa_megatron.config.schema import TrainConfig
from phsa_megatron.data.manifest import FileRecord, Manifest
from phsa_megatron.data.tokenizer import Tokenizer
from phsa_megatron.monitoring.records import read_records
from phsa_megatron.parallel.groups import Groups, initialize
from phsa_megatron.training.loop import Outcome, train
from tests.training.bench import Bench

EOD = "<|endoftext|>"
WORDS = ["the", "a", "cat", "dog", "sun,", "moon.", "river!", "stone;", "bird?", "over", "under"]
WORDS += ["and", "then", "it", "sat", "ran", "sang;", "far", "away"]
SOURCES = {"prose": "en", "verse": "zh"}


def _text(generator: random.Random) -> str:
    """A document with something to learn: each word is followed by one of two; some carry a mark."""
    index, words = generator.randrange(len(WORDS)), []
    for _ in range(generator.randint(8, 60)):
        words.append(WORDS[index])
        index = (index * 3 + generator.choice((1, 2))) % len(WORDS)
    return " ".join(words)


def _write_tokenizer(path: Path) -> None:
    backend = HuggingFaceTokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    generator = random.Random(0)
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=[EOD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator([_text(generator) for _ in range(200)], trainer)
    backend.save(str(path))


def _write_source(prefix: Path, tokenizer_file: Path, seed: int, num_documents: int) -> None:
    tokenizer = Tokenizer.from_file(tokenizer_file, EOD)
    generator = random.Random(seed)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    num_tokens = num_bytes = 0
    for _ in range(num_documents):
        text = _text(generator)
        ids = [*tokenizer.encode(text), tokenizer.eod_id]
        builder.add_item(torch.tensor(ids))
        builder.end_document()
        num_tokens += len(ids)
        num_bytes += len(text.encode())
    builder.finalize(f"{prefix}.idx")
    files = [FileRecord.of(Path(f"{prefix}{ending}")) for ending in (".bin", ".idx")]
    Manifest(
        tokenizer_sha256=hashlib.sha256(tokenizer_file.read_bytes()).hexdigest(),
        vocab_size=tokenizer.vocab_size,
        eod_id=tokenizer.eod_id,
        dtype="uint16",
        num_documents=num_documents,
        num_tokens=num_tokens,
        text_num_bytes=num_bytes,
        num_empty_documents=0,
        num_bad_records=0,
        bad_records=[],
        input_files=[],
        bin_file=files[0],
        idx_file=files[1],
    ).write(Path(f"{prefix}.json"))


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tokenizer.json and, for each source, NAME_train and NAME_valid sets."""
    folder = tmp_path_factory.mktemp("tiny_data")
    _write_tokenizer(folder / "tokenizer.json")
    for i, name in enumerate(SOURCES):
        _write_source(folder / f"{name}_train", folder / "tokenizer.json", 10 + i, 120)
        _write_source(folder / f"{name}_valid", folder / "tokenizer.json", 20 + i, 30)
    return folder


TINY: dict[str, Any] = {
    "run": {"name": "tiny", "train_steps": 6, "dtype": "fp32", "num_threads": 1, "seed": 7},
    "model": {
        "name": "tiny",
        "num_layers": 2,
        "hidden_size": 32,
        "ffn_hidden_size": 64,
        "num_query_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
        "vocab_size": 300,
        "vocab_pad_multiple": 16,
    },
    "attention": {"block_tokens": 4, "init_tokens": 4, "local_tokens": 8, "train_topk": 1, "infer_topk": 2},
    "data": {"name": "tiny", "seq_len_tokens": 64},
    "optim": {
        "global_batch_sequences": 4,
        "micro_batch_sequences": 2,
        "lr": 1e-2,
        "min_lr": 1e-3,
        "warmup_steps": 2,
        "decay_steps": 2,
    },
    "checkpoint": {"save_every_steps": 0},
    "evaluate": {"num_sequences_per_domain": 3, "micro_batch_sequences": 2},
    "cluster": {"name": "test", "device": "cpu"},
    "monitoring": {"progress": False, "report": False, "wandb": {"mode": "disabled"}},
}


@pytest.fixture
def tiny_config(tiny_data: Path, tmp_path: Path) -> Callable[..., TrainConfig]:
    """Makes a run's settings from dotted overrides, such as `tiny_config(**{"run.dtype": "bf16"})`."""

    def make(**overrides: Any) -> TrainConfig:
        sources = {
            name: {
                "weight": 1.0,
                "domain": domain,
                "train_prefix": str(tiny_data / f"{name}_train"),
                "valid_prefix": str(tiny_data / f"{name}_valid"),
            }
            for name, domain in SOURCES.items()
        }
        where = {
            "run": {"root_dir": str(tmp_path / "runs")},
            "data": {"tokenizer_file": str(tiny_data / "tokenizer.json"), "sources": sources},
        }
        tree = OmegaConf.merge(OmegaConf.structured(TrainConfig), TINY, where)
        for key, value in overrides.items():
            OmegaConf.update(tree, key, value)
        return to_config(tree)

    return make


@pytest.fixture
def bench(
    tiny_config: Callable[..., TrainConfig], open_groups: Callable[..., Groups]
) -> Callable[..., Bench]:
    """Makes benches: `bench(**{"run.dtype": "bf16"})`."""

    def make(**overrides: Any) -> Bench:
        config = tiny_config(**overrides)
        return Bench(config, open_groups(config))

    return make


@pytest.fixture(autouse=True)
def no_injected_faults(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Keeps a fault of the surrounding shell out of the tests."""
    monkeypatch.delenv("PHSA_FAULT", raising=False)
    yield


@dataclass(frozen=True)
class Finished:
    """What a run in this process left."""

    outcome: Outcome
    folder: RunFolder
    steps: list[dict[str, float]]
    """Values of each step, in order."""

    def curve(self) -> list[tuple[float, float, float]]:
        """Loss, gradient norm and zero-gradient count of each step."""
        return [
            (s["train/loss_nats"], s["optim/grad_norm"], s["optim/num_zeros"])
            for s in self.steps
            if "train/loss_nats" in s
        ]

    def events(self, kind: str) -> list[dict[str, Any]]:
        """Events of a kind, in order."""
        lines = self.folder.metrics_file.read_text().splitlines()
        return [record for record in map(json.loads, lines) if record.get("event") == kind]


def run_once(config: TrainConfig) -> Finished:
    """Starts or resumes a run in this process."""
    folder = prepare_run_folder(config).folder
    groups = initialize(config)
    try:
        outcome = train(config, groups)
    finally:
        groups.close()
    values = read_records(folder.metrics_file).values_by_step
    return Finished(outcome, folder, list(values.values()))


@pytest.fixture
def run() -> Callable[[TrainConfig], Finished]:
    """Starts or resumes a run in this process, and reads what it left."""
    return run_once


@pytest.fixture
def open_groups() -> Iterator[Callable[[TrainConfig], Groups]]:
    """Initializes groups for a config, with its seed; each call closes the groups of the call before."""
    opened: list[Groups] = []

    def reopen(config: TrainConfig) -> Groups:
        if opened:
            opened.pop().close()
        opened.append(initialize(config))
        return opened[-1]

    yield reopen
    if opened:
        opened.pop().close()
