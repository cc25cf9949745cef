"""Prompts of exactly so many tokens: filler until it fits, then single-token words for the rest."""

from __future__ import annotations

from collections.abc import Callable

from phsa_megatron.config.errors import ConfigError

Build = Callable[[int, str], str]
"""Takes the number of filler pieces and a text to add to the filler, and returns the prompt."""
Encode = Callable[[str], list[int]]

_PADS = (" so", " and", " the", " a", " on", ".", " x", "\n", "~")
_MAX_ROUNDS = 60


def fit(build: Build, encode: Encode, num_tokens: int, name: str) -> tuple[str, int]:
    """Return (a prompt of exactly `num_tokens` tokens, the number of its filler pieces).

    Args:
        build: many more pieces make the prompt longer; one more may not.
        encode: of the model that will read it.
        num_tokens: of the prompt.
        name: of the task, for errors.

    Raises:
        ConfigError: the prompt without filler is longer, or no padding meets the number exactly.
    """

    def over(pieces: int) -> int:
        return len(encode(build(pieces, ""))) - num_tokens

    least = over(0)
    if least > 0:
        raise ConfigError(
            f"{name}: without any filler its prompt has {least + num_tokens:,} tokens, and "
            f"{num_tokens:,} are asked for; use larger lengths"
        )
    pieces, missing = _last_that_fits(over, least)
    for pad in _PADS:
        count = missing
        for _ in range(_MAX_ROUNDS):
            prompt = build(pieces, pad * count)
            left = num_tokens - len(encode(prompt))
            if left == 0:
                return prompt, pieces
            count += left
            if count < 0:
                break
    raise ConfigError(
        f"{name}: no prompt of exactly {num_tokens:,} tokens was found with this tokenizer; another length "
        "or seed may do"
    )


def _last_that_fits(over: Callable[[int], int], least: int) -> tuple[int, int]:
    """Return (a number of pieces that fits while one more does not, the tokens that are still missing).

    Each look encodes the whole text, so the next one is where a line through the bounds crosses zero; a bound
    that stays is taken for half as far (the Illinois rule), or the line would creep.
    """
    low, low_over, high = 0, least, 16
    while (high_over := over(high)) <= 0:
        a_piece = max((high_over - low_over) / (high - low), 0.1)
        further = min(int(-high_over / a_piece * 1.02) + 2, 7 * high)
        low, low_over, high = high, high_over, high + further
    below, above = low_over - 0.5, float(high_over)
    stayed = 0
    while high - low > 1:
        middle = low + round((high - low) * below / (below - above))
        middle = min(max(middle, low + 1), high - 1)
        found = over(middle)
        if found <= 0:
            low, low_over, below = middle, found, found - 0.5
            above = above / 2 if stayed > 0 else above
            stayed = 1
        else:
            high, above = middle, float(found)
            below = below / 2 if stayed < 0 else below
            stayed = -1
    return low, -low_over
