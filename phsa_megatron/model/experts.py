"""Fresh weights of experts: a function of seed, layer and expert, whichever process holds it."""

from __future__ import annotations

import zlib

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.moe.moe_layer import MoELayer


@torch.no_grad()
def draw_expert_weights(model: GPTModel, seed: int) -> None:
    """Draw the weights of this process's experts anew.

    Weights are drawn on the CPU, where megatron gives every process the same random numbers: the experts of
    one expert-parallel process would start equal to those of the next.

    Args:
        model: with megatron's own fresh weights.
        seed: `run.seed`.
    """
    for name, layer in model.named_modules():
        if not isinstance(layer, MoELayer):
            continue
        stack = "prediction" if name.startswith("mtp.") else "decoder"
        for expert, mlp in zip(layer.local_expert_indices, layer.experts.local_experts, strict=True):
            place = f"{seed}/{stack}/{layer.layer_number}/{expert}"
            for label, linear, draw in (
                ("in", mlp.linear_fc1, layer.config.init_method),
                ("out", mlp.linear_fc2, layer.config.output_layer_init_method),
            ):
                # An expert is whole in one process.
                whole = torch.empty(linear.weight.shape)
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(zlib.crc32(f"{place}/{label}".encode()))
                    draw(whole)
                linear.weight.copy_(whole)
