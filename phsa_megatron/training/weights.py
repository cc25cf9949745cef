"""A trained model for use: weights of a committed checkpoint without optimizer, gradients or schedule."""

from __future__ import annotations

from megatron.core.transformer.module import MegatronModule

from phsa_megatron.config.errors import CheckpointError
from phsa_megatron.config.run_folder import RunFolder
from phsa_megatron.config.schema import TrainConfig
from phsa_megatron.model.factory import build_model
from phsa_megatron.parallel import mcore_checkpointing as shards
from phsa_megatron.parallel.groups import Groups
from phsa_megatron.training import checkpoint_files as files
from phsa_megatron.training.commit import read_marker, verify


def load_model(
    folder: RunFolder, config: TrainConfig, groups: Groups, step: int | None = None
) -> tuple[MegatronModule, int]:
    """Return the model of a run in this one process, and the step of its weights.

    Args:
        folder: the run.
        config: its settings for one process (`replay.single_process`); weights of any layout are resharded.
        groups: of this process.
        step: a committed step, None for the newest.

    Raises:
        CheckpointError: there is no such checkpoint, or it is damaged or of another model.
    """
    committed = folder.committed_steps()
    if not committed:
        raise CheckpointError(f"{folder.path} holds no committed checkpoint: train it first")
    step = committed[-1] if step is None else step
    if step not in committed:
        raise CheckpointError(
            f"{folder.path} has no committed checkpoint of step {step}; it has those of "
            f"{', '.join(map(str, committed))}"
        )
    path = folder.checkpoints_dir / f"step_{step:08d}"
    shards.check_readable(read_marker(path).made_with, path)
    verify(path)
    (model,) = build_model(config, groups)
    bare = getattr(model, "module", model)  # without megatron's bf16 wrapper
    loaded = shards.read(dict(shards.model_state([bare], groups)), path / files.SHARDS_NAME)
    bare.load_state_dict(loaded["model"], strict=True)
    return model, step
