"""One self-contained page that compares runs: finished, stopped, or still running."""

from __future__ import annotations

import math
import statistics
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from phsa_megatron.config.errors import DataError
from phsa_megatron.config.resolved import write_atomically
from phsa_megatron.config.run_folder import RunFolder
from phsa_megatron.monitoring.alerts import read_alerts
from phsa_megatron.monitoring.console import short_count
from phsa_megatron.monitoring.metrics import METRICS, lookup
from phsa_megatron.monitoring.plots import NARROW_INCHES, SERIES, WIDE_INCHES, Curves, Line, draw_curves
from phsa_megatron.monitoring.records import Records
from phsa_megatron.monitoring.report import RunData, flatten, read_run, shown, status, template, utc
from phsa_megatron.monitoring.report_figures import SELECTED, FigureCard, by_layer, heat_map

_TOKENS = "progress/consumed_tokens"
_CURVES = (
    ("train/loss_nats", "Training loss", True),
    ("val/loss_nats", "Validation loss", False),
    ("optim/grad_norm", "Gradient norm", True),
    ("optim/lr", "Learning rate", False),
    ("perf/tokens_per_s", "Speed", True),
    ("perf/mfu_selected_frac", "Utilization, FLOPs of the run's own attention", True),
    ("perf/dense_equiv_tflops", "Speed in FLOPs of full causal attention", True),
    ("perf/step_time_s", "Time of a step", True),
    ("perf/communication_s", "Time in communication that a step waits for", True),
    ("perf/goodput_frac", "Share of all time in steps that count", False),
    ("perf/slowest_ratio", "Slowest process over the median", True),
    ("memory/peak_gib", "Peak memory", False),
    ("attention/max_logit", "Largest attention logit", False),
    ("attention/kept_mass_frac", "Attention mass that is kept", False),
    ("attention/oracle_gain_frac", "What selection adds, of what it could", False),
    ("attention/block_punctuation_frac", "Punctuation in all blocks", False),
    ("attention/topk", "Selected blocks", False),
)
"""Metric, title, and whether it is smoothed."""
_MAPS = (
    (SELECTED, "attention on the selected blocks"),
    ("attention/layer_<n>/kept_mass_frac", "attention mass that is kept"),
    ("attention/layer_<n>/max_logit", "largest attention logit"),
    ("attention/layer_<n>/selected_punctuation_frac", "punctuation in the selected blocks"),
)
_NAMES_OF_A_RUN = ("run.name", "run.root_dir")


@dataclass(frozen=True)
class Compared:
    """A run of the comparison.

    Attributes:
        label: Its name; with its folder where two runs have the same.
        folder: Where it lies.
        data: What it says about itself.
    """

    label: str
    folder: RunFolder
    data: RunData

    @property
    def records(self) -> Records:
        """Return its metrics and events."""
        return self.data.records


def write_comparison(
    folders: list[RunFolder], output: Path, *, smoothing: float = 0.9, axis: str = "step"
) -> Path:
    """Write the page that compares runs.

    Args:
        folders: Run folders with a resolved configuration and a metrics file.
        output: The page; it appears at once, whole.
        smoothing: Weight of the past in running means, from 0 (none) to below 1.
        axis: What curves are drawn over: `step` or `tokens`.

    Returns:
        `output`.

    Raises:
        ConfigError: A configuration is missing or damaged.
        DataError: Metrics are missing or damaged, or a folder is given twice.
    """
    runs = _open(folders)
    figures = [
        figure
        for name, title, smooth in _curve_rows(runs)
        if (figure := _curves(runs, name, title, smoothing if smooth else 0.0, axis)) is not None
    ]
    page = template("comparison.html.j2").render(
        runs=[_row(run, number) for number, run in enumerate(runs)],
        columns=list(_facts(runs[0])),
        note=f"Curves over {axis}s" if axis == "step" else "Curves over consumed tokens",
        figures=[shown(figure) for figure in figures],
        maps=[shown(card) for card in _heat_maps(runs)],
        differences=differences(runs),
        launches=[row for run in runs for row in _launches(run)],
        alerts=[{"run": run.label, **alert} for run in runs for alert in read_alerts(run.folder.alerts_dir)],
        written_at=utc(datetime.now(UTC).timestamp()),
    )
    write_atomically(output, page)
    return output


def _open(folders: list[RunFolder]) -> list[Compared]:
    paths = [folder.path.resolve() for folder in folders]
    twice = {str(path) for path in paths if paths.count(path) > 1}
    if twice:
        raise DataError(f"{', '.join(sorted(twice))} is given twice: a run is not compared with itself")
    data = [read_run(folder) for folder in folders]
    names = [str(run.config["run"]["name"]) for run in data]
    return [
        Compared(name if names.count(name) == 1 else str(folder.path), folder, run)
        for name, folder, run in zip(names, folders, data, strict=True)
    ]


def _row(run: Compared, number: int) -> dict[str, Any]:
    color = f"--series-{number % len(SERIES) + 1}"
    return {"name": run.label, "color": color, "status": status(run.data), "facts": _facts(run)}


def _facts(run: Compared) -> dict[str, str]:
    """Return the columns of the runs' table; what a run has not measured is a dash."""
    records = run.records

    def last(name: str, render: Callable[[float], str]) -> str:
        value = records.last(name)
        return "–" if value is None else render(value)

    def median(name: str, render: Callable[[float], str]) -> str:
        values = [value for value in records.series(name)[1] if math.isfinite(value)]
        return render(statistics.median(values)) if values else "–"

    steps = max(records.values_by_step, default=0)
    return {
        "steps": f"{steps:,} of {run.data.config['run']['train_steps']:,}",
        "tokens": last(_TOKENS, short_count),
        "training loss": last("train/loss_nats", "{:.4f}".format),
        "validation loss": last("val/loss_nats", "{:.4f}".format),
        "tokens/s": median("perf/tokens_per_s", short_count),
        "utilization": median("perf/mfu_selected_frac", "{:.1%}".format),
        "dense TFLOP/s": median("perf/dense_equiv_tflops", "{:.3g}".format),
        "goodput": last("perf/goodput_frac", "{:.1%}".format),
        "restarts": str(max(0, len(records.launches) - 1)),
        "alerts": str(len(read_alerts(run.folder.alerts_dir))),
    }


def _curve_rows(runs: list[Compared]) -> list[tuple[str, str, bool]]:
    """Return metric, title and whether to smooth; validation domains come after the loss over all."""
    row = METRICS["val/<domain>/bits_per_byte"]
    domains = sorted({name for run in runs for name in run.records.names() if row.capture(name)})
    rows = [(name, f"Validation, {row.capture(name)}", False) for name in domains]
    return [*_CURVES[:2], *rows, *_CURVES[2:]]


def _curves(runs: list[Compared], name: str, title: str, smoothing: float, axis: str) -> FigureCard | None:
    lines = []
    for run in runs:
        steps, values = run.records.series(name)
        if any(map(math.isfinite, values)):
            where = _tokens_at(run.records, steps) if axis == "tokens" else steps
            lines.append(Line(run.label, where, values, marked=len(values) < 40))
        else:  # keeps the colours of the runs the same in all figures
            lines.append(Line(run.label, [], []))
    if not any(line.steps for line in lines):
        return None
    metric = lookup(name)
    positive = [v for line in lines for v in line.values if math.isfinite(v) and v > 0]
    log_scale = name == "optim/grad_norm" and max(positive, default=0) > 30 * min(positive, default=1)
    svgs = [
        draw_curves(
            Curves(
                f"{name.replace('/', '-').replace('_', '-')}-{size}",
                metric.unit,
                lines,
                log_scale=log_scale,
                smoothing=smoothing,
                x_label=axis,
            ),
            inches,
        )
        for size, inches in (("narrow", NARROW_INCHES), ("wide", WIDE_INCHES))
    ]
    note = metric.meaning
    if smoothing:
        note += f" Bold: running mean, the past weighs {smoothing:g}; faint: as recorded."
    wide = svgs[1] if name == "train/loss_nats" else None
    return FigureCard(title, note, svgs[0], wide)


def _tokens_at(records: Records, steps: list[int]) -> list[int]:
    """Return the tokens consumed at steps: those of the last record up to each."""
    known, tokens = records.series(_TOKENS)
    return [int(tokens[max(0, bisect_right(known, step) - 1)]) if known else step for step in steps]


def _heat_maps(runs: list[Compared]) -> list[FigureCard]:
    cards = []
    for kind, (pattern, what) in enumerate(_MAPS):
        limits = _limits(runs, pattern)
        for number, run in enumerate(runs):
            title, name = f"{run.label}: {what}", f"map-{kind}-{number}"
            card = heat_map(run.records, pattern, title, METRICS[pattern].meaning, name, limits)
            if card is not None:
                cards.append(FigureCard(card.title, card.note, card.svg))
    return cards


def _limits(runs: list[Compared], pattern: str) -> tuple[float, float] | None:
    """Return the smallest and the largest value in all runs: the same colour means the same share."""
    names = [(run.records, name) for run in runs for name in by_layer(run.records, pattern).values()]
    values = [value for records, name in names for value in records.series(name)[1] if math.isfinite(value)]
    return (min(values), max(values)) if values else None


def differences(runs: list[Compared]) -> list[tuple[str, list[tuple[str, bool]]]]:
    """Return every setting that is not the same in all runs.

    Returns:
        Key, and for each run its value and whether that differs from the first run's.
    """
    tables = [
        {key: value for group, values in run.data.config.items() for key, value in flatten(values, group)}
        for run in runs
    ]
    keys = dict.fromkeys(key for table in tables for key in table)
    rows = []
    for key in keys:
        values = [table.get(key, "(absent)") for table in tables]
        if key not in _NAMES_OF_A_RUN and len(set(values)) > 1:
            rows.append((key, [(value, value != values[0]) for value in values]))
    return rows


def _launches(run: Compared) -> list[dict[str, Any]]:
    records = run.records
    starts = records.events_of("start")
    rows = []
    for number, launch in enumerate(records.launches):
        host = starts[number].fields.get("environment", {}).get("host", "") if number < len(starts) else ""
        first = "none" if launch.first_step is None else f"{launch.first_step:,} to {launch.last_step:,}"
        rows.append(
            {
                "run": run.label, "number": number + 1, "began": utc(launch.start_time),
                "last": utc(launch.last_time), "steps": first, "host": host,
            }
        )  # fmt: skip
    return rows
