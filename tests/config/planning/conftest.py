from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from phsa_megatron.config.planning.run_to_plan import run_to_plan
from phsa_megatron.config.schema import TrainConfig

RECIPE = "recipe=phsa_8b_pretrain_8gpu_h100_bf16_32k"


@pytest.fixture(scope="session")
def large() -> Callable[..., TrainConfig]:
    """Returns a builder of the 8B run at 32k: `large(parallel__tensor_size=2)`."""
    base = run_to_plan([RECIPE])

    def build(**changes: object) -> TrainConfig:
        config = base
        for key, value in changes.items():
            section, name = key.split("__")
            config = replace(config, **{section: replace(getattr(config, section), **{name: value})})
        return config

    return build
