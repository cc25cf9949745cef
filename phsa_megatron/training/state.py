"""What a resume needs besides weights and optimizer: counters, identities, and every random generator."""

from __future__ import annotations

import dataclasses
import hashlib
import pickle
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from phsa_megatron.config.errors import CheckpointError
from phsa_megatron.data.order import describe_mismatch

FORMAT_VERSION = 1


@dataclass
class TrainState:
    """The counters and identities of a run; equal on all processes, saved with each checkpoint."""

    step: int = 0
    """Completed optimizer steps; the step under way is `step + 1`."""
    consumed_sequences: int = 0
    """Training sequences behind the completed steps: the whole position in the data order."""
    consumed_tokens: int = 0
    """Tokens with a loss behind the completed steps; padding is not counted."""
    wall_s: float = 0.0
    """Seconds from loaded to saved, evaluations included, added up over restarts."""
    wandb_run_id: str | None = None
    """The one W&B run of this experiment; null while W&B is disabled."""
    data_fingerprint: dict[str, Any] = field(default_factory=dict)
    """All that determines the order of the training data; a resume with another one is refused."""
    skipped: list[tuple[int, int]] = field(default_factory=list)
    """Half-open ranges of sequences that the run passed over."""
    format_version: int = FORMAT_VERSION
    """Version of this record."""

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values only, ready for JSON."""
        return dataclasses.asdict(self) | {"skipped": [list(span) for span in self.skipped]}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainState:
        """Returns the state that `to_dict` wrote.

        Raises:
            CheckpointError: the record was written in another format.
        """
        version = values.get("format_version")
        known = {f.name for f in dataclasses.fields(cls)}
        if version != FORMAT_VERSION or set(values) != known:
            odd = sorted(set(values) ^ known)
            raise CheckpointError(
                f"training state has format_version {version!r}; this code reads {FORMAT_VERSION}"
                + (f" (fields that differ: {', '.join(odd)})" if odd else "")
                + ". Resume with the version of phsa-megatron that wrote the checkpoint, or start a new "
                "stage from its weights with run.init_from."
            )
        spans = [(int(first), int(end)) for first, end in values["skipped"]]
        return cls(**(values | {"skipped": spans}))


def capture_rng() -> dict[str, Any]:
    """Returns a copy of the state of every random generator of this process.

    Keys: `torch` (uint8 tensor), `megatron` (its tracker's named states: the generators of model-parallel
    regions), `cuda` (uint8 tensor, or None without CUDA), `numpy`, `python`.
    """
    return {
        "torch": torch.get_rng_state(),
        "megatron": {name: state.clone() for name, state in get_cuda_rng_tracker().get_states().items()},
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "numpy": np.random.get_state(legacy=False),
        "python": random.getstate(),
    }


def restore_rng(rng: dict[str, Any]) -> None:
    """Puts every random generator of this process back to what `capture_rng` saw.

    Raises:
        CheckpointError: the states were captured on another kind of device.
    """
    if (rng["cuda"] is not None) != torch.cuda.is_available():
        here = "has" if torch.cuda.is_available() else "has no"
        raise CheckpointError(
            f"the saved random-generator states are of another kind of device: this process {here} CUDA. "
            "Resume on the kind of device the checkpoint was written on."
        )
    torch.set_rng_state(rng["torch"])
    if rng["cuda"] is not None:
        torch.cuda.set_rng_state(rng["cuda"])
    get_cuda_rng_tracker().set_states({name: state.clone() for name, state in rng["megatron"].items()})
    np.random.set_state(rng["numpy"])
    random.setstate(rng["python"])


def rng_digest(rng: dict[str, Any]) -> str:
    """Returns the SHA-256 of all bytes of a captured state: equal digests, equal generators."""
    digest = hashlib.sha256()
    numpy_state = rng["numpy"]["state"]
    tensors = [rng["torch"], *(rng["megatron"][name] for name in sorted(rng["megatron"]))]
    if rng["cuda"] is not None:
        tensors.append(rng["cuda"])
    for tensor in tensors:
        digest.update(tensor.cpu().numpy().tobytes())
    digest.update(numpy_state["key"].tobytes())
    digest.update(pickle.dumps((numpy_state["pos"], rng["numpy"]["has_gauss"], rng["numpy"]["gauss"])))
    digest.update(pickle.dumps(rng["python"]))
    return digest.hexdigest()


def check_data_order(saved: TrainState, current: Mapping[str, Any]) -> None:
    """Refuse to continue on another data order than the one the checkpoint counts its position in.

    Raises:
        CheckpointError: it says what changed and what would happen.
    """
    mismatch = describe_mismatch(saved.data_fingerprint, current)
    if mismatch is not None:
        raise CheckpointError(mismatch)
