"""The figures of random_faults.py, for programs and for people."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

_MEANING = {
    "crash": "an exception in one process",
    "kill": "SIGKILL of one process",
    "exit": "one process ends without a word",
    "sigterm": "one process is asked to leave: all save and leave in order",
    "hang": "one process sleeps for ever: the watchdog ends all after 10 s (30 s in a save)",
    "node": "SIGKILL of all processes at once, from outside",
}

_PAGE = """\
# Random faults over a run of the demo model

`python tests/e2e/random_faults.py --faults {num_faults} --seed {seed}{option}`: two processes over gloo on
two CPU cores that others used as well, a tiny shape of the demo model, saves in the background every
{save_every} steps. Every fault, and the settings: [{name}.json]({name}.json).

{num_survived} of {num_faults} faults survived. Loss, gradient norm and zero count of all {steps} steps are
{equal} to the uninterrupted run's, to the last bit; no step is missing, and {num_steps_run_twice} were run
more than once. The faults fell into steps {first_hit} to {last_hit}: each comes at most {reach} steps after
what the run could resume from.

The run took {with_faults_s:.0f} s instead of {uninterrupted_s:.0f} s. Goodput, the share of that time in new
steps, was {goodput_frac:.1%}. {starts}

Recovery, from a fault to the end of the first new step after it: median {recovery_median_s:.1f} s, 90% within
{recovery_p90_s:.1f} s, longest {recovery_max_s:.1f} s. A fault that comes before the last one is made good
counts the time of both. In {num_killed_while_waiting} starts the script had to do what a launcher does, and
kill a process that waited for a failed one for {grace_s:.0f} s; in all others they ended by themselves.

| kind | what happens | faults | median recovery, s |
|---|---|---|---|
{kinds}

| phase | faults |
|---|---|
{phases}
"""


def write(output: Path, name: str, summary: dict[str, Any], faults: list[dict[str, Any]]) -> None:
    """Write NAME.json and NAME.md.

    Args:
        output: an existing folder.
        name: of both files.
        summary: what `random_faults.conclude` measured.
        faults: one row each.
    """
    rows = {"summary": summary, "faults": faults}
    (output / f"{name}.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    kinds = []
    for kind, meaning in _MEANING.items():
        times_s = [f["recovered_s"] for f in faults if f["kind"] == kind and f["recovered_s"] is not None]
        median = f"{statistics.median(times_s):.1f}" if times_s else ""
        kinds.append(f"| {kind} | {meaning} | {sum(f['kind'] == kind for f in faults)} | {median} |")
    phases = sorted(Counter(fault["phase"] for fault in faults).items())
    starts = f"Starting Python and torch {summary['num_faults'] + 1} times decides it here."
    if summary["forked"]:
        starts = "Processes were forked from one that had imported torch, which a real start does each time."
    steps = [fault["step"] for fault in faults if fault["step"]]
    page = _PAGE.format(
        name=name,
        option=" --fork" if summary["forked"] else "",
        equal="equal" if summary["equal_to_the_last_bit"] else "NOT equal",
        starts=starts,
        kinds="\n".join(kinds),
        first_hit=min(steps, default=0),
        last_hit=max(steps, default=0),
        reach=10,
        phases="\n".join(f"| {phase} | {count} |" for phase, count in phases),
        **summary,
    )
    (output / f"{name}.md").write_text(page, encoding="utf-8")
