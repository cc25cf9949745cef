import copy
from collections.abc import Callable

import pytest

from phsa_megatron.config.compose import compose
from phsa_megatron.config.schema import TrainConfig

PAPER_SOURCES = ("dclm", "map_cc", "ultrachat", "tulu_v3", "finemath", "megamath")


@pytest.fixture(scope="session")
def paper_overrides() -> list[str]:
    """What `data=phsa_paper` leaves to the person: a share and a path for each source."""
    given = [f"data.sources.{s}.weight=1" for s in PAPER_SOURCES]
    given += [f"data.sources.{s}.train_prefix=prepared/{s}" for s in PAPER_SOURCES]
    return [*given, "data.sources.dclm.valid_prefix=prepared/dclm_valid"]


@pytest.fixture(scope="session")
def _demo() -> TrainConfig:
    return compose(["recipe=phsa_demo_cpu"]).config


@pytest.fixture
def demo(_demo: TrainConfig) -> TrainConfig:
    return copy.deepcopy(_demo)


@pytest.fixture
def changed(_demo: TrainConfig) -> Callable[[dict[str, object]], TrainConfig]:
    """The demo with some settings replaced, past all checks of composition."""

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
