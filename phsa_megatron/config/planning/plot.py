"""Draws tokens a second and cost a token against the number of GPUs and the context length."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from phsa_megatron.config.errors import ConfigError
from phsa_megatron.config.planning.sweep import Point

_COLORS = {"phsa": "#1f77b4", "dense": "#d95f02"}


def write_plot(
    path: Path, gpus: list[Point], contexts: list[Point], title: str, gpu_hour_usd: float | None
) -> None:
    """Write the four panels; the ending of the file decides its format.

    Args:
        path: for example plan.png or plan.svg.
        gpus: points over numbers of GPUs.
        contexts: points over context lengths.
        title: what was planned.
        gpu_hour_usd: price of a GPU for an hour; None draws GPU-hours instead of money.

    Raises:
        ConfigError: matplotlib is not installed, or cannot write this kind of file.
    """
    figure = figure_class()(figsize=(11, 7.5), layout="constrained")
    axes = figure.subplots(2, 2)
    price = 1.0 if gpu_hour_usd is None else gpu_hour_usd
    unit = "GPU-hours a billion tokens" if gpu_hour_usd is None else "USD a billion tokens"
    sides: tuple[tuple[list[Point], str, Callable[[Point], int]], ...] = (
        (gpus, f"GPUs ({_length(gpus)} tokens a sequence)", lambda point: point.gpus),
        (contexts, f"tokens a sequence ({contexts[0].gpus} GPUs)", lambda point: point.seq_len_tokens),
    )
    for column, (points, label, x_of) in enumerate(sides):
        for row, (y_label, factor) in enumerate((("tokens/s", None), (unit, price))):
            axis = axes[row][column]
            _lines(axis, points, x_of, factor)
            axis.set_xlabel(label)
            axis.set_ylabel(y_label)
            if factor is not None and column == 0:
                axis.set_ylim(bottom=0)
            else:
                axis.set_yscale("log")
    figure.suptitle(title)
    try:
        figure.savefig(path, dpi=130)
    except (ValueError, OSError) as error:
        raise ConfigError(f"--plot {path}: {error}") from error


def _lines(axis: Any, points: list[Point], x_of: Callable[[Point], int], factor: float | None) -> None:
    xs = sorted({x_of(point) for point in points})
    for kind in dict.fromkeys(point.attention for point in points):
        drawn = [point for point in points if point.attention == kind and point.tokens_per_s is not None]
        ys = [
            point.tokens_per_s if factor is None else factor * (point.gpu_hours_per_billion or 0.0)
            for point in drawn
        ]
        axis.plot([x_of(point) for point in drawn], ys, marker="o", color=_COLORS[kind], label=kind)
    axis.set_xscale("log", base=2)
    axis.set_xticks(xs, [f"{x // 1024}k" if x >= 32768 else str(x) for x in xs])
    axis.grid(alpha=0.3)
    axis.legend()


def _length(points: list[Point]) -> str:
    return f"{points[0].seq_len_tokens:,}"


def figure_class() -> Any:
    """Return matplotlib's Figure, imported only now.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        return importlib.import_module("matplotlib.figure").Figure
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"--plot needs the package '{error.name}', which is not installed here; install matplotlib, or "
            "write the numbers with --json instead"
        ) from error
