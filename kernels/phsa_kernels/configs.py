"""Tile sizes by GPU architecture: a safe default, and what was measured better on one architecture."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Launch:
    """One kernel's tile: rows (queries x heads, or queries), keys or blocks a step, warps, stages."""

    rows: int
    keys: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Configs:
    """A launch for every kernel; `init_chunk_rows`: rows whose init gradients one program sums."""

    normalizer: Launch
    select: Launch
    forward: Launch
    dq: Launch
    chosen_dkdv: Launch
    window_dkdv: Launch
    init_chunk_rows: int = 2048


SAFE = Configs(
    normalizer=Launch(64, 64, 4, 2),
    select=Launch(64, 64, 4, 2),
    forward=Launch(64, 64, 4, 2),
    dq=Launch(64, 64, 4, 2),
    chosen_dkdv=Launch(64, 16, 4, 2),
    window_dkdv=Launch(64, 64, 4, 2),
)
# Chosen from the variants that NOTES.md lists, measured on an H100.
BY_CAPABILITY: dict[tuple[int, int], Configs] = {
    (9, 0): Configs(
        normalizer=Launch(128, 64, 4, 3),
        select=Launch(64, 64, 4, 2),
        forward=Launch(64, 64, 4, 3),
        dq=Launch(64, 64, 4, 2),
        chosen_dkdv=Launch(64, 16, 4, 2),
        window_dkdv=Launch(64, 64, 4, 3),
    )
}


@functools.cache
def _of_capability(index: int) -> Configs:
    return BY_CAPABILITY.get(torch.cuda.get_device_capability(index), SAFE)


def configs_for(device: torch.device) -> Configs:
    """Return the table of this device; the safe one for what was never measured and for the interpreter."""
    if device.type != "cuda":
        return SAFE
    return _of_capability(torch.cuda.current_device() if device.index is None else device.index)
