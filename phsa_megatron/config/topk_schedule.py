"""k of each step of training: a pure function of the settings, the step and the layer.

Nothing of it is in a checkpoint: a run that goes on at step n selects what it would have selected at step n.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from phsa_megatron.config.schema import AttentionConfig, TopkSchedule, TrainConfig


@dataclass(frozen=True)
class StepTopk:
    """What the layers select in one step of training.

    Attributes:
        topk: k of all layers, or the largest of `by_layer`.
        by_layer: k of each layer of the main stack, if they differ; else empty.
        is_dense: full causal attention in all layers; k is not used.
    """

    topk: int
    by_layer: tuple[int, ...] = ()
    is_dense: bool = False

    @property
    def mean(self) -> float:
        """Return the mean of k over the layers; 0 if all are dense."""
        if self.is_dense:
            return 0.0
        return sum(self.by_layer) / len(self.by_layer) if self.by_layer else float(self.topk)


def changes_over_steps(attention: AttentionConfig) -> bool:
    """Return whether k is not the same in all steps."""
    scheduled = attention.topk_schedule != TopkSchedule.constant or attention.topk_dense_steps > 0
    return scheduled or attention.align_coeff > 0


def step_topk(config: TrainConfig, step: int) -> StepTopk:
    """Return what step `step`, counted from 1, selects.

    anneal: k falls by equal factors from topk_start in the first step to train_topk after topk_anneal_steps,
    rounded to whole blocks. random_step and random_layer draw from topk_choices; the draw depends on the
    seed of the run, the step and (random_layer) the layer. With align_coeff a share of the steps passes on
    full attention's output instead; it is drawn likewise.
    """
    attention, seed = config.attention, config.run.seed
    if step <= attention.topk_dense_steps or _is_full(attention, f"{seed}/{step}"):
        return StepTopk(attention.train_topk, is_dense=True)
    if attention.topk_schedule == TopkSchedule.anneal:
        return StepTopk(_annealed(attention, step - attention.topk_dense_steps))
    if attention.topk_schedule == TopkSchedule.random_step:
        return StepTopk(_drawn(attention, f"{seed}/{step}"))
    if attention.topk_schedule == TopkSchedule.random_layer:
        layers = range(1, config.model.num_layers + 1)
        by_layer = tuple(_drawn(attention, f"{seed}/{step}/{layer}") for layer in layers)
        return StepTopk(max(by_layer), by_layer)
    return StepTopk(attention.train_topk)


def _is_full(attention: AttentionConfig, name: str) -> bool:
    if not attention.align_coeff:
        return False
    return random.Random(f"full/{name}").random() < attention.align_full_frac


def _annealed(attention: AttentionConfig, step: int) -> int:
    start, end = attention.topk_start, attention.train_topk
    if start is None:  # refused by the rules; without them there is nothing to fall from
        return end
    progress = min(1.0, (step - 1) / attention.topk_anneal_steps)
    return round(start * math.exp(progress * math.log(end / start)))


def _drawn(attention: AttentionConfig, name: str) -> int:
    # A string seeds by its SHA-512: the same on every machine and in every process.
    return random.Random(f"topk/{name}").choice(attention.topk_choices)
