"""A trained model for use: weights of a committed checkpoint without optimizer, gradients or schedule.

Everything that uses a run without training it finds and reads its checkpoint here: generation, evaluation
and conversion.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from megatron.core.transformer.module import Float16Module

from phsa_megatron.config.errors import CheckpointError
from phsa_megatron.config.run_folder import RunFolder
from phsa_megatron.config.schema import TrainConfig
from phsa_megatron.model.factory import build_model
from phsa_megatron.parallel import mcore_checkpointing as shards
from phsa_megatron.parallel.groups import Groups
from phsa_megatron.training import checkpoint_files as files
from phsa_megatron.training.commit import CheckpointStore, read_marker, verify


def find_checkpoint(folder: RunFolder, step: int | None = None) -> Path:
    """Return the checkpoint of a step, or the newest that can be trusted; newer ones are told on stderr.

    Args:
        folder: the run.
        step: a committed step, None for the newest.

    Raises:
        CheckpointError: there is none, it is damaged, or of a newer megatron-core.
    """
    store = CheckpointStore(folder.checkpoints_dir, folder.committed_step)
    if step is None:
        found = store.scan()
        skipped = [f"{name}: {reason}" for name, reason in found.skipped]
        if found.newest is None:
            raise CheckpointError(
                "\n  ".join([f"{folder.path} holds no committed checkpoint: train it first", *skipped])
            )
        for line in skipped:
            print(f"skipped {line}", file=sys.stderr)
        step = found.newest
    elif step not in folder.committed_steps():
        steps = ", ".join(map(str, folder.committed_steps())) or "none; train it first"
        raise CheckpointError(f"{folder.path} has no committed checkpoint of step {step}; it has: {steps}")
    checkpoint = store.path(step)
    shards.check_readable(read_marker(checkpoint).made_with, checkpoint)
    verify(checkpoint)
    return checkpoint


def load_model(checkpoint: Path, config: TrainConfig, groups: Groups) -> torch.nn.Module:
    """Return the bare model of this one process with a checkpoint's weights, for evaluation.

    Args:
        checkpoint: a committed checkpoint, of any layout.
        config: its settings for one process (`replay.single_process`), and the dtype of the model.
        groups: of this process.

    Raises:
        CheckpointError: the checkpoint does not hold this model.
    """
    (chunk,) = build_model(config, groups)
    model = bare(chunk)
    loaded = shards.read(dict(shards.model_state([model], groups)), checkpoint / files.SHARDS_NAME)
    with torch.no_grad():
        model.load_state_dict(loaded["model"], strict=True)
    return model.eval()


def bare(model: torch.nn.Module) -> torch.nn.Module:
    """Return the model without megatron's bf16 wrapper."""
    return model.module if isinstance(model, Float16Module) else model
