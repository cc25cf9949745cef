"""The page's section on where a step's time goes, before and after work on it, and what is left."""

from __future__ import annotations

from typing import Any

from phsa_megatron.evaluation.full_size.roofline import BYTES_PER_S, least_ms
from phsa_megatron.evaluation.full_size.rows import ROWS, Setting, config_of

_SPEED_TBYTE_PER_S = BYTES_PER_S / 1e12


def profile_section(
    profiles: list[dict[str, Any]], earlier: list[dict[str, Any]], file: str, earlier_file: str
) -> list[str]:
    """Return the section's lines.

    Args:
        profiles: as `kernel_times.profile_step` returns them, with the commit.
        earlier: profiles of the same rows of an older commit; may be empty.
        file: where the profiles are.
        earlier_file: where the earlier ones are.
    """
    text = [
        "Milliseconds of one profiled step, kernels grouped by name; every kernel is in "
        f"[the profile]({file}). Idle is the step's wall time in which no kernel ran, with the profiler's "
        "own cost in it.",
        "Least: FLOPs at 989 TFLOP/s or bytes that must be moved at "
        f"{_SPEED_TBYTE_PER_S:.2f} TB/s (`evaluation/full_size/roofline.py`).",
    ]
    if earlier:
        text.append(f"Before: commit `{earlier[0]['commit'][:12]}` ([its profile]({earlier_file})).")
    columns = []
    for profile in profiles:
        before = next((old for old in earlier if old["name"] == profile["name"]), None)
        columns += [] if before is None else [(f"{profile['name']} before", before)]
        columns.append((profile["name"], profile))
    kinds = list(dict.fromkeys(kind for _, profile in columns for kind in profile["kinds_ms"]))
    lines = ["## Where a step's time goes", "", " ".join(text), ""]
    least = {name: _least(name) for name, _ in columns}
    heads = [cell for name, _ in columns for cell in ([name, "least"] if least[name] else [name])]
    lines += ["| | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for kind in kinds:
        cells = []
        for name, profile in columns:
            cells.append(f"{profile['kinds_ms'].get(kind, 0):.1f}")
            cells += [f"{least[name][kind]:.1f}" if kind in least[name] else "-"] if least[name] else []
        lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    for label, key in (("idle", "idle_ms"), ("whole step", "step_ms")):
        cells = []
        for name, profile in columns:
            cells.append(f"{profile[key]:.1f}")
            total = f"{sum(least[name].values()):.1f}" if key == "step_ms" else "-"
            cells += [total] if least[name] else []
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    waits = [
        cell
        for name, profile in columns
        for cell in ([str(sum(profile["host_waits"].values()))] + (["-"] if least[name] else []))
    ]
    return [*lines, "| waits of the host | " + " | ".join(waits) + " |"]


def _least(name: str) -> dict[str, float]:
    """Return the least times of the row of that name; none for a column of an earlier profile."""
    row = next((row for row in ROWS if row.name == name), None)
    return {} if row is None else least_ms(config_of(row, Setting()))
