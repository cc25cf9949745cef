"""Losses that layers add to the cross-entropy of a step, and how they reach its backward pass.

A layer hands its loss to the output of its attention: the output goes on unchanged, and when its gradient
comes back, the loss has its turn. So a loss needs no place in megatron's schedules, and pipelines,
recomputation and micro-batches work as for any other operation. Only a pass with gradients counts: a
recomputed layer runs twice, once without.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from phsa_megatron.config.schema import Selector, TrainConfig
from phsa_megatron.config.selector_kinds import learned_selector

ALIGN, INDEX = "train/align_loss", "train/index_kl_nats"
"""The losses, by their names in the metrics table."""


@dataclass(frozen=True)
class _Kind:
    """Weight in the step's loss; and the share of one layer's one feature or head in the mean over all."""

    coeff: float
    share: float


class AddedLosses:
    """The added losses of one step of this process.

    They are means over tokens, layers, and features or key-value heads. The gradient is divided by the number
    of tokens with a cross-entropy, as that of the cross-entropy is; what is logged, by that of all tokens.
    """

    def __init__(self, kinds: dict[str, _Kind]) -> None:
        self._kinds = kinds
        self._sums: dict[str, Tensor] = {}

    @classmethod
    def of(cls, config: TrainConfig) -> AddedLosses | None:
        """Return what a step of a run collects; None if its layers add no loss."""
        model, attention = config.model, config.attention
        layers = model.num_layers + model.mtp_num_layers
        kinds = {}
        if attention.align_coeff:
            sparse_layers = layers - len(attention.dense_layers)
            features = model.num_query_heads * model.head_dim
            kinds[ALIGN] = _Kind(attention.align_coeff, 1 / max(1, sparse_layers * features))
        if learned_selector(attention) == Selector.indexer:
            kinds[INDEX] = _Kind(attention.indexer_coeff, 1 / (layers * model.num_kv_heads))
        return cls(kinds) if kinds else None

    def wants(self, name: str) -> bool:
        """Return whether this pass trains a loss: it is asked for, and gradients are recorded."""
        return name in self._kinds and torch.is_grad_enabled()

    def add(self, out: Tensor, name: str, total: Tensor) -> Tensor:
        """Return `out`, whose backward pass also differentiates a layer's loss.

        Args:
            out: the layer's attention output.
            name: of the loss.
            total: its sum over this process's tokens, and features or heads of this layer.
        """
        kind = self._kinds[name]
        part = total * kind.share
        self._sums[name] = self._sums.get(name, 0.0) + part.detach().double()
        joined: Tensor = _WithLoss.apply(out, part * kind.coeff)  # type: ignore[no-untyped-call]
        return joined

    def sums(self, device: torch.device) -> Tensor:
        """Return fp64 [losses]: sums over this process's tokens, in the order of `names`."""
        zero = torch.zeros((), dtype=torch.float64, device=device)
        return torch.stack([self._sums.get(name, zero).to(device) for name in self._kinds])

    @property
    def names(self) -> list[str]:
        """Return the names of the losses."""
        return list(self._kinds)


class _WithLoss(torch.autograd.Function):
    """Identity on an output that gives a loss the gradient 1."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, loss: Tensor) -> Tensor:
        ctx.loss_like = torch.empty_like(loss, device="meta"), loss.device
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        like, device = ctx.loss_like
        return gradients[0], torch.ones((), dtype=like.dtype, device=device)
