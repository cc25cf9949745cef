"""Norms of gradients and weights by block of the model: embedding, each layer, final norm, output layer."""

from __future__ import annotations

import re

import torch
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared
from torch import Tensor

from phsa_megatron.config.schema import TrainConfig
from phsa_megatron.training.optimizer import Parts

_LAYER = re.compile(r"(?:chunk\d+\.)?decoder\.layers\.(\d+)\.")
_DEPTH = re.compile(r"(?:chunk\d+\.)?mtp\.layers\.(\d+)\.")


def block_names(config: TrainConfig) -> list[str]:
    """Returns the blocks of a model, from its input to its output; a tied output layer is the embedding."""
    layers = [f"layer_{number}" for number in range(1, config.model.num_layers + 1)]
    depths = [f"mtp_{number}" for number in range(1, config.model.mtp_num_layers + 1)]
    return ["embedding", *layers, "final_norm", *depths, "output"]


def block_norms(parts: Parts, grad_norm: float) -> dict[str, dict[str, float]]:
    """Returns `grad_norm` before clipping and `param_norm` of each block, after a step. Collective.

    To be called before the gradients are cleared. Every element counts once, whatever processes hold copies
    or shards of it. A block without weights of its own, such as a tied output layer, is left out.

    Args:
        parts: as the step left them: gradients are clipped in place.
        grad_norm: of all weights, before clipping.
    """
    limit = parts.config.optim.clip_grad_norm
    # As megatron clips; undone here, so that the squares add up to grad_norm's.
    unclip = max(1.0, (grad_norm + 1e-6) / limit) if limit > 0 else 1.0
    names = block_names(parts.config)
    sums = torch.zeros(len(names), 3, dtype=torch.float64, device=parts.groups.device)
    for name, parameter in parts.named_parameters():
        owned = _owned(parts, parameter)
        if owned is None:
            continue
        gradient, weight, num_copies = owned
        row = sums[names.index(_block_of(name, parts))]
        row[0] += torch.linalg.vector_norm(gradient, dtype=torch.float64).square() / num_copies
        row[1] += torch.linalg.vector_norm(weight, dtype=torch.float64).square() / num_copies
        row[2] += 1
    return {
        name: {"grad_norm": unclip * grad**0.5, "param_norm": weight**0.5}
        for name, (grad, weight, count) in zip(names, parts.groups.sum_over_world(sums).tolist(), strict=True)
        if count
    }


def norm_metrics(parts: Parts, grad_norm: float) -> dict[str, float]:
    """Returns `block_norms` under their names in the metrics table. Collective."""
    return {
        f"optim/{block}/{name}": value
        for block, norms in block_norms(parts, grad_norm).items()
        for name, value in norms.items()
    }


def _owned(parts: Parts, parameter: torch.nn.Parameter) -> tuple[Tensor, Tensor, int] | None:
    """Returns what this process counts of a parameter: gradient, weight, and how many processes count it."""
    if not (
        parameter.requires_grad
        and param_is_not_shared(parameter)
        and param_is_not_tensor_parallel_duplicate(parameter)
    ):
        return None
    gradient, weight = parameter.main_grad, parameter.detach()  # type: ignore[attr-defined]
    if parts.config.parallel.distributed_optimizer:
        for optimizer in parts.optimizer.chained_optimizers:
            if parameter in optimizer.model_param_gbuf_map:  # it knows those of which it has a shard
                buffer, dtype, bucket = optimizer.model_param_gbuf_map[parameter]
                span = optimizer.gbuf_ranges[buffer][dtype][bucket]["param_map"][parameter]["param"]
                return gradient.view(-1)[span.start : span.end], weight.view(-1)[span.start : span.end], 1
        return None
    collection = parts.groups.collection
    is_expert = not getattr(parameter, "allreduce", True)
    return gradient, weight, int((collection.expt_dp if is_expert else collection.dp_cp).size())


def _block_of(name: str, parts: Parts) -> str:
    """Returns the block of a parameter of this process; layers are numbered over all pipeline stages."""
    chunk = int(name[5 : name.index(".")]) if name.startswith("chunk") else 0
    if match := _LAYER.match(name):
        layers = parts.modules[chunk].decoder.layers  # type: ignore[union-attr]
        return f"layer_{layers[int(match[1])].layer_number}"  # type: ignore[index, union-attr]
    if match := _DEPTH.match(name):
        return f"mtp_{int(match[1]) + 1}"
    if "final_layernorm" in name:
        return "final_norm"
    return "output" if "output_layer" in name else "embedding"
