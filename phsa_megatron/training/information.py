"""What is measured on sampled queries of a step of training: information loss, and the largest logit."""

from __future__ import annotations

import math

from phsa_megatron.attention.information_loss import InformationRecorder
from phsa_megatron.attention.max_logit import MaxLogitRecorder
from phsa_megatron.config.schema import TrainConfig
from phsa_megatron.config.topk_schedule import step_topk
from phsa_megatron.parallel.groups import Groups


def recorder_of_step(config: TrainConfig, groups: Groups, step: int) -> InformationRecorder | None:
    """Return the recorder that rides on step `step`; None if it is not measured, or selects nothing."""
    every = config.monitoring.information_every_steps
    if not every or step % every or step_topk(config, step).is_dense:
        return None
    return new_recorder(config, groups, config.monitoring.information_rows)


def new_recorder(config: TrainConfig, groups: Groups, max_rows: int) -> InformationRecorder:
    """Return an empty recorder for this process's heads."""
    heads = config.model.num_query_heads
    first = groups.collection.tp.rank() * (heads // config.parallel.tensor_size)
    return InformationRecorder(config.model.num_layers, heads, first, max_rows)


def metrics(recorder: InformationRecorder, groups: Groups) -> dict[str, float]:
    """Return the shares of all processes under their names in the metrics table. Collective.

    A share of nothing, such as the gain where no query had a choice, is left out.
    """
    sums = groups.sum_over_world(recorder.sums.to(groups.device))
    values = {f"attention/{name}": value for name, value in vars(recorder.total(sums)).items()}
    for number, layer in recorder.layers(sums).items():
        for name in ("kept_mass_frac", "block_recall_frac", "oracle_gain_frac"):
            values[f"attention/layer_{number}/{name}"] = getattr(layer, name)
    return {name: value for name, value in values.items() if math.isfinite(value)}


def logits_of_step(config: TrainConfig, groups: Groups, step: int) -> MaxLogitRecorder | None:
    """Return what sees the queries and keys of step `step`; None if the largest logit is not measured."""
    every = config.monitoring.max_logit_every_steps
    if not every or step % every:
        return None
    return MaxLogitRecorder(config.model.num_layers, groups.device, config.monitoring.max_logit_rows)


def logit_metrics(logits: MaxLogitRecorder, groups: Groups) -> dict[str, float]:
    """Return the largest logits over all processes under their names in the metrics table. Collective."""
    by_layer = groups.max_over_world(logits.maxima).tolist()
    values = {"attention/max_logit": max(by_layer)}
    for number, value in enumerate(by_layer, start=1):
        values[f"attention/layer_{number}/max_logit"] = value
    return {name: value for name, value in values.items() if math.isfinite(value)}
