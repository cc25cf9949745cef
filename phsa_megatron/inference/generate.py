"""Continue a prompt with a model as it stands in training: one full forward pass per new token.

No key-value cache: a sample at the end of a run needs none, and what it shows is exactly the attention that
was trained. Works under every layout, because it goes through megatron's own schedule.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from phsa_megatron.attention.punctuation import PunctuationTable
from phsa_megatron.attention.side_info import SideInfo
from phsa_megatron.config.schema import TrainConfig
from phsa_megatron.config.selector_kinds import inference_topk
from phsa_megatron.parallel.groups import Groups

# Sequences are padded to a multiple of this with a document of its own, which no earlier token can see: few
# different shapes, and every tensor-parallel size divides each context-parallel process's part under sequence
# parallelism.
_LENGTH_MULTIPLE = 64


def generate(
    model: Sequence[torch.nn.Module],
    prompt: Sequence[int],
    num_tokens: int,
    *,
    config: TrainConfig,
    groups: Groups,
    table: PunctuationTable,
    vocab_size: int,
    eod_id: int | None = None,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[int]:
    """Return the tokens that follow `prompt`, at most `num_tokens`. Every process of the run must call it.

    Nothing of the training changes: modes, random generators and gradients are as before.

    Args:
        model: this process's chunks, wrapped for data parallelism or not.
        prompt: token ids of one document's start, at least one.
        num_tokens: most tokens to generate.
        config: the recipe; `attention.infer_topk` is used.
        groups: of this process.
        table: punctuation flags, on the device of the model.
        vocab_size: ids the tokenizer knows; rows above them are padding and are never generated.
        eod_id: stop after this token, which is part of the result; None never stops early.
        temperature: 0 takes the most likely token (the lowest id among equals); else samples.
        seed: of the sampling, which has its own generator.

    Raises:
        ValueError: the prompt is empty, or an argument is out of its range.

    Deterministic for equal arguments and weights.
    """
    if not prompt:
        raise ValueError("the prompt is empty: give at least one token, such as the end-of-document token")
    if temperature < 0 or num_tokens < 0 or not vocab_size >= 1:
        raise ValueError(
            f"num_tokens={num_tokens} and temperature={temperature} must not be negative, "
            f"vocab_size={vocab_size} must be at least 1"
        )
    generator = torch.Generator().manual_seed(seed)
    tokens = list(prompt)
    with _training_state_kept(model), torch.no_grad():
        for _ in range(num_tokens):
            logits = _next_logits(model, tokens, config, groups, table)
            chosen = torch.zeros(1, dtype=torch.int64)
            if logits is not None:
                chosen = _choose(logits[:vocab_size].float().cpu(), temperature, generator)
            tokens.append(int(groups.from_last_stage(chosen.to(groups.device)).item()))
            if tokens[-1] == eod_id:
                break
    return tokens[len(prompt) :]


def _choose(logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """Return the next token int64 [1], from logits fp32 [vocab] on the CPU."""
    if temperature == 0:
        # argmax promises no order among equals; the first maximum is the lowest id.
        return (logits == logits.max()).nonzero()[0]
    return torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)


def _next_logits(
    model: Sequence[torch.nn.Module],
    tokens: list[int],
    config: TrainConfig,
    groups: Groups,
    table: PunctuationTable,
) -> Tensor | None:
    """Return the logits [padded vocab] after the last token; None where this process has no output layer."""
    unit = _LENGTH_MULTIPLE
    if groups.context_size > 1:
        unit = math.lcm(unit, 2 * config.attention.block_tokens) * groups.context_size
    length = -(-len(tokens) // unit) * unit
    padded = torch.zeros(1, length, dtype=torch.int64)
    padded[0, : len(tokens)] = torch.tensor(tokens)
    boundaries = torch.tensor([0, len(tokens), length], dtype=torch.int32)
    settings = config.attention
    topk = inference_topk(settings)
    padded, boundaries = padded.to(groups.device), boundaries.to(groups.device)
    positions = torch.arange(length, device=groups.device).unsqueeze(0)

    def forward_step(_: Any, chunk: torch.nn.Module) -> tuple[Tensor, Any]:
        side_info = SideInfo.build(padded, boundaries, table, settings, topk)
        own = groups.own_part(padded), groups.own_part(positions)
        output, logits = _forward(chunk, *own, side_info, config.model.mtp_num_layers > 0)
        return output, partial(_at_token, logits, groups.own_part(positions)[0] == len(tokens) - 1)

    collected: list[Tensor] = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[None for _ in model],
        model=list(model),
        # megatron's interleaved schedule needs as many micro-batches as stages; they are all this one.
        num_microbatches=config.parallel.pipeline_size if len(model) > 1 else 1,
        seq_length=length,
        micro_batch_size=1,
        forward_only=True,
        collect_non_loss_data=True,
    )
    # One context-parallel process has the token, the others add zeros.
    return groups.sum_over_context(collected[-1]) if collected else None


def _at_token(logits: list[Tensor], is_wanted: Tensor, output: Tensor, non_loss_data: bool = True) -> Tensor:
    """Return the logits [padded vocab] of the one wanted position, 0 where this process does not have it.

    The schedule calls it on the last stage.
    """
    return logits[-1].masked_fill(~is_wanted[:, None], 0.0).sum(0)


def _forward(
    chunk: torch.nn.Module, tokens: Tensor, positions: Tensor, side_info: SideInfo, predicts_further: bool
) -> tuple[Tensor, list[Tensor]]:
    """Return (the chunk's output, its logits [S / CP, padded vocab] if it has an output layer).

    Logits are taken where the output layer leaves them. A model with multi-token prediction computes its
    losses on the way and needs labels for that; the main stack's logits are the output layer's last result.
    """
    logits: list[Tensor] = []
    hooks = [
        module.register_forward_hook(lambda _module, _args, result: logits.append(result[0][:, 0]))
        for name, module in chunk.named_modules()
        if name.rsplit(".", 1)[-1] == "output_layer"
    ]
    try:
        output = chunk(
            tokens,
            positions,
            None,
            labels=tokens if predicts_further else None,
            packed_seq_params=side_info,
            runtime_gather_output=True,
        )
    finally:
        for hook in hooks:
            hook.remove()
    return output, logits


@contextmanager
def _training_state_kept(model: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Put the model into evaluation mode, and back; restore torch's random state."""
    modes = [(module, module.training) for chunk in model for module in chunk.modules()]
    cpu_state = torch.get_rng_state()
    cuda_state = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    for chunk in model:
        chunk.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        torch.set_rng_state(cpu_state)
        if cuda_state is not None:
            torch.cuda.set_rng_state(cuda_state)
