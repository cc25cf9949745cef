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


def heat_maps(
    path: Path,
    panels: Mapping[tuple[int, int], tuple[str, Sequence[Sequence[float]]]],
    *,
    columns: Sequence[str],
    rows: Sequence[str],
    title: str,
    x_label: str,
    y_label: str,
) -> Path:
    """Draw maps of shares from 0 to 1 in a grid; return `path`.

    Args:
        path: of the PNG.
        panels: by row and column of the grid: a title, and values by row and column of the map, nan for none.
        columns: names of a map's columns.
        rows: names of a map's rows.
        title: of the figure.
        x_label: of a map's columns.
        y_label: of a map's rows.
    """
    down, across = (max(key[i] for key in panels) + 1 for i in (0, 1))
    size = 0.6 + 0.52 * len(columns), 0.5 + 0.34 * len(rows)
    figure = Figure(figsize=(1.2 + size[0] * across, 1.0 + size[1] * down), layout="constrained")
    grid = figure.subplots(down, across, squeeze=False)
    for i, j in ((i, j) for i in range(down) for j in range(across)):
        axes = grid[i][j]
        if (i, j) not in panels:
            axes.set_axis_off()
            continue
        name, values = panels[i, j]
        axes.imshow(values, vmin=0.0, vmax=1.0, aspect="auto", cmap="viridis")
        for y, row in enumerate(values):
            for x, value in enumerate(row):
                if value == value:  # not nan
                    color = "black" if value > 0.6 else "white"
                    text = f"{value:.2f}".removeprefix("0")
                    axes.text(x, y, text, ha="center", va="center", fontsize=6, color=color)
        axes.set_xticks(range(len(columns)), columns, fontsize=6)
        axes.set_yticks(range(len(rows)), rows, fontsize=6)
        axes.set_title(name, fontsize=7)
    figure.suptitle(title, fontsize=9)
    figure.supxlabel(x_label, fontsize=8)
    figure.supylabel(y_label, fontsize=8)
    return _save(figure, path)


def _save(figure: Figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_figure(path, dpi=110)
    return path
