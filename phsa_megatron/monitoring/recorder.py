"""Writes what a run measures and what happens to it: `metrics.jsonl`, and W&B fed from the same calls."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from phsa_megatron.config.code_snapshot import write_code_snapshot
from phsa_megatron.config.derive import Derived
from phsa_megatron.config.errors import TrainingError
from phsa_megatron.config.run_folder import RunFolder
from phsa_megatron.config.schema import TrainConfig
from phsa_megatron.monitoring.alerts import Alert
from phsa_megatron.monitoring.metrics import lookup
from phsa_megatron.monitoring.records import START_EVENT, read_launches
from phsa_megatron.monitoring.tensorboard_writer import TensorBoardWriter
from phsa_megatron.monitoring.wandb_run import WandbRun, start_wandb

_RECORDED_PACKAGES = (
    "phsa-megatron",
    "torch",
    "megatron-core",
    "triton",
    "transformer-engine",
    "numpy",
    "tokenizers",
)


class Recorder:
    """The one place metrics and events go through; only rank 0 writes.

    Every record is handed to the operating system before the call returns, so a killed process loses none. A
    record that cannot be written (a full disk, a folder that is gone) raises `TrainingError`: a run whose
    numbers are lost could not save its weights either, and nobody would see it go wrong. W&B never raises
    once it has started.
    """

    def __init__(self, folder: RunFolder, config: TrainConfig, derived: Derived, *, rank: int) -> None:
        """Open the files, append a `start` event with environment and code, and start W&B.

        RUN/code gets the code as this launch finds it, and so does W&B.

        Args:
            folder: The run folder; it exists.
            config: The resolved configuration.
            derived: The derived values, uploaded to W&B beside the configuration.
            rank: Global rank of this process; any rank but 0 checks names and writes nothing.

        Raises:
            TrainingError: The metrics file cannot be written.
            DeviceError: W&B is asked for and not installed, or online without a login.
        """
        self._path = folder.metrics_file
        self._descriptor: int | None = None
        self._wandb: WandbRun | None = None
        self._tensorboard: TensorBoardWriter | None = None
        if rank != 0:
            return
        earlier = read_launches(self._path) if self._path.is_file() else []
        self._wandb = start_wandb(config, derived, folder.wandb_dir, len(earlier) + 1)
        if config.monitoring.tensorboard:
            self._tensorboard = TensorBoardWriter(folder.tensorboard_dir)
        self._descriptor, torn_bytes = _open_for_append(self._path)
        torn = {"torn_bytes_removed": torn_bytes} if torn_bytes else {}
        code = _snapshot(folder.code_dir)
        if self._wandb is not None:
            self._wandb.code(code, folder.code_dir)
        self.event(START_EVENT, environment=environment(), code=code, **torn)

    def log(self, step: int, values: dict[str, float]) -> None:
        """Record values at a step.

        Args:
            step: Optimizer steps done; the same step may be logged in several calls, whose values are merged.
            values: Python numbers by metric name. They are written so that reading gives the same bits.

        Raises:
            ValueError: A name is not in the metrics table.
            TypeError: A value is not a Python number; a tensor must be brought to the host by who logs it.
            TrainingError: The record cannot be written.
        """
        for name, value in values.items():
            lookup(name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"metric {name!r} must be a Python int or float, got {type(value).__name__}")
        if self._descriptor is None:
            return
        written = {name: _json_number(value) for name, value in values.items()}
        self._append({"step": step, "time": time.time(), "values": written})
        if self._wandb is not None:
            self._wandb.log(step, values)
        if self._tensorboard is not None:
            self._tensorboard.log(step, values)

    def event(self, kind: str, /, *, step: int | None = None, **fields: Any) -> None:
        """Record that something happened.

        Args:
            kind: What happened. The report knows `start`, `resume`, `checkpoint_requested`,
                `checkpoint_committed`, `stop_request`, `evaluation`, `baselines` (`unigram_entropy_nats`,
                `bigram_entropy_nats`), `sample` (`prompt`, `text`), `alert` (`alert`, `text`, `file`),
                `error` (`text`) and `end` (`reason`), and lists any other kind with its fields.
            step: Optimizer steps done at that moment, if there is such a number.
            **fields: JSON values.

        Raises:
            TypeError: A field is not a JSON value.
            ValueError: A field is called `event` or `time`, which every event has.
            TrainingError: The record cannot be written.
        """
        if taken := fields.keys() & {"event", "time"}:
            raise ValueError(
                f"an event's field cannot be called {', '.join(sorted(taken))}: every event has its own"
            )
        if self._descriptor is None:
            return
        where = {} if step is None else {"step": step}
        self._append({"event": kind, "time": time.time(), **where, **fields})

    def histogram(self, step: int, name: str, shares: list[float], edges: list[float]) -> None:
        """Send a histogram to W&B; `metrics.jsonl` has its shares as values of their own.

        Args:
            step: Optimizer steps done.
            name: In the metrics table.
            shares: Of each bin.
            edges: Of the bins: one more than shares.

        Raises:
            ValueError: The name is not in the metrics table, or edges do not fit.
        """
        lookup(name)
        if len(edges) != len(shares) + 1:
            raise ValueError(f"histogram {name!r}: {len(shares)} bins have {len(edges)} edges")
        if self._wandb is not None:
            self._wandb.histogram(step, name, shares, edges)

    def samples(self, step: int, samples: list[dict[str, str]]) -> None:
        """Record continuations of prompts, as events, and as one table in W&B.

        Args:
            step: Optimizer steps done.
            samples: `prompt` and `text` of each.
        """
        for sample in samples:
            self.event("sample", step=step, **sample)
        if self._wandb is not None:
            rows = [[step, sample["prompt"], sample["text"]] for sample in samples]
            self._wandb.table(step, "samples", ["step", "prompt", "text"], rows)

    def alert(self, alert: Alert, file: str | None) -> None:
        """Record an alert as an event, and send it to W&B; from any thread, and without ever raising.

        Args:
            alert: what happened.
            file: where its details are.
        """
        with suppress(TrainingError):
            self.event("alert", step=alert.step, alert=alert.kind, text=alert.text, file=file)
        if self._wandb is not None:
            self._wandb.alert(alert.kind, alert.text)

    def close(self) -> None:
        """Close the file and finish the W&B run; calling it again does nothing."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
        if self._wandb is not None:
            self._wandb.close()
            self._wandb = None
        if self._tensorboard is not None:
            self._tensorboard.close()
            self._tensorboard = None

    def _append(self, record: dict[str, Any]) -> None:
        """Write one line with one system call, so that a reader never sees two records mixed."""
        assert self._descriptor is not None
        line = (json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n").encode()
        written = 0
        try:
            while written < len(line):  # A nearly full disk takes a part; the next write then says why.
                written += os.write(self._descriptor, line[written:])
        except OSError as error:
            if written:  # Leave no half record: a later event, or the next launch, appends after it.
                os.ftruncate(self._descriptor, os.fstat(self._descriptor).st_size - written)
            raise _write_error(self._path, error) from error


def _snapshot(code_dir: Path) -> str:
    """Write RUN/code; return it in one line."""
    try:
        return write_code_snapshot(code_dir)
    except OSError as error:
        raise _write_error(code_dir, error) from error


def environment() -> dict[str, Any]:
    """Return where this process runs: host, system, Python, the packages that shape the numbers."""
    packages: dict[str, str | None] = {}
    for name in _RECORDED_PACKAGES:
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            packages[name] = None
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "command": sys.argv,
        "num_cpus": os.cpu_count(),
        "packages": packages,
    }


def _json_number(value: float) -> float | str:
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "Infinity" if value > 0 else "-Infinity"
    return value


def _open_for_append(path: Path) -> tuple[int, int]:
    """Open the metrics file at its end, first cutting off a last line that a kill left unfinished.

    Returns:
        The file descriptor and the number of bytes cut off.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torn_bytes = _cut_torn_line(path) if path.is_file() else 0
        return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644), torn_bytes
    except OSError as error:
        raise _write_error(path, error) from error


def _cut_torn_line(path: Path) -> int:
    """Cut the file after its last line end, reading backwards so that a long file costs nothing."""
    chunk_bytes = 1 << 16
    with path.open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        keep = position = size
        while position > 0:
            start = max(0, position - chunk_bytes)
            file.seek(start)
            newline = file.read(position - start).rfind(b"\n")
            if newline >= 0:
                keep = start + newline + 1
                break
            position = keep = start
        if keep < size:
            file.truncate(keep)
    return size - keep


def _write_error(path: Path, error: OSError) -> TrainingError:
    return TrainingError(
        f"cannot write {path}: {error.strerror or error}. Metrics must not be lost, so training stops here; "
        "free space or mend the folder and start the same run again: it resumes from the last committed "
        "checkpoint."
    )
