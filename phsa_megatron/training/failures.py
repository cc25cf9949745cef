"""One line of JSON for each process that fails, in RUN/logs/error_rank_#####.jsonl, and the alarm for others.

Kinds: `crash` (an exception), `hang` (the watchdog saw no progress), `peer` (another process failed and this
one waited for it).
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from phsa_megatron.training.heartbeat import Heartbeat


def attempt() -> str:
    """What tells this start of a run from others; the same on all its processes."""
    names = (
        "SLURM_JOB_ID", "SLURM_RESTART_COUNT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT",
        "MASTER_ADDR", "MASTER_PORT",
    )  # fmt: skip
    return "/".join(os.environ.get(name, "") for name in names)


def main_thread_stack() -> list[str]:
    """The lines of the main thread's stack, the innermost last; from any thread."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    return [] if frame is None else traceback.format_stack(frame)


def write_line(logs_dir: Path, kind: str, heartbeat: Heartbeat, message: str, **fields: Any) -> None:
    """Append the line of a process that fails; a refusal of the disk is printed, not raised.

    Args:
        logs_dir: RUN/logs.
        kind: crash, hang or peer.
        heartbeat: where the process stands.
        message: for people.
        fields: what else is known, such as `traceback`.
    """
    record = {
        "time": time.time(),
        "kind": kind,
        **{key: value for key, value in asdict(heartbeat).items() if key != "time_unix_s"},
        "message": message,
        **fields,
    }
    try:
        logs_dir.mkdir(parents=True, exist_ok=True)
        with (logs_dir / f"error_rank_{heartbeat.rank:05d}.jsonl").open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(record, ensure_ascii=False) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as failure:
        print(f"the failure of rank {heartbeat.rank} could not be recorded: {failure}", file=sys.stderr)


@dataclass(frozen=True)
class Alarm:
    """RUN/heartbeats/alarm.json: one process failed, and the others need not wait for it.

    Attributes:
        attempt: the start that it belongs to.
        rank: who failed.
        kind: crash or hang.
        text: for people.
        time_unix_s: when.
    """

    attempt: str
    rank: int
    kind: str
    text: str
    time_unix_s: float


def raise_alarm(folder: Path, rank: int, kind: str, text: str) -> None:
    """Leave word for the other processes; a refusal of the disk leaves them to their own timeouts."""
    alarm = Alarm(attempt(), rank, kind, text, time.time())
    temporary = folder / f".alarm_{rank}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(asdict(alarm)) + "\n", encoding="utf-8")
        temporary.replace(folder / "alarm.json")
    except OSError as failure:
        print(f"rank {rank} could not raise an alarm: {failure}", file=sys.stderr)


def alarm_since(folder: Path, started_unix_s: float, rank: int) -> Alarm | None:
    """The alarm that another process of this start raised, or None."""
    try:
        values: Mapping[str, Any] = json.loads((folder / "alarm.json").read_text(encoding="utf-8"))
        alarm = Alarm(**values)
    except (OSError, ValueError, TypeError):
        return None
    ours = alarm.attempt == attempt() and alarm.rank != rank and alarm.time_unix_s >= started_unix_s
    return alarm if ours else None
