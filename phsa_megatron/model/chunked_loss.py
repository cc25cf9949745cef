"""The output layer and its cross-entropy a chunk of tokens at a time: whole logits never exist.

For Qwen3's 151,936 tokens of vocabulary the logits of 32,768 tokens are 10 GB in bf16 and 20 GB as the fp32
softmax. Here the logits of a chunk become losses and gradients while they exist, and are then dropped. The
gradient of the loss with respect to a logit is softmax minus one-hot, times what its token's loss counts:
with the loss mask known in the forward pass, gradients of hidden states and of the output weight are made
there, without a second product for the logits. What the sum of losses is multiplied by afterwards is one
number, and scales both in the backward pass.

Letters: T tokens of a micro-batch on this process, h hidden size, V rows of the output weight on this
tensor-parallel process.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor

_LARGEST_UNEVENNESS = 1e-5
"""Relative distance of a token's gradient from that of the others that fp32 can explain."""


class ChunkedLossGPT(GPTModel):  # type: ignore[misc]
    """A GPTModel that returns the loss of every token without ever holding all logits.

    Without labels it returns logits, as megatron's does.
    """

    loss_chunk_tokens = 4096
    """Tokens whose logits exist at once; set by the factory."""

    def _postprocess(self, hidden_states: Tensor, labels: Tensor | None = None, **given: Any) -> Tensor:
        """Return losses fp32 [b, S] for hidden states [S, b, h], labels and loss mask [b, S]."""
        if labels is None or not self.post_process:
            unchanged: Tensor = super()._postprocess(hidden_states=hidden_states, labels=labels, **given)
            return unchanged
        weight = (
            self.shared_embedding_or_output_weight()
            if self.share_embeddings_and_output_weights
            else self.output_layer.weight
        )
        group = self.pg_collection.tp
        if self.config.sequence_parallel:
            hidden_states = gather_from_sequence_parallel_region(hidden_states, group=group)
        elif group.size() > 1:
            hidden_states = copy_to_tensor_model_parallel_region(hidden_states, group=group)
        loss_mask = given.get("loss_mask")
        flat_mask = None if loss_mask is None else loss_mask.transpose(0, 1).reshape(-1)
        losses = linear_cross_entropy(
            hidden_states.reshape(-1, hidden_states.shape[-1]),
            weight,
            labels.transpose(0, 1).reshape(-1),
            flat_mask,
            self.loss_chunk_tokens,
            group if group.size() > 1 else None,
        )
        return losses.view(labels.shape[1], labels.shape[0]).transpose(0, 1)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    loss_mask: Tensor | None,
    chunk_tokens: int,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Return the cross-entropy of every token, fp32 [T], in nats.

    Logits are in the dtype of `hidden`, softmax and loss in fp32, and the sum of the weight's gradient over
    chunks is fp32. Memory beyond the results: a few matrices of chunk_tokens x V, and fp32 [V, h].

    Args:
        hidden: [T, h].
        weight: [V, h]; with `group` this process's rows of it, process after process.
        labels: int64 [T], rows of the whole weight.
        loss_mask: fp32 [T], what the loss of each token counts in the sum that is differentiated; None is 1
            for all. The caller multiplies losses by it; the gradient of a loss must be proportional to it.
        chunk_tokens: tokens whose logits exist at once.
        group: tensor-parallel processes that share the vocabulary; hidden's gradient is this process's part,
            to be summed over them by what gave `hidden`.
    """
    if loss_mask is None:
        loss_mask = torch.ones(labels.shape, device=hidden.device)
    # Inside of forward gradients are off, and what inputs need is said whether they are wanted or not.
    wants_gradient = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    arguments = hidden, weight, labels, loss_mask.float(), chunk_tokens, group, wants_gradient
    losses: Tensor = _LinearCrossEntropy.apply(*arguments)  # type: ignore[no-untyped-call]
    return losses


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        loss_mask: Tensor,
        chunk_tokens: int,
        group: dist.ProcessGroup | None,
        wants_gradient: bool,
    ) -> Tensor:
        losses = torch.empty(labels.shape, dtype=torch.float32, device=hidden.device)
        if wants_gradient:
            hidden_grad = torch.empty_like(hidden)
            weight_grad = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        statistics, gradient = (_on(hidden.device, f) for f in (row_statistics, logits_gradient))
        row_labels = labels if group is None else labels - group.rank() * weight.shape[0]
        for start in range(0, len(labels), chunk_tokens):
            part = slice(start, start + chunk_tokens)
            logits = hidden[part] @ weight.t()
            highest, total, target = statistics(logits, row_labels[part])
            if group is not None:
                highest, total, target = _over_vocabulary(highest, total, target, group)
            log_total = highest + total.log()
            losses[part] = log_total - target
            if wants_gradient:
                logits_grad = gradient(logits, log_total, row_labels[part], loss_mask[part])
                del logits
                torch.mm(logits_grad, weight, out=hidden_grad[part])
                _add_product(weight_grad, logits_grad, hidden[part])
                del logits_grad
        if wants_gradient:
            ctx.save_for_backward(hidden_grad, weight_grad, loss_mask)
            ctx.weight_dtype = weight.dtype
        return losses

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden_grad, weight_grad, loss_mask = ctx.saved_tensors
        scale = (grad * loss_mask).sum() / loss_mask.square().sum().clamp(min=1e-30)
        distance = (grad - scale * loss_mask).abs().max()
        # NaN passes: the step looks at the loss, and says more.
        even = (distance <= _LARGEST_UNEVENNESS * scale.abs()) | ~torch.isfinite(distance)
        _check(even)
        hidden_part = _scaled(hidden_grad, scale, hidden_grad.dtype)
        return hidden_part, _scaled(weight_grad, scale, ctx.weight_dtype), *[None] * 5


def _scaled(matrix: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return matrix * scale, rounded once, to dtype.

    Not of no dimension: such a scale would be rounded to bf16 first, and be wrong alike in every element.
    """
    scaled = torch.empty(matrix.shape, dtype=dtype, device=matrix.device)
    torch.mul(matrix, scale.reshape(1, 1), out=scaled)  # no second fp32 matrix
    return scaled


def _check(even: Tensor) -> None:
    message = (
        "compute.loss=chunked: the gradient of a token's loss is not proportional to the loss mask that the "
        "model was called with; pass the mask that the losses are multiplied by"
    )
    if even.is_cuda:
        torch._assert_async(even, message)  # does not wait for the device
    elif not even:
        raise ValueError(message)


def _over_vocabulary(
    highest: Tensor, total: Tensor, target: Tensor, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the three statistics over the rows of all processes."""
    own = highest.clone()
    dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=group)
    sums = torch.stack((total * (own - highest).exp(), target))
    dist.all_reduce(sums, group=group)
    return highest, sums[0], sums[1]


def row_statistics(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return fp32 [n] each: the largest logit, the sum of exp(logit - largest), and the label's logit.

    The last is 0 where the label is not among these columns. Logits [n, V], labels int64 [n].
    """
    values = logits.float()
    highest = values.amax(dim=-1)
    total = (values - highest[:, None]).exp().sum(dim=-1)
    here = (labels >= 0) & (labels < logits.shape[1])
    chosen = logits.gather(1, torch.where(here, labels, 0)[:, None]).squeeze(1).float()
    return highest, total, torch.where(here, chosen, 0.0)


def logits_gradient(logits: Tensor, log_total: Tensor, labels: Tensor, loss_mask: Tensor) -> Tensor:
    """Return (softmax - one-hot) * loss_mask in the dtype of the logits [n, V]."""
    columns = torch.arange(logits.shape[1], device=logits.device)
    probability = (logits.float() - log_total[:, None]).exp()
    one_hot = columns[None, :] == labels[:, None]
    return ((probability - one_hot.float()) * loss_mask[:, None]).to(logits.dtype)


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    # Not at import: the compiler takes seconds to load. On the CPU, functions run as they are.
    return torch.compile(function)


def _on(device: torch.device, function: Callable[..., Any]) -> Callable[..., Any]:
    return _compiled(function) if device.type == "cuda" else function


def _add_product(total: Tensor, logits_grad: Tensor, hidden: Tensor) -> None:
    """Add logits_grad^T @ hidden to the fp32 sum."""
    if not hidden.is_cuda or hidden.dtype == torch.float32:
        total.addmm_(logits_grad.t().float(), hidden.float())
    elif _adds_in_one_product(hidden.device, hidden.dtype):
        torch.addmm(total, logits_grad.t(), hidden, out_dtype=torch.float32, out=total)
    else:
        total += torch.mm(logits_grad.t(), hidden, out_dtype=torch.float32)


@cache
def _adds_in_one_product(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether this torch adds a product of bf16 matrices to an fp32 matrix; older ones refuse."""
    ones, total = torch.ones(16, 16, dtype=dtype, device=device), torch.ones(16, 16, device=device)
    try:
        torch.addmm(total, ones, ones, out_dtype=torch.float32, out=total)
    except RuntimeError:
        return False
    return bool((total == 17).all())
