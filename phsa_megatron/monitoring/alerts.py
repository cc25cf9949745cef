"""When somebody must look: loss spikes, loss of speed, stragglers, stalls, steps that are not finite.

The rules here see plain numbers and say `Alert`; `training/alarms.py` feeds them and leaves the files. A rule
tells of an episode once: it tells again only after the number was normal in between.
"""

from __future__ import annotations

import json
import math
import re
import statistics
import time
from collections import deque
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from phsa_megatron.config.resolved import write_atomically
from phsa_megatron.config.schema import AlertsConfig

LOSS_HISTORY = 100
"""Steps whose median a spike is measured against."""
SPEED_HISTORY = 50
"""Records whose median a loss of speed is measured against."""
_MIN_HISTORY = 20
_SIGMA_OF_MAD = 1.4826
"""Standard deviation of a normal distribution over its median absolute deviation."""
_STRAGGLER_MIN_FRAC = 0.05
"""A process that is late by less than this share of a step holds nobody up."""


@dataclass(frozen=True)
class Alert:
    """One alert.

    Attributes:
        kind: loss_spike, non_finite, stall, throughput_drop or straggler.
        step: number of the step.
        text: for people, what to do included.
        fields: numbers behind it, JSON values.
        rank: the process that tells, where not all see the same.
    """

    kind: str
    step: int
    text: str
    fields: dict[str, Any] = field(default_factory=dict)
    rank: int | None = None

    @property
    def file_name(self) -> str:
        """Name of its file in RUN/alerts."""
        where = "" if self.rank is None else f"_rank_{self.rank}"
        return f"step_{self.step:08d}_{self.kind}{where}.json"


def write_alert(folder: Path, alert: Alert) -> Path:
    """Write an alert's file, and return its path.

    A step that is run again after a restart, and alerts again, gets a number behind its name.

    Raises:
        OSError: the disk refuses.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path, number = folder / alert.file_name, 2
    while path.exists():
        path = (folder / alert.file_name).with_suffix(f".{number}.json")
        number += 1
    record = {**asdict(alert), "time": time.time()}
    write_atomically(path, json.dumps(record, ensure_ascii=False, indent=2) + "\n")
    return path


def read_alerts(folder: Path) -> list[dict[str, Any]]:
    """Return the alerts of a run folder, by step; a file that cannot be read is left out."""
    found = []
    for path in sorted(folder.glob("step_*.json")) if folder.is_dir() else []:
        if re.fullmatch(r"step_\d+_[a-z_]+?(_rank_\d+)?(\.\d+)?\.json", path.name):
            try:
                found.append({**json.loads(path.read_text(encoding="utf-8")), "file": path.name})
            except (OSError, ValueError):
                continue
    return sorted(found, key=lambda alert: (alert.get("step", 0), alert.get("time", 0.0)))


class SpikeRule:
    """Sees the loss of every step; the same on all processes, because their losses are."""

    def __init__(self, settings: AlertsConfig) -> None:
        self._settings = settings
        self._losses: deque[float] = deque(maxlen=LOSS_HISTORY)
        self._inside = False

    def see(self, step: int, loss_nats: float) -> Alert | None:
        """Take a step's loss; return an alert at the first step of a spike."""
        alert = None
        if len(self._losses) >= _MIN_HISTORY:
            median = statistics.median(self._losses)
            sigma = _SIGMA_OF_MAD * statistics.median(abs(x - median) for x in self._losses)
            rise = max(self._settings.loss_spike_nats, self._settings.loss_spike_sigmas * sigma)
            high = loss_nats > median + rise
            if high and not self._inside:
                alert = Alert(
                    "loss_spike",
                    step,
                    f"loss {loss_nats:.4f} at step {step} is {loss_nats - median:.3f} nats above the median "
                    f"of the last {len(self._losses)} steps ({median:.4f}); a spike is {rise:.3f}",
                    {"loss_nats": loss_nats, "median_nats": median, "sigma_nats": sigma, "rise_nats": rise},
                )
            self._inside = high
        if math.isfinite(loss_nats):
            self._losses.append(loss_nats)
        return alert


class SpeedRule:
    """Sees the time of a step at every record; one process's clock is enough."""

    def __init__(self, settings: AlertsConfig) -> None:
        self._settings = settings
        self._times: deque[float] = deque(maxlen=SPEED_HISTORY)
        self._num_slow = 0

    def see(self, step: int, step_time_s: float) -> Alert | None:
        """Take a record's mean step time; return an alert once it was slow for long enough."""
        if len(self._times) < max(3, self._settings.patience_records):
            self._times.append(step_time_s)
            return None
        median = statistics.median(self._times)
        slow = median / step_time_s < 1 - self._settings.throughput_drop_frac
        self._num_slow = self._num_slow + 1 if slow else 0
        alert = None
        if self._num_slow == self._settings.patience_records:
            alert = Alert(
                "throughput_drop",
                step,
                f"a step takes {step_time_s:.3g} s, the median of the last {len(self._times)} records before "
                f"was {median:.3g} s: {1 - median / step_time_s:.0%} of the speed is lost",
                {"step_time_s": step_time_s, "median_s": median, "records_in_a_row": self._num_slow},
            )
        if not slow or self._num_slow > SPEED_HISTORY:  # what stays slow becomes the new normal
            self._times.append(step_time_s)
        return alert


class StragglerRule:
    """Sees which process took longest by itself at every record."""

    def __init__(self, settings: AlertsConfig) -> None:
        self._settings = settings
        self._rank: int | None = None
        self._num_slow = 0

    def see(self, step: int, rank: int, ratio: float, above_s: float, step_time_s: float) -> Alert | None:
        """Take a record.

        Args:
            step: its step.
            rank: the process furthest above the median of its pipeline stage.
            ratio: its own time over that median.
            above_s: its own time above that median, per step.
            step_time_s: of a step.
        """
        slow = ratio > self._settings.straggler_ratio and above_s > _STRAGGLER_MIN_FRAC * step_time_s
        self._num_slow = (self._num_slow + 1 if rank == self._rank else 1) if slow else 0
        self._rank = rank
        if self._num_slow != self._settings.patience_records:
            return None
        return Alert(
            "straggler",
            step,
            f"rank {rank} takes {ratio:.2f} times the median of its stage for its own data and forward "
            f"passes, {above_s:.3g} s of each step ({step_time_s:.3g} s): the others wait for it",
            {"straggler_rank": rank, "ratio": ratio, "above_s": above_s, "step_time_s": step_time_s},
        )
