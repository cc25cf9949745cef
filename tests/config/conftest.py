import copy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from phsa_megatron.config.compose import compose
from phsa_megatron.config.schema import TrainConfig

sys.path.insert(0, str(Path(__file__).parent))  # tests are no package, and share their cases

PAPER_SOURCES = ("dclm", "map_cc", "ultrachat", "tulu_v3", "finemath", "megamath")

# The demo is tuned now and then, and tests compute by hand: they see these numbers, whatever its files say.
FIXED_NUMBERS = (
    "run.train_steps=400",
    "run.num_threads=2",
    "model.num_layers=4",
    "model.hidden_size=192",
    "model.ffn_hidden_size=512",
    "model.num_query_heads=6",
    "model.num_kv_heads=2",
    "model.head_dim=32",
    "model.vocab_size=8192",
    "attention.block_tokens=16",
    "attention.init_tokens=16",
    "attention.local_tokens=64",
    "attention.train_topk=2",
    "data.seq_len_tokens=512",
    "optim.global_batch_sequences=8",
    "optim.micro_batch_sequences=8",
    "optim.lr=3e-3",
    "optim.min_lr=3e-4",
    "optim.warmup_steps=40",
    "optim.decay_steps=100",
    "evaluate.every_steps=100",
)


@pytest.fixture(scope="session")
def paper_overrides() -> list[str]:
    """What `data=phsa_paper` leaves to the person: a share and a path for each source."""
    given = [f"data.sources.{s}.weight=1" for s in PAPER_SOURCES]
    given += [f"data.sources.{s}.train_prefix=prepared/{s}" for s in PAPER_SOURCES]
    return [*given, "data.sources.dclm.valid_prefix=prepared/dclm_valid"]


@pytest.fixture(scope="session")
def _demo() -> TrainConfig:
    return compose(["recipe=phsa_demo_cpu", *FIXED_NUMBERS]).config


@pytest.fixture
def demo(_demo: TrainConfig) -> TrainConfig:
    """The demo with the numbers of `FIXED_NUMBERS`."""
    return copy.deepcopy(_demo)


@pytest.fixture
def changed(_demo: TrainConfig) -> Callable[[dict[str, object]], TrainConfig]:
    """The demo of `demo` with some settings replaced, past all checks of composition."""

    def make(settings: dict[str, object]) -> TrainConfig:
        config = copy.deepcopy(_demo)
        for key, value in settings.items():
            target: object = config
            *path, name = key.split(".")
            for part in path:
                target = target[part] if isinstance(target, dict) else getattr(target, part)
            if isinstance(target, dict):
                target[name] = value
            else:
                assert hasattr(target, name), key
                setattr(target, name, value)
        return config

    return make
