"""Which figures the report shows, and from which metrics."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from phsa_megatron.monitoring.metrics import METRICS
from phsa_megatron.monitoring.plots import (
    NARROW_INCHES,
    WIDE_INCHES,
    Curves,
    Line,
    draw_curves,
    draw_heat_map,
    draw_layer_bars,
)
from phsa_megatron.monitoring.records import Records

SELECTED = "attention/layer_<n>/selected_mass_frac"
_ATTENDED = "attention/layer_<n>/attended_key_frac"
_LOG_SCALE_RATIO = 30.0


@dataclass(frozen=True)
class FigureCard:
    """One figure of the page.

    Attributes:
        title: What it shows.
        note: How to read it.
        svg: The drawing for one column of the page or a phone.
        wide_svg: The drawing over both columns, None if it only takes one.
    """

    title: str
    note: str
    svg: str
    wide_svg: str | None = None


def figures(config: dict[str, Any], records: Records, baselines: dict[str, float]) -> list[FigureCard]:
    """Draw every figure the run has numbers for.

    Args:
        config: The resolved configuration.
        records: The run's metrics.
        baselines: Cross-entropy of the n-gram baselines in nats by name.

    Returns:
        The figures in the order of the page.
    """
    restarts = restart_steps(records)
    cards = (
        _loss(records, baselines, restarts),
        _validation(records, "loss_nats", "Validation by domain, nats", "nats/token", restarts),
        _validation(records, "bits_per_byte", "Validation by domain, bits per byte", "bits/byte", restarts),
        _single(records, "optim/lr", "Learning rate", "learning rate", restarts, from_zero=True),
        _gradient_norm(config, records, restarts),
        _single(records, "perf/tokens_per_s", "Speed", "tokens/s", restarts, from_zero=True),
        _layer_bars(records),
        _heat_map(records),
    )
    return [card for card in cards if card is not None]


def restart_steps(records: Records) -> list[int]:
    """Return, for each later launch, the last recorded step before its own first one."""
    steps = sorted(records.values_by_step)
    firsts = [launch.first_step for launch in records.launches[1:] if launch.first_step is not None]
    places = [bisect_left(steps, first) for first in firsts]
    return [steps[place - 1] for place in places if place > 0]


def _line(records: Records, name: str, label: str, *, marked: bool = False) -> Line | None:
    steps, values = records.series(name)
    return Line(label, steps, values, marked) if any(map(math.isfinite, values)) else None


def _lines(lines: Iterable[Line | None]) -> list[Line]:
    return [line for line in lines if line is not None]


def _loss(records: Records, baselines: dict[str, float], restarts: list[int]) -> FigureCard | None:
    lines = _lines(
        [
            _line(records, "train/loss_nats", "training"),
            _line(records, "val/loss_nats", "validation", marked=True),
        ]
    )
    if not lines:
        return None
    svgs = [
        draw_curves(Curves(f"loss-{size}", "nats/token", lines, baselines, restarts), inches)
        for size, inches in (("narrow", NARROW_INCHES), ("wide", WIDE_INCHES))
    ]
    note = "Cross-entropy per token."
    if baselines:
        note += " Dashed: the same validation tokens under n-gram models of the training text."
    if restarts:
        note += " Dotted verticals: restarts."
    return FigureCard("Loss", note, *svgs)


def _validation(records: Records, what: str, title: str, unit: str, restarts: list[int]) -> FigureCard | None:
    row = METRICS[f"val/<domain>/{what}"]
    domains = {name: row.capture(name) for name in records.names()}
    lines = _lines(_line(records, name, domain, marked=True) for name, domain in domains.items() if domain)
    if not lines:
        return None
    last = ", ".join(f"{line.label} {line.values[-1]:.3f}" for line in lines)
    return FigureCard(
        title,
        f"Last: {last}.",
        draw_curves(Curves(f"val-{what}".replace("_", "-"), unit, lines, {}, restarts)),
    )


def _single(
    records: Records, name: str, title: str, unit: str, restarts: list[int], *, from_zero: bool
) -> FigureCard | None:
    line = _line(records, name, title)
    if line is None:
        return None
    curves = Curves(title.lower().replace(" ", "-"), unit, [line], {}, restarts, from_zero=from_zero)
    return FigureCard(title, METRICS[name].meaning, draw_curves(curves))


def _gradient_norm(config: dict[str, Any], records: Records, restarts: list[int]) -> FigureCard | None:
    line = _line(records, "optim/grad_norm", "gradient norm")
    if line is None:
        return None
    positive = [value for value in line.values if math.isfinite(value) and value > 0]
    log_scale = bool(positive) and max(positive) > _LOG_SCALE_RATIO * min(positive)
    clip = config["optim"]["clip_grad_norm"]
    levels = {"clipped above": clip} if clip > 0 else {}
    curves = Curves("gradient-norm", "L2 norm", [line], levels, restarts, log_scale, from_zero=not log_scale)
    return FigureCard("Gradient norm", "Before clipping, all weights together.", draw_curves(curves))


def by_layer(records: Records, pattern: str) -> dict[int, str]:
    """Return the metric name of each layer, layers ascending."""
    found = {METRICS[pattern].capture(name): name for name in records.names()}
    return dict(sorted((int(layer), name) for layer, name in found.items() if layer is not None))


def _layer_bars(records: Records) -> FigureCard | None:
    selected, attended = by_layer(records, SELECTED), by_layer(records, _ATTENDED)
    layers = list(selected)
    if not layers:
        return None
    shares = {"attention on selected blocks": [records.series(name)[1][-1] for name in selected.values()]}
    step = records.series(selected[layers[0]])[0][-1]
    note = f"At step {step:,}: attention probability on the selected blocks, outside init and local windows"
    if list(attended) == layers:
        shares["keys attended to"] = [records.series(name)[1][-1] for name in attended.values()]
        note += "; and keys attended to, over the keys dense attention sees"
    return FigureCard("Selected share by layer", note + ".", draw_layer_bars("layer-bars", layers, shares))


def _heat_map(records: Records) -> FigureCard | None:
    note = "Attention probability on the selected blocks, at each evaluation."
    return heat_map(records, SELECTED, "Selected share over time", note, "selected-over-time")


def heat_map(
    records: Records,
    pattern: str,
    title: str,
    note: str,
    name: str,
    limits: tuple[float, float] | None = None,
) -> FigureCard | None:
    """Draw a share by layer and time; None without two measurements.

    Args:
        records: The run's metrics.
        pattern: Row of the metrics table with a layer number.
        title: Of the figure.
        note: How to read it.
        name: Makes the ids in the drawing unique.
        limits: Fractions at the ends of the colours, where several maps are compared.
    """
    names = by_layer(records, pattern)
    if not names:
        return None
    steps = sorted({step for name in names.values() for step in records.series(name)[0]})
    if len(steps) < 2:
        return None
    values_by_layer = [dict(zip(*records.series(metric), strict=True)) for metric in names.values()]
    shares = [[values.get(step, math.nan) for step in steps] for values in values_by_layer]
    svgs = [
        draw_heat_map(f"{name}-{size}", steps, list(names), shares, inches, limits)
        for size, inches in (("narrow", NARROW_INCHES), ("wide", WIDE_INCHES))
    ]
    return FigureCard(title, note, *svgs)
