"""The same tokens through megatron's model and transformers': a conversion ends with the largest difference.

Both models are opened in fp32, one after the other. Dense attention is compared first, which shows that the
weights are in their places; a wrong place changes logits by about as much as they are large. With PHSA both
sides also select blocks: there near ties may fall differently, so this difference is printed, not judged.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from phsa_megatron.attention.punctuation import PunctuationTable
from phsa_megatron.attention.side_info import SideInfo
from phsa_megatron.config.errors import CheckpointError, DeviceError
from phsa_megatron.config.schema import AttentionConfig, AttentionKind, Dtype, Selector, TrainConfig
from phsa_megatron.config.selector_kinds import inference_topk
from phsa_megatron.convert.checkpoint_weights import on_one_cpu
from phsa_megatron.parallel.groups import initialize
from phsa_megatron.training.weights import load_model

TOLERANCE_FRAC = 1e-3
"""Largest accepted difference with dense attention, as a share of the largest logit.

Rounding: a logit is a sum of some hundred fp32 products at each of a few hundred operations in a row, which
leaves about 1e-5; a weight in a wrong place leaves about 1. The limit is between them, far from both.
"""
_BLOCKS_TO_CHOOSE_FROM = 16
_NUM_COMPARED = 64


@dataclass(frozen=True)
class Difference:
    """Logits of both models for the same tokens.

    Attributes:
        attention: what both computed.
        largest: largest absolute difference.
        scale: largest absolute logit.
        num_tokens: tokens of the text.
    """

    attention: str
    largest: float
    scale: float
    num_tokens: int

    def __str__(self) -> str:
        return (
            f"logits after {self.num_tokens} tokens, {self.attention}: largest difference {self.largest:.3g} "
            f"(logits up to {self.scale:.3g})"
        )


def require_transformers() -> None:
    """Refuse early where the comparison cannot be made.

    Raises:
        DeviceError: transformers is not installed.
    """
    if importlib.util.find_spec("transformers") is None:
        raise DeviceError(
            "the logits are compared with those of transformers, which is not installed: install "
            "phsa-megatron[convert], or give --no-compare to convert without the proof"
        )


def report(
    checkpoint: Path, config: TrainConfig, folder: Path, table: PunctuationTable, *, compare: bool
) -> None:
    """Print how a conversion ends: its punctuation set, and the differences or that nobody looked.

    Raises:
        CheckpointError: the models are not the same; see `compare_logits`.
    """
    print(f"punctuation set {table.name}, sha256 {table.sha256}")
    if not compare:
        print("logits were not compared (--no-compare)")
        return
    for difference in compare_logits(checkpoint, config, folder, table):
        print(difference)


def compare_logits(
    checkpoint: Path, config: TrainConfig, folder: Path, table: PunctuationTable, seed: int = 0
) -> list[Difference]:
    """Return the differences with dense attention and, if the run selects blocks, with PHSA.

    Args:
        checkpoint: a committed checkpoint.
        config: its settings; PHSA's are taken from here on both sides.
        folder: config.json and *.safetensors.
        table: punctuation set.
        seed: of the tokens.

    Raises:
        CheckpointError: with dense attention the difference is not rounding.
    """
    config = on_one_cpu(config, Dtype.fp32)
    attention = config.attention
    selects = attention.kind == AttentionKind.phsa and attention.selector != Selector.dense_window
    tokens = _tokens(attention, config.model.vocab_size, table, seed)
    ours = _megatron(checkpoint, config, table, tokens, [True, False] if selects else [True])
    theirs = _transformers(folder, attention if selects else None, table, tokens)
    names = ["dense attention", f"{attention.selector} with k = {inference_topk(attention)}"]
    found = [
        Difference(name, float((a - b).abs().max()), float(b.abs().max()), tokens.shape[1])
        for name, a, b in zip(names, ours, theirs, strict=False)
    ]
    dense = found[0]
    if not dense.largest <= TOLERANCE_FRAC * dense.scale:  # also where it is not a number
        raise CheckpointError(
            f"{folder} and {checkpoint} are not the same model: {dense}, more than {TOLERANCE_FRAC:g} of them"
        )
    return found


def _tokens(attention: AttentionConfig, vocab_size: int, table: PunctuationTable, seed: int) -> Tensor:
    """Return int64 [1, S] random tokens, an eighth of them punctuation; so long that blocks are chosen."""
    windows = attention.init_tokens + attention.local_tokens
    chosen = (inference_topk(attention) + _BLOCKS_TO_CHOOSE_FROM) * attention.block_tokens
    length = windows + chosen + _NUM_COMPARED
    generator = torch.Generator().manual_seed(seed)
    known = min(vocab_size, len(table.is_punctuation))
    tokens = torch.randint(0, known, (1, length), generator=generator)
    marks = table.is_punctuation.nonzero().flatten()
    if len(marks):
        drawn = marks[torch.randint(0, len(marks), (1, length), generator=generator)]
        tokens = torch.where(torch.rand(1, length, generator=generator) < 1 / 8, drawn, tokens)
    return tokens


@torch.no_grad()
def _megatron(
    checkpoint: Path, config: TrainConfig, table: PunctuationTable, tokens: Tensor, dense: list[bool]
) -> list[Tensor]:
    """Return logits fp32 [n, vocab] of the last tokens, for each pass; the model is gone afterwards."""
    groups = initialize(config)
    try:
        model = load_model(checkpoint, config, groups)
        boundaries = torch.tensor([0, tokens.shape[1]], dtype=torch.int32)
        positions = torch.arange(tokens.shape[1])[None]
        topk = inference_topk(config.attention)
        logits = []
        for is_dense in dense:
            side_info = SideInfo.build(tokens, boundaries, table, config.attention, topk, is_dense=is_dense)
            output = model(tokens, positions, None, packed_seq_params=side_info)
            logits.append(output[0, -_NUM_COMPARED:, : config.model.vocab_size].float().clone())
    finally:
        groups.close()
    return logits


@torch.no_grad()
def _transformers(
    folder: Path, attention: AttentionConfig | None, table: PunctuationTable, tokens: Tensor
) -> list[Tensor]:
    """Return the same of transformers' model."""
    from transformers import AutoModelForCausalLM

    from phsa_megatron.convert.transformers_attention import use_phsa

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="sdpa", local_files_only=True
    )
    model.train(False)

    def logits() -> Tensor:
        result: Tensor = model(tokens, use_cache=False, logits_to_keep=_NUM_COMPARED).logits[0]
        return result.float()

    found = [logits()]
    if attention is not None:
        use_phsa(model, attention, table, implementation="phsa_eager")
        found.append(logits())
    return found
