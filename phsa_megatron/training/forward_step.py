"""The forward pass of a micro-batch and its loss, as megatron's schedules and CUDA graphs call it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from phsa_megatron.attention.added_losses import AddedLosses
from phsa_megatron.attention.max_logit import MaxLogitRecorder
from phsa_megatron.attention.punctuation import PunctuationTable
from phsa_megatron.attention.side_info import SelectionListener, SideInfo
from phsa_megatron.config.schema import TrainConfig
from phsa_megatron.config.topk_schedule import step_topk
from phsa_megatron.data.batches import Batch
from phsa_megatron.parallel.groups import Groups
from phsa_megatron.training.progress import Progress


@dataclass(frozen=True)
class Inputs:
    """A micro-batch on the model's device; b sequences of S tokens, S / CP of them this process's own.

    Attributes:
        tokens: int64 [b, S], all of each sequence, for the side information.
        cu_seqlens: int32 [N + 1], document boundaries in the b * S flattened tokens.
        own_tokens: int64 [b, S / CP].
        labels: int64 [b, S / CP].
        loss_mask: fp32 [b, S / CP].
        position_ids: int64 [b, S / CP].
        host_cu_seqlens: `cu_seqlens` on the CPU.
    """

    tokens: Tensor
    cu_seqlens: Tensor
    own_tokens: Tensor
    labels: Tensor
    loss_mask: Tensor
    position_ids: Tensor
    host_cu_seqlens: Tensor

    @classmethod
    def of_batch(cls, batch: Batch, groups: Groups) -> Inputs:
        """Returns a batch on this process's device, which is not waited for."""
        device, part = groups.device, groups.own_part
        names = ("own_tokens", "labels", "loss_mask", "position_ids")
        own = (batch.tokens, batch.labels, batch.loss_mask, batch.position_ids)
        return cls(
            tokens=batch.tokens.to(device, non_blocking=True),
            cu_seqlens=batch.cu_seqlens.to(device, non_blocking=True),
            host_cu_seqlens=batch.cu_seqlens,
            **{k: part(x).to(device, non_blocking=True) for k, x in zip(names, own, strict=True)},
        )


@dataclass(frozen=True)
class ForwardStep:
    """Takes a micro-batch through a model chunk: the `forward_step_func` of megatron's schedules.

    Attributes:
        config: the run.
        table: punctuation flags, on the device of the model.
        topk: selected blocks per query.
        groups: of this process; the model sees its part of every sequence, side information is whole.
        recorder: collects selection statistics, in evaluation.
        poisoned: an injected fault: multiply the loss by NaN.
        progress: told when a micro-batch goes forward and when it turns back.
        layer_topk: selected blocks per query of each layer, if they differ.
        is_dense: full causal attention in every layer.
        losses: collects the losses that layers add, in training.
        logits: sees queries and keys, in a step of training that measures the largest logit.
    """

    config: TrainConfig
    table: PunctuationTable
    topk: int
    groups: Groups
    recorder: SelectionListener | None = None
    poisoned: bool = False
    progress: Progress | None = None
    layer_topk: tuple[int, ...] = ()
    is_dense: bool = False
    losses: AddedLosses | None = None
    logits: MaxLogitRecorder | None = None

    @classmethod
    def of_step(
        cls,
        config: TrainConfig,
        table: PunctuationTable,
        groups: Groups,
        step: int,
        *,
        poisoned: bool = False,
        progress: Progress | None = None,
        recorder: SelectionListener | None = None,
        logits: MaxLogitRecorder | None = None,
    ) -> ForwardStep:
        """Returns the forward pass of a step of training, with what its schedule selects."""
        chosen = step_topk(config, step)
        return cls(
            config,
            table,
            chosen.topk,
            groups,
            recorder,
            poisoned,
            progress,
            chosen.by_layer,
            chosen.is_dense,
            AddedLosses.of(config),
            logits,
        )

    def __call__(self, batches: Iterator[Batch], model: torch.nn.Module) -> tuple[Tensor, Callable[..., Any]]:
        """Returns the chunk's output and the function that turns the last stage's output into the loss."""
        self.enter("forward")
        inputs = Inputs.of_batch(next(batches), self.groups)
        output = self.output(inputs, model)
        self.enter("backward")
        return output, partial(self.loss, inputs.loss_mask)

    def enter(self, phase: str) -> None:
        """Says that a pass begins, to whom it may concern."""
        if self.progress is not None:
            self.progress.enter(phase)

    def output(self, inputs: Inputs, model: torch.nn.Module) -> Tensor:
        """Returns the chunk's output: on the last stage the loss of each token, nats [b, S / CP]."""
        # Fresh for each micro-batch and each chunk: layers recompute from what their own call captured.
        side_info = SideInfo.build(
            inputs.tokens,
            inputs.cu_seqlens,
            self.table,
            self.config.attention,
            self.topk,
            self.recorder,
            self.layer_topk,
            self.is_dense,
            self.losses,
            host_cu_seqlens=inputs.host_cu_seqlens,
            logits=self.logits,
        )
        num_depths, mask = self.config.model.mtp_num_layers, inputs.loss_mask
        output: Tensor = model(
            inputs.own_tokens,
            inputs.position_ids,
            None,
            labels=inputs.labels,
            loss_mask=side_info.mtp_loss_mask(mask, num_depths) if num_depths else mask,
            packed_seq_params=side_info,
        )
        return output

    def loss(self, loss_mask: Tensor, losses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Sums the losses of a micro-batch.

        Args:
            loss_mask: fp32 [b, S / CP].
            losses: nats per token, [b, S / CP].

        Returns:
            The sum to differentiate (fp32), the number of tokens (int32; megatron divides gradients by its
            sum over micro-batches, data-parallel and context-parallel processes), and fp64 [2, b]: nats and
            tokens of this process's part of each sequence.
        """
        losses = losses.float().view_as(loss_mask)
        if self.poisoned:
            losses = losses * math.nan
        # A position without loss stays out even where its loss is infinite.
        counted = torch.where(loss_mask > 0, losses * loss_mask, 0.0)
        rows = torch.stack([counted.detach().double().sum(dim=1), loss_mask.double().sum(dim=1)])
        return counted.sum(), loss_mask.sum().to(torch.int32), rows
