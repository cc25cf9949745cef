"""One optimizer step: micro-batches forward and backward, a look at the numbers, then new weights."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from phsa_megatron.attention.added_losses import AddedLosses
from phsa_megatron.attention.max_logit import MaxLogitRecorder
from phsa_megatron.attention.punctuation import PunctuationTable
from phsa_megatron.attention.side_info import SelectionListener
from phsa_megatron.config.errors import TrainingError
from phsa_megatron.config.schema import TrainConfig
from phsa_megatron.config.skip_list import number_at, skipped_ranges
from phsa_megatron.data.batches import Batch
from phsa_megatron.parallel.groups import Groups
from phsa_megatron.training.forward_step import ForwardStep
from phsa_megatron.training.optimizer import Parts, set_hyperparameters
from phsa_megatron.training.progress import Progress
from phsa_megatron.training.state import TrainState

_MAX_NAMES = 8
"""Parameters named in an error; a NaN usually reaches all of them, and the first few tell the story."""


@dataclass(frozen=True)
class StepResult:
    """What one step reports; equal on all processes."""

    loss_nats: float
    """Mean cross-entropy over the tokens of the global batch, before the update."""
    grad_norm: float
    """Global L2 norm of the gradient, before clipping."""
    num_zeros: int
    """Gradient elements that are exactly zero, after clipping; 0 in a step that is not recorded."""
    lr: float
    """Learning rate of the update."""
    num_tokens: int
    """Tokens with a loss in the global batch."""
    added: dict[str, float] = field(default_factory=dict)
    """Losses that layers added, by their names in the metrics table, before their weights."""
    rows: tuple[Tensor, ...] = field(default=(), compare=False, repr=False)
    """On the last pipeline stage, fp64 [2, b] per micro-batch of this process: nats and tokens of its part of
    each sequence; on the device."""


class NonFiniteStepError(TrainingError):
    """The loss or a gradient of a step is NaN or infinite. Weights and optimizer are as before the step.

    Attributes:
        step: number of the step.
        loss_nats: its loss.
        grad_norm: its global gradient norm.
        parameters: per rank, the first parameters whose gradient is not finite, in model order.
        sequences: training sequences whose loss is not finite.
    """

    def __init__(
        self,
        step: int,
        loss_nats: float,
        grad_norm: float,
        parameters: dict[int, list[str]],
        sequences: list[int],
    ) -> None:
        self.step = step
        self.loss_nats = loss_nats
        self.grad_norm = grad_norm
        self.parameters = parameters
        self.sequences = sequences
        super().__init__(self.describe())

    def evidence(self) -> dict[str, Any]:
        """Returns what is known about the step, as JSON values."""
        return {
            "loss_nats": repr(self.loss_nats),
            "grad_norm": repr(self.grad_norm),
            "parameters": {str(rank): names for rank, names in self.parameters.items()},
            "sequences": self.sequences,
        }

    def describe(self) -> str:
        """Returns what is known about the step, for a person."""
        lines = [
            f"step {self.step} stopped before the weights changed: loss {self.loss_nats}, "
            f"gradient norm {self.grad_norm}"
        ]
        if self.sequences:
            lines.append(f"training sequences with a loss that is not finite: {self.sequences}")
        for rank, names in sorted(self.parameters.items()):
            if names:
                lines.append(
                    f"rank {rank}, gradients that are not finite, in model order: {', '.join(names)}"
                )
        return "\n".join(lines)


def micro_batch_starts(config: TrainConfig, groups: Groups, consumed_sequences: int) -> list[int]:
    """Returns the first sequence of each micro-batch of this process in the step after `consumed_sequences`.

    Micro-batches go round the data-parallel processes, so that step n has the same sequences whatever the
    number of processes.
    """
    size = config.optim.micro_batch_sequences
    num_micro_batches = config.optim.global_batch_sequences // (size * groups.data_size)
    return [
        consumed_sequences + (i * groups.data_size + groups.data_rank) * size
        for i in range(num_micro_batches)
    ]


def forward_backward(
    parts: Parts, batches: list[Batch], forward_step: ForwardStep, *, forward_only: bool
) -> list[Tensor]:
    """Runs the micro-batches of one step through megatron's schedule for this layout.

    Returns:
        On the last pipeline stage, fp64 [2, b] per micro-batch: nats and tokens of this process's part of
        each sequence. Elsewhere nothing. Unless `forward_only`, gradients are summed, reduced and divided
        by the number of tokens.
    """
    if parts.graph is not None:
        parts.graph.release()
    rows: list[Tensor] = get_forward_backward_func()(
        forward_step_func=forward_step,
        # One iterator a chunk: with virtual stages each chunk goes through all micro-batches.
        data_iterator=[iter(batches) for _ in parts.model],
        model=parts.model,
        num_microbatches=len(batches),
        seq_length=parts.config.data.seq_len_tokens,
        micro_batch_size=batches[0].tokens.shape[0],
        forward_only=forward_only,
    )
    return rows


def train_step(
    parts: Parts,
    batches: list[Batch],
    table: PunctuationTable,
    state: TrainState,
    progress: Progress,
    recorder: SelectionListener | None = None,
    logits: MaxLogitRecorder | None = None,
) -> StepResult:
    """Makes the step after `state`, and moves `state` on.

    Args:
        parts: what is trained.
        batches: this process's micro-batches of the step, in order.
        table: punctuation flags on the model's device.
        state: counters; changed only if the step succeeds.
        progress: told of the phases of the step; has the injected faults.
        recorder: sees what the layers select in this step.
        logits: sees the layers' queries and keys in this step.

    Raises:
        NonFiniteStepError: the loss or the gradient norm is not finite; raised on all processes, with
            weights, optimizer and `state` as they were.
    """
    step = state.step + 1
    consumed = state.consumed_sequences + parts.config.optim.global_batch_sequences
    lr = set_hyperparameters(parts, consumed)
    forward_step = ForwardStep.of_step(
        parts.config,
        table,
        parts.groups,
        step,
        poisoned=progress.faults.happens("nan_loss", step),
        progress=progress,
        recorder=recorder,
        logits=logits,
    )
    parts.zero_grad()
    if parts.graph is not None and parts.graph.serves(forward_step):
        rows = parts.graph.run(parts.model[0], batches, forward_step)
    else:
        rows = forward_backward(parts, batches, forward_step, forward_only=False)
    progress.enter("optimizer")
    if progress.faults.happens("nan_grad", step):
        poison_gradient(parts)
    loss_nats, num_tokens = mean_loss(parts, rows)
    added = added_losses(parts, forward_step.losses)
    parts.optimizer.prepare_grads()
    grad_norm = float(parts.optimizer.get_grad_norm())
    if parts.groups.any_true(not (math.isfinite(loss_nats) and math.isfinite(grad_norm))):
        raise NonFiniteStepError(
            step, loss_nats, grad_norm, _bad_parameters(parts), _bad_sequences(parts, rows, state)
        )
    recorded = step % parts.config.monitoring.log_every_steps == 0 or step == parts.config.run.train_steps
    with parts.known_norm(grad_norm, count_zeros=recorded):
        _, _, num_zeros = parts.optimizer.step()
    state.step = step
    state.consumed_sequences = consumed
    state.consumed_tokens += num_tokens
    return StepResult(loss_nats, grad_norm, int(num_zeros or 0), lr, num_tokens, added, tuple(rows))


def mean_loss(parts: Parts, rows: list[Tensor]) -> tuple[float, int]:
    """Returns the loss over the global batch and its number of tokens, on every process."""
    totals = torch.zeros(2, dtype=torch.float64, device=parts.groups.device)
    if parts.groups.is_last_stage:
        totals = parts.groups.sum_over_data(torch.stack([r.sum(dim=1) for r in rows]).sum(dim=0))
    nats, num_tokens = parts.groups.from_last_stage(totals).tolist()
    # A batch without a single loss token is a legal oddity (all padding): no loss, no gradient.
    return (nats / num_tokens if num_tokens else 0.0), int(num_tokens)


def added_losses(parts: Parts, losses: AddedLosses | None) -> dict[str, float]:
    """Returns the means of the losses that layers added, over all tokens of the global batch. Collective."""
    if losses is None:
        return {}
    # Each process has its tokens, layers and heads, and no other process has them.
    sums = parts.groups.sum_over_world(losses.sums(parts.groups.device)) / parts.derived.tokens_per_step
    return dict(zip(losses.names, sums.tolist(), strict=True))


def bad_gradients(parts: Parts) -> list[str]:
    """Returns the parameters of this process whose gradient is not finite, in model order."""
    return [name for name, gradient in parts.gradient_sums() if not torch.isfinite(gradient).all()]


def _bad_parameters(parts: Parts) -> dict[int, list[str]]:
    names = bad_gradients(parts)
    mine = names[:_MAX_NAMES]
    if len(names) > _MAX_NAMES:
        mine.append(f"and {len(names) - _MAX_NAMES} more")
    everyone: list[list[str]] = [[] for _ in range(parts.groups.world_size)]
    dist.all_gather_object(everyone, mine)
    return dict(enumerate(everyone))


def _bad_sequences(parts: Parts, rows: list[Tensor], state: TrainState) -> list[int]:
    starts = micro_batch_starts(parts.config, parts.groups, state.consumed_sequences)
    mine = [
        first + offset
        for first, row in zip(starts, rows, strict=False)  # no rows except on the last stage
        for offset in (~torch.isfinite(row[0])).nonzero().flatten().tolist()
    ]
    everyone: list[list[int]] = [[] for _ in range(parts.groups.world_size)]
    dist.all_gather_object(everyone, mine)
    skipped = skipped_ranges(parts.config.data.skip_sequences)
    return sorted({number_at(position, skipped) for part in everyone for position in part})


def poison_gradient(parts: Parts) -> None:
    """Has the injected fault `nan_grad`: the gradient of a weight in the middle of the model becomes NaN."""
    gradients = [gradient for _, gradient in parts.gradient_sums()]
    gradients[len(gradients) // 2].fill_(math.nan)
