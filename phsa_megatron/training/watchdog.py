"""A thread that writes this process's heartbeat and ends a process that hangs, or waits for one that failed.

What a hang is depends on the phase (`health.*_timeout_s`). Before a process ends it leaves its line in
RUN/logs, with the main thread's stack, and an alarm that lets the others leave theirs; the lowest process
that lives prints who is missing or behind. The end is `os._exit`: nothing that hangs can hold it up.

If Python itself cannot run (an extension holds the interpreter's lock), faulthandler's own thread, which
needs no lock, writes all stacks to RUN/logs/stacks_rank_#####.txt and ends the process with code 1.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import TextIO

import psutil

from phsa_megatron.config.exit_codes import HUNG, PEER_FAILED
from phsa_megatron.config.run_folder import RunFolder
from phsa_megatron.config.schema import TrainConfig
from phsa_megatron.config.schema_health import HealthConfig
from phsa_megatron.training import failures, heartbeat
from phsa_megatron.training.heartbeat import Heartbeat
from phsa_megatron.training.progress import Progress

_LONG_PHASES = ("checkpoint", "evaluate", "finish", "end")
_FIRST_PHASES = ("build", "load")
CRASH_GRACE_S = 15.0
"""A process whose peer crashed usually fails by itself in this time, and then says more."""


def allowed_s(health: HealthConfig, progress: Progress) -> tuple[str, float]:
    """The setting that says how long a process may stay where it is, and its value in seconds."""
    if progress.phase in _LONG_PHASES:
        name = "long_phase_timeout_s"
    elif progress.phase == "start":
        # The others may wait for a late one for as long; the start itself takes some seconds.
        return "start_timeout_s", health.start_timeout_s + health.first_step_timeout_s
    elif progress.phase in _FIRST_PHASES or progress.num_steps_done == 0:
        name = "first_step_timeout_s"
    elif progress.phase == "data":
        name = "data_timeout_s"
    else:
        name = "step_timeout_s"
    return name, float(getattr(health, name))


class Watchdog:
    """Watches over one training process; a context manager.

    Args:
        config: the run's settings.
        progress: of this process.
        rank: its number.
        world_size: how many there are.
    """

    def __init__(self, config: TrainConfig, progress: Progress, rank: int, world_size: int) -> None:
        self._health = config.health
        self._folder = RunFolder.of(config)
        self._progress = progress
        self._rank, self._world_size = rank, world_size
        default = rank // config.cluster.processes_per_node
        self._node_rank = int(os.environ.get("GROUP_RANK", default))
        # Not now: imports take seconds, in which a faster process may already have failed.
        self._started_unix_s = psutil.Process().create_time()
        self._closing = threading.Event()
        self._telling = threading.Lock()
        self._stall_frac = config.monitoring.alerts.stall_frac
        self._stall_told_of_s = 0.0
        self._told = False
        self._stacks: TextIO | None = None
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        if self._health.watchdog:
            self._arm_faulthandler()  # before anything can keep the thread from it
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._thread.join(timeout=self._health.heartbeat_every_s)
        faulthandler.cancel_dump_traceback_later()
        self._remove_empty_stacks()

    def crashed(self, error: BaseException) -> None:
        """Leaves the line of an exception that ends this process, and an alarm for the others."""
        text = f"{type(error).__name__}: {error}"
        if self._tell("crash", str(error), error=type(error).__name__,
                      traceback=traceback.format_exception(error)):  # fmt: skip
            self._alarm("crash", text)

    def _tell(self, kind: str, message: str, **fields: object) -> bool:
        """Writes this process's line, once; returns whether it was this time."""
        with self._telling:
            if self._told:
                return False
            self._told = True
            failures.write_line(self._folder.logs_dir, kind, self._heartbeat(), message, **fields)
            return True

    def _alarm(self, kind: str, text: str) -> None:
        if self._world_size > 1:
            failures.raise_alarm(self._folder.heartbeats_dir, self._rank, kind, text)

    def _heartbeat(self) -> Heartbeat:
        return Heartbeat.of(self._progress, self._rank, self._node_rank)

    def _beat(self) -> None:
        # A disk that refuses must not end a run that can go on without heartbeats.
        with suppress(OSError):
            heartbeat.write(self._folder.heartbeats_dir, self._heartbeat())

    def _watch(self) -> None:
        every_s, last_look_s = self._health.heartbeat_every_s, time.monotonic()
        while True:
            self._beat()
            if self._health.watchdog:
                self._arm_faulthandler()
            closing = self._closing.wait(every_s)
            if closing:
                self._beat()
                return
            now_s = time.monotonic()
            if now_s - last_look_s > 10 * every_s + 30:
                # This thread slept too: the whole process was stopped, which is nobody's hang.
                self._progress.moved_s = max(self._progress.moved_s, now_s)
            last_look_s = now_s
            self._tell_of_stall(now_s)
            if self._health.watchdog:
                self._look(now_s)

    def _tell_of_stall(self, now_s: float) -> None:
        """Tells once, before the time is up, that nothing moves: `monitoring.alerts.stall_frac` of it."""
        name, limit_s = allowed_s(self._health, self._progress)
        moved_s = self._progress.moved_s
        if now_s - moved_s > self._stall_frac * limit_s and moved_s != self._stall_told_of_s:
            self._stall_told_of_s = moved_s
            text = (
                f"no progress for {now_s - moved_s:.0f} s at {self._heartbeat().where()}; health.{name} "
                f"allows {limit_s:.0f} s"
            )
            for listener in self._progress.on_stall:
                listener(text)

    def _look(self, now_s: float) -> None:
        name, limit_s = allowed_s(self._health, self._progress)
        still_s = now_s - self._progress.moved_s
        if still_s > limit_s:
            self._end_hung(
                f"no progress for {still_s:.0f} s at {self._heartbeat().where()}; health.{name} allows "
                f"{limit_s:.0f} s"
            )
        alarm = failures.alarm_since(self._folder.heartbeats_dir, self._started_unix_s, self._rank)
        if alarm is None:
            return
        if alarm.kind == "hang":
            self._end_hung(f"rank {alarm.rank} hung: {alarm.text}", raise_alarm=False)
        # The main thread may be about to end with an error of its own.
        if not self._closing.wait(CRASH_GRACE_S):
            message = f"rank {alarm.rank} failed ({alarm.text}), and this process waited for it"
            self._tell("peer", message, stack=failures.main_thread_stack())
            print(f"rank {self._rank}: {message}", file=sys.stderr, flush=True)
            self._remove_empty_stacks()
            os._exit(PEER_FAILED)

    def _end_hung(self, message: str, *, raise_alarm: bool = True) -> None:
        self._tell("hang", message, stack=failures.main_thread_stack())
        self._beat()
        if raise_alarm:
            self._alarm("hang", message)
        # Long enough for the others to see the alarm and to leave their line and a last heartbeat.
        if self._world_size > 1:
            time.sleep(2.5 * self._health.heartbeat_every_s)
        now_s, stale_after_s = time.time(), 4 * self._health.heartbeat_every_s + 5
        beats = heartbeat.read(self._folder.heartbeats_dir, self._world_size)
        alive = [rank for rank, beat in beats.items() if heartbeat.is_fresh(beat, now_s, stale_after_s)]
        lines = [f"rank {self._rank}: {message}"]
        if self._rank == min(alive, default=self._rank):
            lines += heartbeat.diagnose(beats, self._world_size, now_s, stale_after_s)
        print("\n".join(lines), file=sys.stderr, flush=True)
        self._remove_empty_stacks()
        os._exit(HUNG)

    def _remove_empty_stacks(self) -> None:
        if self._stacks is not None:
            with suppress(OSError):
                path = Path(self._stacks.name)
                if path.stat().st_size == 0:
                    path.unlink()

    def _arm_faulthandler(self) -> None:
        """Postpones faulthandler's end of the process, from which it is clear that this thread can run."""
        if self._stacks is None:
            path = self._folder.logs_dir / f"stacks_rank_{self._rank:05d}.txt"
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                self._stacks = path.open("a", encoding="utf-8")
            except OSError:
                return
        longest_s = max(
            self._health.first_step_timeout_s, self._health.step_timeout_s, self._health.long_phase_timeout_s
        )
        faulthandler.dump_traceback_later(longest_s, exit=True, file=self._stacks)
