"""The layout of our W&B workspace, as code: the same sections and plots for everybody, made by one command.

`LAYOUT` names rows of the metrics table, so that a renamed metric cannot leave an empty plot behind.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from phsa_megatron.config.errors import DeviceError
from phsa_megatron.config.schema import WandbConfig
from phsa_megatron.monitoring.metrics import METRICS, STEP_AXIS

NAME = "phsa-megatron"
_SMOOTHING = 0.9


@dataclass(frozen=True)
class Plot:
    """One plot over the steps.

    Attributes:
        title: What it shows.
        metrics: Rows of the metrics table; one with a placeholder draws a line for each of its names.
        smooth: Draw a running mean.
        log: Logarithmic vertical axis.
    """

    title: str
    metrics: tuple[str, ...]
    smooth: bool = False
    log: bool = False


LAYOUT: dict[str, tuple[Plot, ...]] = {
    "loss": (
        Plot("training loss", ("train/loss_nats",), smooth=True),
        Plot("validation loss", ("val/loss_nats",)),
        Plot("validation by domain, bits per byte", ("val/<domain>/bits_per_byte",)),
    ),
    "optimizer": (
        Plot("gradient norm", ("optim/grad_norm",), smooth=True, log=True),
        Plot("gradient norm by block", ("optim/<block>/grad_norm",), log=True),
        Plot("weight norm by block", ("optim/<block>/param_norm",)),
        Plot("largest attention logit", ("attention/layer_<n>/max_logit",)),
        Plot("learning rate", ("optim/lr",)),
    ),
    "speed": (
        Plot("utilization, FLOPs of the run's own attention", ("perf/mfu_selected_frac",), smooth=True),
        Plot("speed in FLOPs of full causal attention", ("perf/dense_equiv_tflops",), smooth=True),
        Plot("tokens/s", ("perf/tokens_per_s",), smooth=True),
        Plot(
            "where a step's time goes",
            ("perf/step_time_s", "perf/forward_s", "perf/backward_s", "perf/optimizer_s", "perf/data_wait_s"),
        ),
        Plot("of it, waiting for communication", ("perf/communication_s",)),
        Plot("share of all time in steps that count", ("perf/goodput_frac",)),
        Plot("slowest process over the median", ("perf/slowest_ratio",)),
        Plot("time of a save", ("checkpoint/save_s",)),
        Plot("peak memory", ("memory/peak_gib",)),
    ),
    "what PHSA selects": (
        Plot("attention on the selected blocks", ("attention/layer_<n>/selected_mass_frac",)),
        Plot("attention mass that is kept", ("attention/layer_<n>/kept_mass_frac",)),
        Plot("what selection adds, of what it could", ("attention/layer_<n>/oracle_gain_frac",)),
        Plot("punctuation in the selected blocks", ("attention/layer_<n>/selected_punctuation_frac",)),
        Plot("overlap with the query before", ("attention/layer_<n>/neighbour_overlap_frac",)),
        Plot("entropy of selection", ("attention/layer_<n>/selection_entropy_frac",)),
        Plot("distance of the selected blocks", ("attention/distance_log2_<m>_frac",)),
        Plot("queries that choose", ("attention/frac_queries_with_more_candidates_than_k",)),
    ),
}
"""Sections of the workspace and their plots."""


def build_workspace(settings: WandbConfig) -> Any:
    """Return the workspace as an object of the package wandb-workspaces; nothing is sent.

    Args:
        settings: `monitoring.wandb`: the project and whose it is.

    Raises:
        DeviceError: The package is not installed.
    """
    try:
        workspaces = importlib.import_module("wandb_workspaces.workspaces")
        reports = importlib.import_module("wandb_workspaces.reports.v2")
    except ImportError as error:
        raise DeviceError(
            f"a W&B workspace needs the package wandb-workspaces, which cannot be imported ({error}). "
            "Install it with: pip install 'phsa-megatron[workspace]'"
        ) from error

    def panel(plot: Plot) -> Any:
        patterns = [name for name in plot.metrics if "<" in name]
        what: dict[str, Any] = {"y": [name for name in plot.metrics if "<" not in name]}
        if patterns:
            what = {"metric_regex": "|".join(f"^{METRICS[name].pattern}$" for name in patterns)}
        return reports.LinePlot(
            title=plot.title,
            x=STEP_AXIS,
            log_y=plot.log,
            smoothing_factor=_SMOOTHING if plot.smooth else 0,
            smoothing_type="exponentialTimeWeighted" if plot.smooth else "none",
            **what,
        )

    sections = [
        workspaces.Section(name=title, panels=[panel(plot) for plot in plots], is_open=True)
        for title, plots in LAYOUT.items()
    ]
    return workspaces.Workspace(
        entity=settings.entity or "", project=settings.project, name=NAME, sections=sections
    )
