"""The settings of `health`: checks before the first step, watching over hangs, restarts."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Resiliency(StrEnum):
    """Who restarts a hung process beside the run's own watchdog."""

    none = "none"
    nvrx = "nvrx"


@dataclass
class HealthConfig:
    """Checks before the first step, and what happens when processes hang: docs/health.md."""

    watchdog: bool = True
    """Ends a process that makes no progress for the time below, with a line that says where it stood; false
    leaves a hang as it is, for a debugger."""
    heartbeat_every_s: float = 5.0
    """Seconds between writes of RUN/heartbeats/rank_#.json, and between looks of the watchdog."""
    start_timeout_s: float = 300.0
    """How long processes wait for each other at start. Who is missing is printed every 20 s meanwhile."""
    first_step_timeout_s: float = 1800.0
    """Longest time without progress until the first step is done: loading and compiling are in it."""
    step_timeout_s: float = 300.0
    """Longest time without progress in a step after the first: a micro-batch, an update, one collective."""
    data_timeout_s: float = 900.0
    """Longest wait for the batch of a step after the first."""
    long_phase_timeout_s: float = 1800.0
    """Longest time without progress in a save, an evaluation or the end of the run."""
    resiliency: Resiliency = Resiliency.none
    """nvrx also sends heartbeats to nvidia-resiliency-ext's ft_launcher; refused where it is absent."""
    gpu_scores_every_steps: int = 0
    """Steps between two looks of nvidia-resiliency-ext at how fast each GPU runs its kernels, against the
    fastest and its own best; a slow one is an alert. 0 for none; refused on CPUs and without the package."""
    preflight_timeout_s: float = 120.0
    """How long nodes wait for each other in the preflight; who is missing is printed every 20 s, and at the
    end its name is written down."""
    min_free_memory_gib: float = 1.0
    """Host memory that must be free on a node, in GiB."""
    min_free_gpu_memory_frac: float = 0.9
    """Share of a GPU's memory that must be free: less means that another process still holds it."""
    min_free_disk_gib: float = 1.0
    """Space that must be free where the run folder is, in GiB."""
    min_write_mib_per_s: float = 5.0
    """Speed in MiB/s at which a node must write 32 MiB into the run folder, the sync to disk included."""
    max_gpu_temperature_c: float = 85.0
    """Temperature in degrees Celsius above which an idle GPU is not trusted."""
    max_clock_skew_s: float = 2.0
    """How far a node's clock may be from the others' median."""
    max_all_reduce_s: float = 10.0
    """Longest time for one all-reduce of 4 MiB (64 MiB a GPU) over all nodes, after a first one."""
