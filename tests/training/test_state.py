from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch

from phsa_megatron.config.errors import CheckpointError
from phsa_megatron.training.state import TrainState, capture_rng, restore_rng, rng_digest


def _draw() -> tuple[float, float, float]:
    return torch.rand(()).item(), float(np.random.random()), random.random()


def test_state_goes_through_json_unchanged():
    state = TrainState(
        step=3,
        consumed_sequences=12,
        consumed_tokens=700,
        wall_s=1.5,
        wandb_run_id="abc",
        data_fingerprint={"run.seed": 1, "data.sources.a.content": "f00"},
        skipped=[(4, 8)],
    )
    assert TrainState.from_dict(json.loads(json.dumps(state.to_dict()))) == state


@pytest.mark.parametrize("change", [{"format_version": 99}, {"unheard_of": 1}])
def test_a_state_of_another_format_is_refused(change):
    with pytest.raises(CheckpointError, match="format_version"):
        TrainState.from_dict(TrainState().to_dict() | change)


def test_restored_generators_repeat_their_draws(single_process_groups):
    before = capture_rng()
    first = _draw()
    after = capture_rng()
    assert rng_digest(before) != rng_digest(after)
    restore_rng(before)
    assert rng_digest(capture_rng()) == rng_digest(before)
    assert _draw() == first
    assert rng_digest(capture_rng()) == rng_digest(after)


def test_megatron_tracker_is_part_of_the_state(single_process_groups):
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    def draw() -> torch.Tensor:
        with get_cuda_rng_tracker().fork():
            return torch.rand(4)

    before = capture_rng()
    first = draw()
    assert rng_digest(before) != rng_digest(capture_rng())
    restore_rng(before)
    assert torch.equal(draw(), first)
