"""Heat maps: a value in each cell of two settings, such as depth and length."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def heat_map(
    path: Path,
    table: Sequence[Sequence[float]],
    *,
    rows: Sequence[str],
    columns: Sequence[str],
    title: str,
    y_label: str,
    x_label: str,
) -> Path:
    """Draw scores from 0 (red) to 1 (green), the number in each cell; return `path`.

    Args:
        path: of the PNG.
        table: scores [rows][columns]; nan is left white.
        rows: names, the first on top.
        columns: names, from left to right.
        title: above the map.
        y_label: of the rows.
        x_label: of the columns.
    """
    size = 2.4 + 0.75 * len(columns), 1.5 + 0.4 * len(rows)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(table, aspect="auto", cmap="RdYlGn", vmin=0.0, vmax=1.0, alpha=0.7)
    for y, line in enumerate(table):
        for x, value in enumerate(line):
            if value == value:
                axes.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=8)
    axes.set_yticks(range(len(rows)), list(rows))
    axes.set_xticks(range(len(columns)), list(columns))
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.set_title(title, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_figure(path, dpi=110)
    return path
