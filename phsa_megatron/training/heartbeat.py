"""RUN/heartbeats/rank_#.json: where every process is, and what a reader makes of all of them.

A thread of the process writes its file every few seconds, whether or not the main thread moves: a file that
is fresh but says that nothing moved is a process that hangs; an old file is a process or a host that is gone.
"""

from __future__ import annotations

import json
import os
import socket
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from phsa_megatron.parallel import collective_trace
from phsa_megatron.training.progress import Progress

_MAX_LINES = 16
"""Processes told of one by one; what is wrong with a thousand is the same for most of them."""


@dataclass(frozen=True)
class Heartbeat:
    """The content of a heartbeat file."""

    rank: int
    """Number of the process."""
    host: str
    """Where it runs."""
    node_rank: int
    """Number of the node among those of the run."""
    pid: int
    """Its process id there."""
    step: int
    """Number of the step under way; 0 before the first."""
    phase: str
    """start, build, load, data, forward, backward, optimizer, log, evaluate, checkpoint, finish or end."""
    detail: str
    """What it waits for, where the phase does not say it."""
    last_collective: str
    """Name, number and shape of the last collective, and whether it has returned."""
    collective_number: int
    """How many collectives it has begun."""
    in_collective: bool
    """Whether the main thread is inside of one; false also where it waits for one that runs aside."""
    stage: int
    """Its pipeline stage: processes of one stage begin the same collectives."""
    still_s: float
    """Seconds since the main thread last moved on."""
    time_unix_s: float
    """When this was written, by the clock of its host."""

    @classmethod
    def of(cls, progress: Progress, rank: int, node_rank: int) -> Heartbeat:
        """What this process would write now."""
        return cls(
            rank=rank,
            host=socket.gethostname(),
            node_rank=node_rank,
            pid=os.getpid(),
            step=progress.step,
            phase=progress.phase,
            detail=progress.detail,
            last_collective=collective_trace.last(),
            collective_number=collective_trace.number(),
            in_collective=collective_trace.is_running(),
            stage=progress.stage,
            still_s=round(time.monotonic() - progress.moved_s, 3),
            time_unix_s=time.time(),
        )

    def place(self) -> str:
        """The process for people: number and host."""
        return f"rank {self.rank} ({self.host})"

    def where(self) -> str:
        """Where it stands, for people."""
        collective = f", last collective {self.last_collective}" if self.last_collective else ""
        detail = f", {self.detail}" if self.detail else ""
        return f"step {self.step}, phase {self.phase}{detail}, still for {self.still_s:.0f} s{collective}"


def file_of(folder: Path, rank: int) -> Path:
    """The heartbeat file of a process."""
    return folder / f"rank_{rank}.json"


def write(folder: Path, heartbeat: Heartbeat) -> None:
    """Replace a process's file; a reader sees the old one or the new one.

    Raises:
        OSError: the disk refused.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = file_of(folder, heartbeat.rank)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(asdict(heartbeat)) + "\n", encoding="utf-8")
    temporary.replace(path)


def read(folder: Path, world_size: int) -> dict[int, Heartbeat]:
    """The heartbeats of a run's processes; those without a readable file are left out."""
    found = {}
    for rank in range(world_size):
        try:
            found[rank] = Heartbeat(**json.loads(file_of(folder, rank).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            continue
    return found


def is_fresh(heartbeat: Heartbeat, now_unix_s: float, stale_after_s: float) -> bool:
    """Whether the process that wrote it was alive a moment ago."""
    return now_unix_s - heartbeat.time_unix_s <= stale_after_s


def diagnose(
    heartbeats: dict[int, Heartbeat], world_size: int, now_unix_s: float, stale_after_s: float
) -> list[str]:
    """Who is missing or behind, a line each, the likeliest cause first.

    Args:
        heartbeats: as `read` returns them.
        world_size: number of processes.
        now_unix_s: the time to compare theirs with.
        stale_after_s: a process whose heartbeat is older is gone.
    """
    fresh = {r: beat for r, beat in heartbeats.items() if is_fresh(beat, now_unix_s, stale_after_s)}
    lines = []
    for rank in sorted(set(range(world_size)) - set(fresh)):
        lines.append(_missing(rank, heartbeats.get(rank), now_unix_s))
    behind = _behind(fresh)
    lines += [f"behind: {beat.place()} at {beat.where()}" for beat in behind]
    waiting = [beat for rank, beat in sorted(fresh.items()) if beat not in behind]
    if not lines:
        lines.append("nobody is missing or behind: all processes wait, so look at what they wait in")
        lines += [f"waits: {beat.place()} at {beat.where()}" for beat in waiting]
    elif waiting:
        ranks = ", ".join(str(beat.rank) for beat in waiting[:_MAX_LINES])
        more = f" and {len(waiting) - _MAX_LINES} more" if len(waiting) > _MAX_LINES else ""
        lines.append(f"waiting for them: ranks {ranks}{more}; rank {waiting[0].rank} at {waiting[0].where()}")
    if len(lines) > _MAX_LINES:
        lines = [*lines[:_MAX_LINES], f"and {len(lines) - _MAX_LINES} more lines like these"]
    return lines


def _missing(rank: int, last: Heartbeat | None, now_unix_s: float) -> str:
    if last is None:
        return f"missing: rank {rank} left no heartbeat: it never started, or cannot write to the run folder"
    return (
        f"missing: {last.place()}, no heartbeat for {now_unix_s - last.time_unix_s:.0f} s: killed, or its "
        f"host is gone; it was at {last.where()}"
    )


def _behind(fresh: dict[int, Heartbeat]) -> list[Heartbeat]:
    """Processes at an earlier step or with fewer collectives than their like, the furthest behind first."""
    beats = [beat for _, beat in sorted(fresh.items())]
    furthest = max((beat.step for beat in beats), default=0)
    behind = [beat for beat in beats if beat.step < furthest]
    if behind:
        return behind
    late = [beat for beat in beats if beat.detail == "waits for its own batch"]
    if late and len(late) < len(beats):
        return late
    most: dict[int, int] = {}
    for beat in beats:
        most[beat.stage] = max(most.get(beat.stage, 0), beat.collective_number)
    fewer = [beat for beat in beats if beat.collective_number < most[beat.stage]]
    if fewer:
        return sorted(fewer, key=lambda beat: beat.collective_number - most[beat.stage])
    outside = [beat for beat in beats if not beat.in_collective]
    return outside if 0 < len(outside) < len(beats) else []
