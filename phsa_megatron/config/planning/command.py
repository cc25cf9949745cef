"""`phsa-train plan`: reads the arguments, plans, prints and writes."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console
from rich.progress import track

from phsa_megatron.config.errors import ConfigError
from phsa_megatron.config.planning.compare import compare, comparison_table, read_rows
from phsa_megatron.config.planning.machine import Machine
from phsa_megatron.config.planning.plot import figure_class, write_plot
from phsa_megatron.config.planning.report import as_json, points_table, print_plan, write_json
from phsa_megatron.config.planning.run_to_plan import run_to_plan
from phsa_megatron.config.planning.search import make_plan
from phsa_megatron.config.planning.sweep import Point, best_point, runs_by_context, runs_by_gpus
from phsa_megatron.config.schema import TrainConfig

_HELP = """\
Predict memory, communication and step time of every layout of a run on a cluster, and print the best few with
reasons. Needs no GPU and no torch. Shares and paths of data sources may be left out.

  phsa-train plan recipe=phsa_8b_pretrain_8gpu_h100_bf16_32k
  phsa-train plan recipe=phsa_8b_pretrain_8gpu_h100_bf16_32k cluster.num_nodes=128 \\
      optim.global_batch_sequences=512 --plot plan.png --gpu-hour-cost 2.5
"""

# Option, input of the machine, what it is.
_MACHINE_OPTIONS = (
    ("--nvlink", "nvlink_gb_s", "GB/s that a GPU sends inside its host"),
    ("--network", "network_gb_s", "GB/s that a GPU sends to other hosts"),
    ("--product-frac", "product_frac", "part of the measured product speed that a layer's products reach"),
    (
        "--host-layer-ms",
        "host_layer_ms",
        "milliseconds of Python in a layer's forward pass, without attention",
    ),
    ("--reserve-gib", "reserve_gib", "memory of a GPU to leave free"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `phsa-train plan` to a parser that takes overrides."""
    parser.add_argument("--top", type=int, default=3, metavar="N", help="layouts to print (3)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all printed numbers")
    parser.add_argument(
        "--plot",
        type=Path,
        metavar="FILE",
        help="draw tokens/s and cost against GPUs and context length (32k to 1M); needs matplotlib",
    )
    parser.add_argument("--gpu-hour-cost", type=float, metavar="USD", help="price of a GPU for an hour")
    parser.add_argument(
        "--plot-gpus", type=int, default=2048, metavar="N", help="most GPUs in the plot (2048)"
    )
    parser.add_argument(
        "--compare", type=Path, metavar="FILE", help="print predictions beside the measured runs of a file"
    )
    for option, name, meaning in _MACHINE_OPTIONS:
        parser.add_argument(option, type=float, dest=name, metavar="X", help=f"{meaning} (assumed)")


def description() -> str:
    """Return the text of --help."""
    return _HELP


def main(arguments: argparse.Namespace, console: Console) -> int:
    """Plan, print and write; returns the exit code: 1 if a comparison is out of tolerance.

    Raises:
        ConfigError: an argument cannot be used, or no layout keeps the rules.
    """
    if arguments.compare is not None:
        comparisons = [compare(row) for row in read_rows(arguments.compare)]
        console.print(comparison_table(comparisons))
        return 0 if all(one.within for one in comparisons) else 1
    given = {
        name: _positive(option, getattr(arguments, name))
        for option, name, _ in _MACHINE_OPTIONS
        if getattr(arguments, name) is not None
    }
    if arguments.gpu_hour_cost is not None:
        _positive("--gpu-hour-cost", arguments.gpu_hour_cost)
    if arguments.top < 1:
        raise ConfigError(f"--top {arguments.top}: print at least one layout")
    config = run_to_plan(arguments.overrides, arguments.recipes_dir)
    if arguments.plot is not None:
        figure_class()  # says at once if it is not there
        if arguments.plot_gpus < config.cluster.processes_per_node:
            raise ConfigError(
                f"--plot-gpus {arguments.plot_gpus}: a host has {config.cluster.processes_per_node} GPUs, "
                "and the plot counts whole hosts"
            )
    machine = Machine.of(config, **given)
    plan = make_plan(config, machine)
    points = list[Point]()
    if arguments.plot is not None:
        points = _plot(config, machine, arguments, console)
    if arguments.json is not None:
        write_json(arguments.json, as_json(plan, arguments.top, arguments.gpu_hour_cost, points))
    print_plan(plan, console, arguments.top, arguments.gpu_hour_cost)
    if points:
        console.print(points_table(points, arguments.gpu_hour_cost))
    for path in (arguments.plot, arguments.json):
        if path is not None:
            console.print(f"wrote {path}")
    return 0


def _positive(option: str, value: float) -> float:
    if not value > 0:
        raise ConfigError(f"{option} {value:g}: it must be more than 0")
    return value


def _plot(
    config: TrainConfig, machine: Machine, arguments: argparse.Namespace, console: Console
) -> list[Point]:
    gpu_runs, context_runs = runs_by_gpus(config, arguments.plot_gpus), runs_by_context(config)
    points = [
        best_point(run, machine)
        for run in track([*gpu_runs, *context_runs], "planning the plot", console=console, transient=True)
    ]
    gpus, contexts = points[: len(gpu_runs)], points[len(gpu_runs) :]
    title = f"{config.run.name}: predicted, the best layout that fits"
    write_plot(arguments.plot, gpus, contexts, title, arguments.gpu_hour_cost)
    return points
