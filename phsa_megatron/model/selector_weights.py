"""Weights of selectors in another run's checkpoint: taken where it has them, fresh where it has not."""

from __future__ import annotations

from typing import Any

import torch

from phsa_megatron.config.errors import CheckpointError
from phsa_megatron.config.schema import TrainConfig
from phsa_megatron.config.selector_kinds import learned_selector

PLACE = ".core_attention."
"""What the names of all of them contain, and no others."""


def start_fresh(parent: TrainConfig, config: TrainConfig) -> bool:
    """Return whether a new stage has a selector with weights that its parent does not have."""
    learned = learned_selector(config.attention)
    return learned is not None and learned != learned_selector(parent.attention)


def leave_out(weights: dict[str, Any]) -> dict[str, Any]:
    """Return sharded weights of model chunks without those of selectors."""
    return {
        chunk: {name: value for name, value in content.items() if PLACE not in name}
        for chunk, content in weights.items()
    }


def fill(module: torch.nn.Module, state: dict[str, Any], *, fresh: bool) -> None:
    """Load a chunk's weights; with `fresh` those of its selector stay as they are.

    Raises:
        CheckpointError: others are missing.
    """
    missing, unexpected = module.load_state_dict(state, strict=not fresh)
    wrong = [name for name in missing if PLACE not in name] + list(unexpected)
    if wrong:
        raise CheckpointError(f"the checkpoint has other weights than this model: {', '.join(wrong[:8])}")
