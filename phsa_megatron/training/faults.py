"""Faults on order: `PHSA_FAULT=KIND@rank=R,step=N,phase=P` makes a run fail where a test wants it.

Off unless the variable is set; several faults are separated by `;`. `step` is the number of the step under
way (the first is 1; the phase start has none). Without a rank the fault happens on every process, without a
phase at the start of the step (`data`). A fault happens once in a run folder, however often the run is
started: RUN/faults.jsonl gets its line, synced to disk, just before. `times=3` lets three starts have it.

| kind | what happens |
|---|---|
| `crash` | an exception |
| `kill` | the process kills itself with SIGKILL, without a word |
| `exit` | the process ends at once with code 1 (`code=`), without a word |
| `hang` | the main thread sleeps for ever |
| `slow` | the main thread sleeps for 5 s (`seconds=`) |
| `sigterm` | the process sends itself SIGTERM |
| `hang_data` | the batch of the step never arrives; needs a step and takes no phase, like the next two |
| `nan_loss` | the step's loss is multiplied by NaN before the backward pass |
| `nan_grad` | after the backward pass, the gradient of one weight in the middle of the model is NaN |

Phases: start, data, forward, backward, optimizer, checkpoint, evaluate.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from phsa_megatron.config.errors import ConfigError

PHASES = ("start", "data", "forward", "backward", "optimizer", "checkpoint", "evaluate")
AT_A_PHASE = ("crash", "kill", "exit", "hang", "slow", "sigterm")
WITHIN_A_STEP = ("hang_data", "nan_loss", "nan_grad")
KINDS = AT_A_PHASE + WITHIN_A_STEP
VARIABLE = "PHSA_FAULT"
_NUMBERS = {"rank": 0, "step": 0, "times": 1, "code": 1, "seconds": 0}
"""What a fault may say in numbers, and the smallest value of each."""


class InjectedFaultError(RuntimeError):
    """The exception of the `crash` fault."""


@dataclass(frozen=True)
class Fault:
    """One fault of the variable.

    Attributes:
        text: as it was written; it identifies the fault in RUN/faults.jsonl.
        kind: see the module's page.
        step: number of the step; 0 in the phase start.
        phase: where in the step; empty for the kinds that have their own place.
        code: of `exit`.
        seconds: of `slow`.
    """

    text: str
    kind: str
    step: int
    phase: str
    code: int = 1
    seconds: int = 5


@dataclass
class Faults:
    """The faults that this process was told to have.

    Attributes:
        planned: those still to come.
        rank: number of this process.
        file: RUN/faults.jsonl; None keeps no record.
    """

    planned: list[Fault] = field(default_factory=list)
    rank: int = 0
    file: Path | None = None

    @classmethod
    def from_environment(cls, rank: int, file: Path | None = None) -> Faults:
        """Returns the faults that PHSA_FAULT names for this rank and that have not happened yet.

        Raises:
            ConfigError: the variable is set to something that is not a list of known faults.
        """
        planned = []
        for spec in filter(None, (part.strip() for part in os.environ.get(VARIABLE, "").split(";"))):
            fault, wanted_rank, times = _parse(spec)
            if wanted_rank in (None, rank) and _num_happened(file, spec, rank) < times:
                planned.append(fault)
        return cls(planned, rank, file)

    def happens(self, kind: str, step: int) -> bool:
        """Returns whether a fault within the step is due now, records it and strikes it off."""
        return any(self._due(kind, step, ""))

    def enter(self, step: int, phase: str) -> None:
        """Has the faults that are due at a phase of a step.

        Raises:
            InjectedFaultError: a `crash` is due.
        """
        for kind in AT_A_PHASE:
            for fault in self._due(kind, step, phase):
                _happen(fault)

    def _due(self, kind: str, step: int, phase: str) -> Iterator[Fault]:
        for fault in [f for f in self.planned if (f.kind, f.step, f.phase) == (kind, step, phase)]:
            self.planned.remove(fault)
            self._record(fault)
            yield fault

    def _record(self, fault: Fault) -> None:
        """Puts the fault on the disk: what follows may not leave time for it."""
        if self.file is None:
            return
        record = {
            "fault": fault.text,
            "rank": self.rank,
            "kind": fault.kind,
            "step": fault.step,
            "phase": fault.phase,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "time_unix_s": time.time(),
        }
        self.file.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, (json.dumps(record) + "\n").encode())
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _happen(fault: Fault) -> None:
    if fault.kind == "crash":
        raise InjectedFaultError(f"injected crash: {fault.text}")
    if fault.kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault.kind == "exit":
        os._exit(fault.code)
    if fault.kind == "sigterm":
        os.kill(os.getpid(), signal.SIGTERM)
    if fault.kind == "slow":
        time.sleep(fault.seconds)
    while fault.kind == "hang":
        time.sleep(3600.0)


def _num_happened(file: Path | None, spec: str, rank: int) -> int:
    """How often a fault happened on a rank of this run."""
    if file is None or not file.exists():
        return 0
    records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line]
    return sum((record["fault"], record["rank"]) == (spec, rank) for record in records)


def _parse(spec: str) -> tuple[Fault, int | None, int]:
    """The fault, the rank it is for (None: all), and how often it happens."""
    kind, _, text = spec.partition("@")
    values: dict[str, str] = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        name, equals, value = part.partition("=")
        if not equals or name in values or name not in (*_NUMBERS, "phase"):
            raise _refused(spec, f"{part!r} is not one of rank=, step=, phase=, times=, code= or seconds=")
        values[name] = value
    if kind not in KINDS:
        raise _refused(spec, f"kind {kind!r} is not one of {', '.join(KINDS)}")
    numbers = {}
    for name in _NUMBERS.keys() & values.keys():
        if not values[name].isdecimal() or int(values[name]) < _NUMBERS[name]:
            raise _refused(spec, f"{name}={values[name]} is not a whole number from {_NUMBERS[name]} on")
        numbers[name] = int(values[name])
    phase = values.get("phase", "data" if kind in AT_A_PHASE else "")
    if kind in WITHIN_A_STEP and phase:
        raise _refused(spec, f"{kind} has its own place in a step and takes no phase; leave it out")
    if kind in AT_A_PHASE and phase not in PHASES:
        raise _refused(spec, f"phase={phase} is not one of {', '.join(PHASES)}")
    step = numbers.get("step", 0)
    if (step == 0) != (phase == "start"):
        raise _refused(spec, f"step={step} with phase={phase}: steps count from 1, and only start has none")
    fault = Fault(spec, kind, step, phase, numbers.get("code", 1), numbers.get("seconds", 5))
    return fault, numbers.get("rank"), numbers.get("times", 1)


def _refused(spec: str, rule: str) -> ConfigError:
    return ConfigError(
        f"{VARIABLE}={spec!r}: {rule}. Write KIND@rank=R,step=N,phase=P, several separated by ';', such as "
        f"crash@rank=1,step=3,phase=backward, or unset {VARIABLE} for a run without faults."
    )
