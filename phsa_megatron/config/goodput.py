"""Goodput: the share of a run's time that went into steps that count.

`perf/goodput_frac` and `phsa-launch status` both take it from here. A step that a restart made again counts
once. What lowers it: starting, loading, evaluations, saves, steps that were lost with a killed launch, and
the time between launches.
"""

from __future__ import annotations

from dataclasses import dataclass

from phsa_megatron.config.records import Records

STEP_TIME = "perf/step_time_s"
"""The metric that holds the mean time of the steps since the record before."""


@dataclass
class Goodput:
    """Time in steps that count, of a run whose first launch began at `first_start_unix_s`.

    Attributes:
        first_start_unix_s: when the run's first launch wrote its first record.
        new_step_s: seconds in steps that count, up to `last_step`.
        last_step: last step with a record that counts; 0 before the first.
    """

    first_start_unix_s: float
    new_step_s: float = 0.0
    last_step: int = 0

    @classmethod
    def of(cls, records: Records, last_step: int | None = None) -> Goodput | None:
        """Return what records say, or None if no launch has written any.

        Args:
            records: of all launches.
            last_step: the step that a launch goes on from: what earlier ones made after it will be made again
                and does not count. None counts everything that no launch has made again yet.
        """
        if not records.launches:
            return None
        found = cls(records.launches[0].start_time)
        for step, step_time_s in zip(*records.series(STEP_TIME), strict=True):
            if last_step is None or step <= last_step:
                found.add(step, step_time_s)
        return found

    def add(self, step: int, step_time_s: float) -> None:
        """Count the steps since the last record up to `step`, each of `step_time_s`."""
        self.new_step_s += step_time_s * (step - self.last_step)
        self.last_step = step

    def share_of(self, seconds: float) -> float | None:
        """Return the share of `seconds` that went into steps that count; None of no time."""
        return self.new_step_s / seconds if seconds > 0 else None

    def frac(self, until_unix_s: float) -> float | None:
        """Return the goodput: the share of all time from the first launch's start until `until_unix_s`."""
        return self.share_of(until_unix_s - self.first_start_unix_s)
