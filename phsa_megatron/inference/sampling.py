"""How the next token is chosen from logits, for a batch of sequences."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_UNIT_SHARE = 2**40
"""Probability 1; a token of less than half of the smallest share, 4.5e-13, is never sampled."""


@dataclass(frozen=True)
class Sampling:
    """The settings of a choice.

    Attributes:
        temperature: 0 takes the most likely token; else logits are divided by it.
        top_p: sample among the most likely tokens that together have at least this probability; 1 among all.
        seed: with the number of a prompt it gives that prompt's own random numbers, so that its continuation
            does not depend on what else is in the batch.
        max_tokens: most tokens to generate for a prompt.

    Raises:
        ValueError: a value is out of its range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    max_tokens: int = 128

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not self.temperature >= 0:
            raise ValueError(f"temperature={self.temperature} must not be negative; 0 is greedy")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be above 0 and at most 1, which is no limit")
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens={self.max_tokens} must be at least 1")

    def random_numbers(self, prompt_number: int) -> torch.Generator:
        """Return the generator of one prompt's draws, on the CPU."""
        # A large odd factor keeps the streams of neighbouring seeds and prompts apart.
        mixed = (self.seed * 0x9E3779B97F4A7C15 + prompt_number * 0xD1B54A32D192ED03) % (1 << 63)
        return torch.Generator().manual_seed(mixed)


def choose_tokens(logits: Tensor, sampling: Sampling, uniforms: Tensor | None) -> Tensor:
    """Return the next tokens int64 [B].

    Args:
        logits: [B, vocabulary], any float dtype.
        sampling: temperature and top_p.
        uniforms: fp64 [B] in [0, 1), one draw a sequence; None for temperature 0.

    Equal probabilities are ordered by token id: greedy takes the lowest. Deterministic for equal arguments.
    """
    logits = logits.float()
    if sampling.temperature == 0 or uniforms is None:
        token = torch.arange(logits.shape[1], device=logits.device)
        is_best = logits == logits.amax(1, keepdim=True)
        return torch.where(is_best, token, logits.shape[1]).amin(1)
    probabilities, order = (
        (logits / sampling.temperature).softmax(1).sort(dim=1, descending=True, stable=True)
    )
    # Whole numbers: their sums are exact, so that no device and no order of a sum moves a boundary.
    shares = (probabilities.double() * _UNIT_SHARE).round().long()
    reached = shares.cumsum(1)
    # The most likely token is always kept: nothing comes before it.
    kept = (reached - shares < sampling.top_p * _UNIT_SHARE).sum(1, keepdim=True)
    total = reached.gather(1, kept - 1)
    place = (reached <= uniforms[:, None] * total).sum(1, keepdim=True)
    return order.gather(1, torch.minimum(place, kept - 1)).squeeze(1)
