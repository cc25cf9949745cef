"""Where this process is: step and phase, for the watchdog, for heartbeats and for the record of a failure."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from phsa_megatron.training.faults import Faults

PHASES = (
    "start", "build", "load", "data", "forward", "backward", "optimizer", "log", "evaluate", "checkpoint",
    "finish", "end",
)  # fmt: skip


@dataclass
class Progress:
    """Kept up to date by the main thread, read by others.

    Attributes:
        step: number of the step under way; 0 before the first.
        phase: one of `PHASES`.
        detail: what it waits for, where the phase does not say it.
        stage: pipeline stage of this process, once it is known.
        num_steps_done: steps that this process has made.
        moved_s: when it last moved on, by the monotonic clock.
        faults: injected faults, which happen at the phase they name.
        on_move: called whenever it moves on, in the main thread.
        on_enter: called with each phase that it enters, before the faults of that phase.
        on_stall: called by the watchdog's thread, with a text, when nothing has moved for long.
        entered_s: when the phase began, by the monotonic clock.
    """

    step: int = 0
    phase: str = "start"
    detail: str = ""
    stage: int = 0
    num_steps_done: int = 0
    moved_s: float = field(default_factory=time.monotonic)
    faults: Faults = field(default_factory=Faults)
    on_move: list[Callable[[], None]] = field(default_factory=list)
    on_enter: list[Callable[[str], None]] = field(default_factory=list)
    on_stall: list[Callable[[str], None]] = field(default_factory=list)
    entered_s: float = field(default_factory=time.monotonic)

    def enter(self, phase: str, *, step: int | None = None) -> None:
        """Moves on to a phase, and has the injected faults that are due there.

        Args:
            phase: one of `PHASES`.
            step: number of the step under way, where it changes.
        """
        if step is not None:
            self.step = step
        self.phase, self.detail = phase, ""
        self.entered_s = time.monotonic()
        self.moved()
        for listener in self.on_enter:
            listener(phase)
        if self.faults.planned:
            self.faults.enter(self.step, phase)

    def moved(self) -> None:
        """Says that this process is alive and moved on within its phase."""
        self.moved_s = time.monotonic()
        for listener in self.on_move:
            listener()

    def step_done(self) -> None:
        """Counts a step that is made."""
        self.num_steps_done += 1
        self.enter("log")
