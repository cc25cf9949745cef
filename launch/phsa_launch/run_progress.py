"""How far a run is, how fast, and how much of its time went into steps that count."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from phsa_megatron.config.errors import PhsaError
from phsa_megatron.config.goodput import STEP_TIME, Goodput
from phsa_megatron.config.records import read_records
from phsa_megatron.config.run_folder import RunFolder

_RECENT_RECORDS = 50


@dataclass(frozen=True)
class Attempt:
    """One start of the job that has ended, as the batch script noted it.

    Attributes:
        job_id: Slurm's number; a requeued job keeps it.
        nodes: as Slurm writes them.
        start_unix_s: when it began.
        end_unix_s: when it ended; for a lost one, when the next one found that out.
        start_step: committed step then.
        end_step: committed step at the end.
        cause: done, time_limit, preempted, crash, node_failure, lost, bad_node, stopped, cancelled, requeued.
        exit_code: of srun.
        failures: failures in a row without progress, this one included.
        detail: nodes that were down or bad.
    """

    job_id: int
    nodes: str
    start_unix_s: int
    end_unix_s: int
    start_step: int
    end_step: int
    cause: str
    exit_code: int
    failures: int
    detail: str


@dataclass(frozen=True)
class Progress:
    """What the records of a run say.

    Attributes:
        logged_step: last step with a record; 0 before the first.
        last_record_unix_s: when the last record was written, or None.
        step_time_s: median time of the recent steps, or None.
        goodput: time in steps that count, and when the run first started; None before that.
        num_superseded_steps: recorded steps that were run again.
    """

    logged_step: int = 0
    last_record_unix_s: float | None = None
    step_time_s: float | None = None
    goodput: Goodput | None = None
    num_superseded_steps: int = 0


def read_progress(folder: RunFolder) -> Progress:
    """Read metrics.jsonl; a run that has not started has no progress."""
    if not folder.metrics_file.is_file():
        return Progress()
    records = read_records(folder.metrics_file)
    steps, times = records.series(STEP_TIME)
    return Progress(
        logged_step=steps[-1] if steps else 0,
        last_record_unix_s=records.launches[-1].last_time if records.launches else None,
        step_time_s=median(times[-_RECENT_RECORDS:]) if times else None,
        goodput=Goodput.of(records),
        num_superseded_steps=records.num_superseded_steps,
    )


def read_attempts(folder: RunFolder) -> list[Attempt]:
    """Read RUN/restarts.jsonl; none if the run was never a job.

    Raises:
        PhsaError: a line is damaged.
    """
    if not folder.restarts_file.is_file():
        return []
    attempts = []
    for number, line in enumerate(folder.restarts_file.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            fields = json.loads(line)
            fields.pop("attempt")
            attempts.append(Attempt(**fields))
        except (ValueError, TypeError, KeyError) as error:
            raise PhsaError(
                f"{folder.restarts_file}, line {number} is no attempt's record: {error}. Mend or remove it."
            ) from error
    return attempts


def attempt_start_unix_s(folder: RunFolder) -> int | None:
    """Return when the attempt began that is under way, or that nobody has closed; None if there is none."""
    try:
        return int(folder.attempt_file.read_text(encoding="utf-8").split("\t")[2])
    except (OSError, IndexError, ValueError):
        return None


@dataclass(frozen=True)
class Heartbeat:
    """A rank's last sign of life: where it was, and how long ago."""

    rank: int
    host: str
    step: int
    phase: str
    age_s: float


def read_heartbeats(folder: Path, now_unix_s: float | None = None) -> list[Heartbeat]:
    """Return the heartbeats in a folder, by rank; none if the run writes none."""
    now_unix_s = time.time() if now_unix_s is None else now_unix_s
    beats = []
    for file in folder.glob("rank_*.json"):
        try:
            fields: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            beats.append(
                Heartbeat(
                    rank=int(fields["rank"]),
                    host=str(fields["host"]),
                    step=int(fields["step"]),
                    phase=str(fields["phase"]),
                    age_s=now_unix_s - float(fields["time_unix_s"]),
                )
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise PhsaError(f"{file} is no heartbeat: {error!r}. Remove it.") from error
    return sorted(beats, key=lambda beat: beat.rank)
