"""PNG figures of results: curves over k, values with their spread, and a map of layers and heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

_LINES = ("-", "--", ":")


def curves(
    path: Path,
    series: Mapping[str, Mapping[int, float]],
    *,
    title: str,
    x_label: str,
    y_label: str,
    levels: Mapping[str, float] | None = None,
) -> Path:
    """Draw one curve a name over powers of two, and dotted levels; return `path`."""
    figure = Figure(figsize=(8.4, 4.6), layout="constrained")
    axes = figure.add_subplot()
    for number, (name, points) in enumerate(series.items()):
        style = _LINES[number // 10 % len(_LINES)]
        axes.plot(list(points), list(points.values()), style, marker="o", markersize=3, label=name)
    for name, value in (levels or {}).items():
        axes.axhline(value, color="gray", linewidth=0.8, linestyle=":")
        axes.annotate(name, (1.0, value), xycoords=("axes fraction", "data"), fontsize=8, color="gray")
    ticks = sorted({x for points in series.values() for x in points})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(x) for x in ticks])
    axes.set(title=title, xlabel=x_label, ylabel=y_label)
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1.08, 0.5), fontsize=8, frameon=False)
    return _save(figure, path)


def with_spread(path: Path, values: Mapping[str, Sequence[float]], *, title: str, x_label: str) -> Path:
    """Draw each name's values as points and their mean as a bar; return `path`."""
    figure = Figure(figsize=(7.2, 1.2 + 0.34 * len(values)), layout="constrained")
    axes = figure.add_subplot()
    for row, points in enumerate(values.values()):
        axes.plot(points, [row] * len(points), "o", color="tab:blue", alpha=0.6, markersize=4)
        axes.plot([sum(points) / len(points)], [row], "|", color="black", markersize=14, markeredgewidth=2)
    axes.set_yticks(range(len(values)), list(values))
    axes.invert_yaxis()
    axes.set(title=title, xlabel=x_label)
    axes.grid(alpha=0.3, axis="x")
    return _save(figure, path)


def layers_and_heads(path: Path, table: Sequence[Sequence[float]], *, title: str, label: str) -> Path:
    """Draw a value for each layer (from 1, upwards) and head (from 0) as a map; return `path`."""
    figure = Figure(figsize=(1.8 + 0.34 * len(table[0]), 1.4 + 0.26 * len(table)), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(table, aspect="auto", origin="lower", cmap="viridis")
    axes.set_yticks(range(len(table)), [str(n) for n in range(1, len(table) + 1)], fontsize=7)
    axes.set(title=title, xlabel="query head", ylabel="layer")
    figure.colorbar(image, label=label)
    return _save(figure, path)


def _save(figure: Figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_figure(path, dpi=110)
    return path
