"""How a decode step is cut into programs: from shapes and the device alone, never from lengths."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class DecodeTiles:
    """Tile sizes of the decode kernels.

    Attributes:
        score_blocks: pooled keys of a step of the score kernel.
        chunk_blocks: blocks whose best k one program of the choose kernel finds.
        attend_keys: keys of a step of the attend kernel.
        max_steps: most steps of one program of the score and attend kernels.
        programs_per_multiprocessor: that the two aim at, so that loads of many programs are in flight.
    """

    score_blocks: int = 64
    chunk_blocks: int = 1024
    attend_keys: int = 64
    max_steps: int = 16
    programs_per_multiprocessor: int = 4
    score_warps: int = 4
    attend_warps: int = 4
    num_stages: int = 3


TILES = DecodeTiles()
# Of a product in full precision, which has no tensor core: larger ones take minutes to compile (NOTES.md).
_FULL_PRECISION = {"score_blocks": 16, "attend_keys": 16, "num_stages": 1}


def tiles_for(device: torch.device, dtype: torch.dtype) -> DecodeTiles:
    """Return the tiles for operands of a dtype on a device: small ones for fp32 on a GPU."""
    if device.type == "cuda" and dtype == torch.float32:
        return dataclasses.replace(TILES, **_FULL_PRECISION)
    return TILES


@functools.cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def steps_per_program(num_steps: int, num_rows: int, device: torch.device, tiles: DecodeTiles) -> int:
    """Return how many of `num_steps` steps of each of `num_rows` (sequence, head) pairs a program takes.

    A power of two, so that few kernels are compiled.
    """
    if device.type != "cuda":
        return min(2, tiles.max_steps)
    index = torch.cuda.current_device() if device.index is None else device.index
    programs = tiles.programs_per_multiprocessor * _multiprocessors(index)
    steps = 1
    while steps < tiles.max_steps and steps * programs < num_steps * num_rows:
        steps *= 2
    return steps
