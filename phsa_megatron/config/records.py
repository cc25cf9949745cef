"""Reading `metrics.jsonl`: what counts after restarts, and what a torn last line means.

The file holds one JSON object a line, in the order they were written:

    {"step": 20, "time": 1764000000.0, "values": {"train/loss_nats": 5.1}}     values at a step
    {"event": "checkpoint_committed", "time": 1764000000.0, "step": 20, ...}   something that happened

It is only ever appended to. A launch starts with a `start` event; what the launch logs at step s supersedes
every value that earlier launches logged at step s or later: those steps were run again after the resume.
Superseded records stay in the file, for whoever asks what the killed attempt saw.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from phsa_megatron.config.errors import DataError

START_EVENT = "start"
NON_FINITE = {"NaN": float("nan"), "Infinity": float("inf"), "-Infinity": float("-inf")}
"""JSON has no such numbers, so they are written as these strings."""


@dataclass(frozen=True)
class Event:
    """Something that happened: kind, time in seconds since 1970, step if there is one, other fields."""

    kind: str
    time: float
    step: int | None
    fields: dict[str, Any]


@dataclass
class Launch:
    """One start of the run: when its first and last records were written, its first and last logged step."""

    start_time: float
    last_time: float
    first_step: int | None = None
    last_step: int | None = None


@dataclass
class Records:
    """A metrics file after superseding."""

    values_by_step: dict[int, dict[str, float]] = field(default_factory=dict)
    """Metric values by step, steps ascending."""
    time_by_step: dict[int, float] = field(default_factory=dict)
    """When a step's last record was written, seconds since 1970."""
    events: list[Event] = field(default_factory=list)
    """All events of all launches in the order they happened."""
    launches: list[Launch] = field(default_factory=list)
    """The starts of the run, in order."""
    num_superseded_steps: int = 0
    """Recorded steps that a later launch ran again."""

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """Return the steps at which `name` was recorded and its values."""
        steps = [step for step, values in self.values_by_step.items() if name in values]
        return steps, [self.values_by_step[step][name] for step in steps]

    def names(self) -> list[str]:
        """Return every metric name that occurs, in the order of first occurrence."""
        return list(dict.fromkeys(name for values in self.values_by_step.values() for name in values))

    def last(self, name: str) -> float | None:
        """Return the value of `name` at the last step that has one."""
        _, values = self.series(name)
        return values[-1] if values else None

    def events_of(self, kind: str) -> list[Event]:
        """Return the events of one kind."""
        return [event for event in self.events if event.kind == kind]


def read_records(path: Path) -> Records:
    """Read a metrics file, finished or still being written.

    Args:
        path: `metrics.jsonl` of a run folder.

    Returns:
        What counts: see the module's page. A last line without a line end is still being written (or was
        torn by a kill) and is left out.

    Raises:
        DataError: The file is missing, or a complete line is not a record.
    """
    records = Records()
    earlier_steps: list[int] = []
    for number, line in enumerate(_complete_lines(path), start=1):
        record = _parse(path, number, line)
        if record.get("event") == START_EVENT or not records.launches:
            earlier_steps = sorted(records.values_by_step)
            records.launches.append(Launch(record["time"], record["time"]))
        records.launches[-1].last_time = record["time"]
        if "event" in record:
            records.events.append(_event(record))
        else:
            _take_values(records, record, earlier_steps)
    records.values_by_step = dict(sorted(records.values_by_step.items()))
    return records


@dataclass(frozen=True)
class LoggedRow:
    """What one call logged: the step and its values, not finite ones as floats."""

    step: int
    values: dict[str, Any]


def read_launches(path: Path) -> list[list[LoggedRow]]:
    """Read what each launch logged, in order, superseded or not.

    Raises:
        DataError: The file is missing, or a complete line is not a record.
    """
    launches: list[list[LoggedRow]] = []
    for number, line in enumerate(_complete_lines(path), start=1):
        record = _parse(path, number, line)
        if record.get("event") == START_EVENT or not launches:
            launches.append([])
        if "event" not in record:
            values = {name: NON_FINITE.get(value, value) for name, value in record["values"].items()}
            launches[-1].append(LoggedRow(record["step"], values))
    return launches


def _complete_lines(path: Path) -> list[bytes]:
    try:
        return path.read_bytes().split(b"\n")[:-1]
    except FileNotFoundError as error:
        raise DataError(
            f"{path} does not exist: no metrics were recorded there. Is it a run folder?"
        ) from error


def _take_values(records: Records, record: dict[str, Any], earlier_steps: list[int]) -> None:
    """Merge one values record, dropping what earlier launches logged at its step or later.

    Args:
        records: What was read so far.
        record: The record.
        earlier_steps: Steps that only earlier launches logged, ascending; shortened by what is dropped.
    """
    step, launch = record["step"], records.launches[-1]
    while earlier_steps and earlier_steps[-1] >= step:
        stale = earlier_steps.pop()
        del records.values_by_step[stale], records.time_by_step[stale]
        records.num_superseded_steps += 1
    if launch.first_step is None:
        launch.first_step = step
    launch.last_step = step
    values = {name: NON_FINITE.get(value, value) for name, value in record["values"].items()}
    records.values_by_step.setdefault(step, {}).update(values)
    records.time_by_step[step] = record["time"]


def _event(record: dict[str, Any]) -> Event:
    fields = {key: value for key, value in record.items() if key not in {"event", "time", "step"}}
    return Event(record["event"], record["time"], record.get("step"), fields)


def _parse(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise DataError(
            f"{path}, line {number} is not JSON ({error}): the file is damaged. Mend or remove it."
        ) from error
    is_values = isinstance(record, dict) and {"step", "values"} <= record.keys()
    if not (isinstance(record, dict) and "time" in record and (is_values or "event" in record)):
        raise DataError(
            f"{path}, line {number} is JSON but no metrics record: {line[:80]!r}. Mend or remove it."
        )
    return record
