"""FLOPs of a step of training, from the real lengths of its documents and the k of its layers.

A packed sequence is not one document: attention never leaves a document, so that two documents of half the
length need half the (query, key) pairs. Padding is no work that anybody wanted, and is not counted.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from phsa_megatron.config import flops
from phsa_megatron.config.schema import TrainConfig
from phsa_megatron.config.topk_schedule import StepTopk, step_topk


@dataclass(frozen=True)
class StepFlops:
    """Forward and backward FLOPs of some documents, without recomputation.

    Attributes:
        selected: with the attention that the run computes, selection included.
        dense: with full causal attention over the same documents.
    """

    selected: int
    dense: int


class DocumentFlops:
    """Counts FLOPs by document. What a length costs is computed once: packed text has few thousand lengths.

    Args:
        config: of the run.
        parameters: its parameter counts.
    """

    def __init__(self, config: TrainConfig, parameters: flops.ParameterCount) -> None:
        self._config = config
        self._parameters = parameters
        self._known: dict[tuple[int, StepTopk], StepFlops] = {}

    def of_step(self, document_tokens: Iterable[int], step: int) -> StepFlops:
        """Return the FLOPs of documents of these lengths in step `step`, counted from 1."""
        topk = step_topk(self._config, step)
        selected = dense = 0
        for num_tokens in document_tokens:
            key = num_tokens, topk
            counted = self._known.get(key)
            if counted is None:
                counted = self._known[key] = self._of_document(num_tokens, topk)
            selected += counted.selected
            dense += counted.dense
        return StepFlops(selected, dense)

    def _of_document(self, num_tokens: int, topk: StepTopk) -> StepFlops:
        model, attention = self._config.model, self._config.attention
        linear = 3 * flops.linear_flops(num_tokens, self._parameters)
        causal = flops.dense_layer_train_flops(num_tokens, model)
        layers = model.num_layers + model.mtp_num_layers
        dense = linear + layers * causal
        if topk.is_dense:
            return StepFlops(dense, dense)
        # Layers past the main stack select with the largest k.
        by_layer = topk.by_layer or (topk.topk,) * model.num_layers
        by_layer += (topk.topk,) * model.mtp_num_layers
        own = {k: flops.layer_train_flops(num_tokens, model, attention, k) for k in set(by_layer)}
        selected = linear + sum(
            causal if number in attention.dense_layers else own[k] for number, k in enumerate(by_layer, 1)
        )
        return StepFlops(selected, dense)
