"""The report's figures, as SVG elements that take their colours from the page (light or dark)."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

# A figure is drawn in these stand-in colours; each becomes a CSS variable of the page.
INK, MUTED, GRID, SURFACE = "#010101", "#010102", "#010103", "#010104"
SERIES = ("#010201", "#010202", "#010203", "#010204", "#010205", "#010206")
_CSS_VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--grid", SURFACE: "--card"} | {
    color: f"--series-{number}" for number, color in enumerate(SERIES, start=1)
}
_MAX_POINTS = 800
WIDE_INCHES = (9.6, 3.4)
NARROW_INCHES = (5.2, 3.0)

_STYLE: dict[Any, Any] = {  # matplotlib types the keys as one long Literal
    "svg.fonttype": "none",
    "svg.hashsalt": "phsa-megatron",
    "font.size": 9,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.6,
}


@dataclass(frozen=True)
class Line:
    """One curve: a label, steps and values of equal length, and whether each point is marked."""

    label: str
    steps: Sequence[int]
    values: Sequence[float]
    marked: bool = False


@dataclass(frozen=True)
class Curves:
    """One figure of curves over the steps.

    Attributes:
        name: Letters and hyphens; makes the ids inside the SVG unique in the page.
        unit: Label of the vertical axis.
        lines: The curves, in the order of the series colours.
        levels: Horizontal lines with a label, such as a baseline or a limit.
        restarts: Steps at which a launch resumed, drawn as thin vertical lines.
        log_scale: Logarithmic vertical axis.
        from_zero: The vertical axis starts at zero.
        smoothing: From 0 to below 1: weight of the past in a running mean, drawn over the faint values.
        x_label: What the horizontal axis counts.
    """

    name: str
    unit: str
    lines: Sequence[Line]
    levels: dict[str, float] = field(default_factory=dict)
    restarts: Sequence[int] = ()
    log_scale: bool = False
    from_zero: bool = False
    smoothing: float = 0.0
    x_label: str = "step"


def draw_curves(curves: Curves, inches: tuple[float, float] = NARROW_INCHES) -> str:
    """Draw curves over the steps.

    Long curves are thinned to bucket means with a band from the smallest to the largest value of each
    bucket, so a spike stays visible. Non-finite values leave a gap.

    Args:
        curves: What to draw; a line without points keeps its colour and is left out.
        inches: Width and height of the drawing, which sets how large its text is.

    Returns:
        An `<svg>` element.
    """
    with matplotlib.rc_context(_STYLE):
        figure, axes = _new_figure(inches)
        for step in curves.restarts:
            axes.axvline(step, color=MUTED, linewidth=0.7, linestyle=(0, (2, 3)))
        for number, line in enumerate(curves.lines):
            if line.steps:  # an empty one only keeps its colour
                _draw_line(axes, line, number, curves.smoothing)
        if curves.log_scale:
            axes.set_yscale("log")
        if curves.from_zero:
            axes.set_ylim(bottom=0)
        _draw_levels(axes, curves.levels)
        axes.set_ylabel(curves.unit)
        axes.set_xlabel(curves.x_label)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        if not curves.log_scale:
            _format_values(axes, max(map(abs, _finite_values(curves.lines)), default=1))
        if len(curves.lines) > 1:
            axes.legend(loc="upper right", ncols=min(3, len(curves.lines)))
        return _to_svg(figure, curves.name)


def draw_layer_bars(name: str, layers: Sequence[int], shares: Mapping[str, Sequence[float]]) -> str:
    """Draw shares by layer as grouped bars.

    Args:
        name: Makes the ids in the SVG unique.
        layers: Layer numbers.
        shares: For each label one fraction (0 to 1) a layer.

    Returns:
        An `<svg>` element.
    """
    with matplotlib.rc_context(_STYLE):
        figure, axes = _new_figure(NARROW_INCHES)
        width = 0.8 / len(shares)
        for number, ((label, values), color) in enumerate(zip(shares.items(), SERIES, strict=False)):
            positions = [place + (number - (len(shares) - 1) / 2) * width for place in range(len(layers))]
            axes.bar(positions, [100 * value for value in values], width * 0.9, color=color, label=label)
        stride = math.ceil(len(layers) / 14)
        axes.set_xticks(range(0, len(layers), stride), [str(layer) for layer in layers[::stride]])
        axes.grid(visible=False, axis="x")
        axes.set_xlabel("layer")
        axes.set_ylabel("%")
        axes.set_ylim(0, axes.get_ylim()[1] * 1.18)
        axes.legend(loc="upper right", ncols=len(shares))
        return _to_svg(figure, name)


def draw_heat_map(
    name: str,
    steps: Sequence[int],
    layers: Sequence[int],
    shares: Sequence[Sequence[float]],
    inches: tuple[float, float] = NARROW_INCHES,
    limits: tuple[float, float] | None = None,
) -> str:
    """Draw a share over time and layers.

    Args:
        name: Makes the ids in the SVG unique.
        steps: The evaluations, left to right, one column each.
        layers: Layer numbers, bottom to top.
        shares: `shares[layer][evaluation]`, fractions from 0 to 1, NaN where nothing was measured.
        inches: Width and height of the drawing.
        limits: Fractions at the ends of the colours; None takes the smallest and the largest share.

    Returns:
        An `<svg>` element with the map as an embedded picture.
    """
    with matplotlib.rc_context(_STYLE):
        figure, axes = _new_figure(inches)
        percent = [[100 * share for share in row] for row in shares]
        low, high = (None, None) if limits is None else (100 * limit for limit in limits)
        image = axes.imshow(
            percent,
            aspect="auto",
            origin="lower",
            cmap="viridis",
            interpolation="nearest",
            vmin=low,
            vmax=high,
        )
        axes.grid(visible=False)
        for count, labels, set_ticks in (
            (2 * inches[0], [EngFormatter(sep="")(step) for step in steps], axes.set_xticks),
            (3 * inches[1], [str(layer) for layer in layers], axes.set_yticks),
        ):
            stride = math.ceil(len(labels) / count)
            set_ticks(range(0, len(labels), stride), labels[::stride])
        axes.set_xlabel("step of the evaluation")
        axes.set_ylabel("layer")
        bar = figure.colorbar(image, ax=axes, pad=0.02)
        bar.outline.set_visible(False)
        bar.set_label("%", color=MUTED)
        return _to_svg(figure, name)


def thin(
    steps: Sequence[int], values: Sequence[float], max_points: int = _MAX_POINTS
) -> list[tuple[float, float, float, float]]:
    """Reduce a curve to at most `max_points` buckets.

    Args:
        steps: Steps, ascending.
        values: Values; non-finite ones are left out of their bucket.
        max_points: Largest number of buckets.

    Returns:
        One (mean step, mean, smallest, largest) a bucket; all NaN but the step where a bucket has no finite
        value.
    """
    bucket = math.ceil(len(steps) / max_points)
    points = []
    for start in range(0, len(steps), bucket):
        where = steps[start : start + bucket]
        finite = [value for value in values[start : start + bucket] if math.isfinite(value)]
        center = sum(where) / len(where)
        if finite:
            points.append((center, sum(finite) / len(finite), min(finite), max(finite)))
        else:
            points.append((center, math.nan, math.nan, math.nan))
    return points


def _new_figure(inches: tuple[float, float]) -> tuple[Figure, Axes]:
    figure = Figure(figsize=inches, layout="constrained")
    FigureCanvasSVG(figure)
    figure.patch.set_alpha(0)
    axes = figure.add_subplot()
    axes.patch.set_alpha(0)
    return figure, axes


def _draw_line(axes: Axes, line: Line, number: int, smoothing: float) -> None:
    color = SERIES[number % len(SERIES)]
    # More lines than colours: the next ones are dashed.
    style: Any = ("-", (0, (5, 2)), (0, (1, 1)))[number // len(SERIES) % 3]
    centers, means, smallest, largest = zip(*thin(line.steps, line.values), strict=True)
    marker = "o" if line.marked or len(line.steps) == 1 else None
    if smoothing > 0 and marker is None:
        axes.plot(centers, means, color=color, linewidth=0.7, alpha=0.3)
        smooth = smoothed(line.values, smoothing)
        centers, means, _, _ = zip(*thin(line.steps, smooth), strict=True)
    elif len(line.steps) > _MAX_POINTS:
        axes.fill_between(centers, smallest, largest, color=color, alpha=0.3, linewidth=0.8)
    axes.plot(centers, means, color=color, label=line.label, marker=marker, markersize=3.5, linestyle=style)


def smoothed(values: Sequence[float], weight: float) -> list[float]:
    """Return a running mean, without the pull of a first value: each past value counts `weight` times less.

    Non-finite values are passed over; where nothing finite has been seen, the result is NaN.
    """
    total = count = 0.0
    out = []
    for value in values:
        if math.isfinite(value):
            total, count = weight * total + value, weight * count + 1
        out.append(total / count if count else math.nan)
    return out


def _draw_levels(axes: Axes, levels: dict[str, float]) -> None:
    for label, value in levels.items():
        axes.axhline(value, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
        axes.annotate(
            f"{label} {value:.3g}",
            (1, value),
            xycoords=axes.get_yaxis_transform(),
            xytext=(0, 3),
            textcoords="offset points",
            ha="right",
            color=MUTED,
            fontsize=8,
        )


def _format_values(axes: Axes, largest: float) -> None:
    """Write thousands as 12k and small numbers with one power of ten over the axis."""
    if largest >= 1000:
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    elif largest < 0.1:
        axes.ticklabel_format(axis="y", style="scientific", scilimits=(0, 0), useMathText=False)


def _finite_values(lines: Sequence[Line]) -> list[float]:
    return [value for line in lines for value in line.values if math.isfinite(value)]


def _to_svg(figure: Figure, name: str) -> str:
    """Return the drawing with ids of its own and the page's colours in place of the stand-ins."""
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", svg)
    # The page sets the size; the drawing keeps its viewBox.
    svg = re.sub(
        r'<svg [^>]*?(viewBox="[^"]*")[^>]*>',
        r'<svg \1 xmlns:xlink="http://www.w3.org/1999/xlink">',
        svg,
        count=1,
    )
    for color, variable in _CSS_VARIABLES.items():
        svg = svg.replace(color, f"var({variable})")
    return svg
