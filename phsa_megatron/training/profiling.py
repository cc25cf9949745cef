"""Traces of some steps: a Chrome trace, a table of kernels, on a GPU a snapshot of memory; and named ranges.

`monitoring.profile.first_step` traces steps of any run, on process 0, into RUN/profile. `phsa-train profile`
traces the first steps of a recipe in one process, without a run folder. Phases of the step are ranges in the
trace; with `monitoring.nvtx` they are NVTX ranges for Nsight Systems.
"""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from phsa_megatron.config.errors import TrainingError
from phsa_megatron.config.schema import ProfileConfig
from phsa_megatron.training.progress import Progress

_ROWS = 60
"""Lines of the table of kernels."""
_HISTORY_ENTRIES = 1_000_000


class PhaseRanges:
    """Names the phases of a step, for whatever records ranges; a listener of `Progress.on_enter`.

    Args:
        progress: says where the process is.
        nvtx: also push NVTX ranges.
    """

    def __init__(self, progress: Progress, *, nvtx: bool) -> None:
        self._progress = progress
        self._nvtx = nvtx
        self._open: Any = None
        self.recording = False

    def enter(self, phase: str) -> None:
        """Ends the range of the phase before and begins the next."""
        self.leave()
        name = f"step {self._progress.step}: {phase}"
        if self.recording:
            self._open = record_function(name)
            self._open.__enter__()
        if self._nvtx:
            torch.cuda.nvtx.range_push(name)  # type: ignore[no-untyped-call]
            self._pushed = True

    def leave(self) -> None:
        """Ends the range that is open, if any."""
        if self._open is not None:
            self._open.__exit__(None, None, None)
            self._open = None
        if getattr(self, "_pushed", False):
            torch.cuda.nvtx.range_pop()  # type: ignore[no-untyped-call]
            self._pushed = False


class StepProfiler:
    """Traces `num_steps` steps from `first_step` on; a context manager around the steps of a run.

    Args:
        settings: which steps; `first_step=0` traces none.
        folder: where the files go.
        progress: of the process: its phases become ranges.
        device: of the process.
        active: whether this process traces.
        nvtx: push NVTX ranges, traced or not.
    """

    def __init__(
        self,
        settings: ProfileConfig,
        folder: Path,
        progress: Progress,
        device: torch.device,
        *,
        active: bool = True,
        nvtx: bool = False,
    ) -> None:
        self._settings = settings
        self._folder = folder
        self._on_gpu = device.type == "cuda"
        self._ranges = PhaseRanges(progress, nvtx=nvtx and self._on_gpu)
        self._wanted = active and settings.first_step > 0
        self._profile: profile | None = None
        self.files: list[Path] = []
        """What was written."""
        if self._wanted or (nvtx and self._on_gpu):
            progress.on_enter.append(self._ranges.enter)

    def __enter__(self) -> StepProfiler:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ranges.leave()
        if self._profile is not None:
            self._stop(write=error is None)

    def before_step(self, step: int) -> None:
        """Starts or ends the trace where step `step` begins it, or is the first one after it."""
        if not self._wanted:
            return
        first = self._settings.first_step
        if step == first:
            self._start()
        elif self._profile is not None and step >= first + self._settings.num_steps:
            self._stop(write=True)

    def _start(self) -> None:
        activities = [ProfilerActivity.CPU]
        if self._on_gpu:
            activities.append(ProfilerActivity.CUDA)
            if self._settings.memory:
                torch.cuda.memory._record_memory_history(max_entries=_HISTORY_ENTRIES)
        self._profile = profile(activities=activities, record_shapes=True, profile_memory=True)
        self._profile.__enter__()  # type: ignore[no-untyped-call]
        self._ranges.recording = True

    def _stop(self, *, write: bool) -> None:
        assert self._profile is not None
        self._ranges.leave()
        self._ranges.recording = False
        if self._on_gpu:
            torch.cuda.synchronize()  # the steps' last kernels belong to the trace
        self._profile.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        traced, self._profile = self._profile, None
        if write:
            first = self._settings.first_step
            stem = f"steps_{first:08d}_{first + self._settings.num_steps - 1:08d}"
            try:
                self._write(traced, stem)
            except OSError as error:
                raise TrainingError(f"the profile could not be written to {self._folder}: {error}") from error
        if self._on_gpu and self._settings.memory:
            torch.cuda.memory._record_memory_history(enabled=None)

    def _write(self, traced: profile, stem: str) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        trace = self._folder / f"{stem}.trace.json.gz"
        traced.export_chrome_trace(str(trace))
        order = "self_cuda_time_total" if self._on_gpu else "self_cpu_time_total"
        table = self._folder / f"{stem}.kernels.txt"
        rows = traced.key_averages(group_by_input_shape=False).table(sort_by=order, row_limit=_ROWS)
        table.write_text(rows + "\n", encoding="utf-8")
        self.files += [trace, table]
        if self._on_gpu and self._settings.memory:
            snapshot = self._folder / f"{stem}.memory.pickle"
            torch.cuda.memory._dump_snapshot(str(snapshot))  # type: ignore[no-untyped-call]
            self.files.append(snapshot)
