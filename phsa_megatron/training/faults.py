"""Faults on order, for tests: `PHSA_FAULT=kind@step[:rank][,...]` makes a run fail where a test wants it.

Off unless the variable is set. `step` is the number of the step under way (the first step is 1); without a
rank the fault happens on every process. A fault happens once in a process.

| kind | what happens |
|---|---|
| `nan_loss` | the step's loss is multiplied by NaN before the backward pass |
| `nan_grad` | after the backward pass, the gradient of one weight in the middle of the model is NaN |
| `crash` | an exception at the start of the step |
| `sigterm` | the process sends itself SIGTERM at the start of the step |
| `sigkill` | the process kills itself at the start of the step, without a word |
| `hang_data` | the batch of the step never arrives |
"""

from __future__ import annotations

import os
import re
import signal
from dataclasses import dataclass, field

from phsa_megatron.config.errors import ConfigError

KINDS = ("nan_loss", "nan_grad", "crash", "sigterm", "sigkill", "hang_data")
VARIABLE = "PHSA_FAULT"


class InjectedFaultError(RuntimeError):
    """The exception of the `crash` fault."""


@dataclass
class Faults:
    """The faults that this process was told to have."""

    planned: set[tuple[str, int]] = field(default_factory=set)
    """(kind, step) of each fault still to come."""

    @classmethod
    def from_environment(cls, rank: int) -> Faults:
        """Returns the faults that PHSA_FAULT names for this rank; none if the variable is not set.

        Raises:
            ConfigError: the variable is set to something that is not a list of known faults.
        """
        planned = set()
        for spec in filter(None, os.environ.get(VARIABLE, "").split(",")):
            match = re.fullmatch(r"(\w+)@([1-9]\d*)(?::(\d+))?", spec.strip())
            if match is None or match[1] not in KINDS:
                raise ConfigError(
                    f"{VARIABLE}={spec!r}: a fault is kind@step or kind@step:rank, with step at least 1 and "
                    f"kind one of {', '.join(KINDS)}. Unset {VARIABLE} for a run without faults."
                )
            if match[3] is None or int(match[3]) == rank:
                planned.add((match[1], int(match[2])))
        return cls(planned)

    def happens(self, kind: str, step: int) -> bool:
        """Returns whether the fault is due now, and strikes it off."""
        due = (kind, step) in self.planned
        self.planned.discard((kind, step))
        return due

    def at_step_start(self, step: int) -> None:
        """Has the faults that hit the process itself.

        Raises:
            InjectedFaultError: a `crash` is due.
        """
        if self.happens("sigterm", step):
            os.kill(os.getpid(), signal.SIGTERM)
        if self.happens("sigkill", step):
            os.kill(os.getpid(), signal.SIGKILL)
        if self.happens("crash", step):
            raise InjectedFaultError(f"injected crash at step {step}")
