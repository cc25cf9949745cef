"""The small files of a checkpoint: counters, settings, and the random generators of each process."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from phsa_megatron.config import compose
from phsa_megatron.config.errors import CheckpointError
from phsa_megatron.config.schema import TrainConfig
from phsa_megatron.parallel.groups import Groups
from phsa_megatron.training import agreement
from phsa_megatron.training import state as training_state
from phsa_megatron.training.commit import Marker, make_empty
from phsa_megatron.training.state import TrainState

STATE_NAME = "train_state.json"
CONFIG_NAME = "config.yaml"
SHARDS_NAME = "shards"  # of its own: megatron takes a folder with other files for a corrupted checkpoint
WEIGHTS_ONLY = "weights_only"  # in a marker: the checkpoint was converted, not trained; there is no optimizer
_LAYOUT = ("world_size", "tensor_size", "pipeline_size", "virtual_pipeline_size", "context_size")


def about(config: TrainConfig, groups: Groups) -> dict[str, Any]:
    """What the marker says about the run that wrote the checkpoint."""
    return {
        "world_size": groups.world_size,
        **layout(config),
        "distributed_optimizer": config.parallel.distributed_optimizer,
        "config_sha256": hashlib.sha256(compose.dump(config).encode()).hexdigest(),
    }


def layout(config: TrainConfig) -> dict[str, Any]:
    """How the model is spread over processes, for the marker."""
    parallel = config.parallel
    return {
        "tensor_size": parallel.tensor_size,
        "pipeline_size": parallel.pipeline_size,
        "virtual_pipeline_size": parallel.virtual_pipeline_size,
        "context_size": parallel.context_size,
    }


def write(partial: Path, state: TrainState, config: TrainConfig, groups: Groups) -> str | None:
    """Make the staging folder and write everything but the shards into it; collective.

    Returns:
        None, or what the operating system refused.
    """

    def begin() -> None:
        make_empty(partial)
        (partial / "rng").mkdir()
        (partial / SHARDS_NAME).mkdir()
        (partial / STATE_NAME).write_text(json.dumps(state.to_dict(), indent=1) + "\n", encoding="utf-8")
        (partial / CONFIG_NAME).write_text(compose.dump(config), encoding="utf-8")

    failure = agreement.attempt(groups, begin)
    if failure is not None:
        return failure
    rng = training_state.capture_rng()
    return agreement.attempt_everywhere(groups, lambda: torch.save(rng, partial / _rng_name(groups)))


def read_state(folder: Path) -> TrainState:
    """The counters in a checkpoint folder.

    Raises:
        CheckpointError: they cannot be read, or are in another format.
    """
    try:
        values = json.loads((folder / STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / STATE_NAME} cannot be read: {error}") from error
    return TrainState.from_dict(values)


def restore_rng(folder: Path, marker: Marker, config: TrainConfig, groups: Groups) -> str | None:
    """Put this process's random generators back, if the checkpoint was written by the same layout.

    Returns:
        None, or a line that says why they were left as they are.
    """
    here = about(config, groups)
    changed = [
        f"{name} {marker.about.get(name)} -> {here[name]}"
        for name in _LAYOUT
        if marker.about.get(name) != here[name]
    ]
    if changed:
        return (
            f"the layout changed ({', '.join(changed)}): random generators start from run.seed. The data "
            "order does not depend on them; results agree to rounding, not to the bit"
        )
    # Our own file, whose hash was just compared; numpy's state is not among the types weights_only allows.
    training_state.restore_rng(torch.load(folder / _rng_name(groups), weights_only=False))
    return None


def _rng_name(groups: Groups) -> str:
    return f"rng/rank_{groups.rank:05d}.pt"
