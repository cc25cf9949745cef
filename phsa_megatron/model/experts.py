"""Fresh weights of experts: a function of seed, layer and expert, whichever process holds it."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer


@contextmanager
def random_numbers_of_experts_apart() -> Iterator[None]:
    """Build models whose other weights do not depend on how many experts this process has."""
    original = SequentialMLP.__init__

    def init(self: SequentialMLP, *args: Any, **kwargs: Any) -> None:
        with torch.random.fork_rng(devices=[]):
            original(self, *args, **kwargs)

    SequentialMLP.__init__ = init
    try:
        yield
    finally:
        SequentialMLP.__init__ = original


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
