"""How long a process spends in the forward pass, the backward pass and the optimizer, without waiting for it.

On a CPU the host's clock is the clock. On a GPU the host runs ahead: an event is put into the stream at each
change of phase, and read once the device has passed it, so that nothing ever waits. What a process waits for
others inside of a phase (a pipeline neighbour, a tensor-parallel sum) is in that phase.
"""

from __future__ import annotations

import time
from collections import deque
from typing import Any

import torch

PHASES = ("forward", "backward", "optimizer")


class PhaseClock:
    """A listener of `Progress.on_enter`.

    Args:
        device: of the process.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._marks: deque[tuple[str, Any]] = deque()
        self._seconds = dict.fromkeys(PHASES, 0.0)

    def enter(self, phase: str) -> None:
        """Marks the beginning of a phase, which ends the one before."""
        if self._on_gpu:
            # Outside of a step nothing is timed: one mark ends the optimizer's, the next ones are not needed.
            if phase not in PHASES and (not self._marks or self._marks[-1][0] not in PHASES):
                return
            mark = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            mark.record()
            self._marks.append((phase, mark))
        else:
            self._marks.append((phase, time.perf_counter()))
        if phase not in PHASES:
            self._read()

    def take(self) -> dict[str, float]:
        """Returns the seconds in each phase since the last call, as far as the device has come."""
        self._read()
        taken, self._seconds = self._seconds, dict.fromkeys(PHASES, 0.0)
        return taken

    def _read(self) -> None:
        while len(self._marks) > 1:
            (phase, begin), (_, end) = self._marks[0], self._marks[1]
            if self._on_gpu and not end.query():
                return
            self._marks.popleft()
            if phase in PHASES:
                self._seconds[phase] += begin.elapsed_time(end) / 1e3 if self._on_gpu else end - begin
