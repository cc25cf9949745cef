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

    def length(pieces: int) -> int:
        return len(encode(build(pieces, "")))

    least = length(0)
    if least > num_tokens:
        raise ConfigError(
            f"{name}: without any filler its prompt has {least:,} tokens, and {num_tokens:,} are asked for; "
            "use larger lengths"
        )
    low, high = 0, 16
    while (found := length(high)) <= num_tokens:
        slope = max((found - least) / high, 0.1)
        low, high = high, max(high + 1, int((num_tokens - least) / slope * 1.02) + 2)
    low_tokens, high_tokens = length(low), found
    # The piece that still fits: by proportion, because every look encodes the whole text.
    while high - low > 1:
        share = (num_tokens - low_tokens) / (high_tokens - low_tokens)
        middle = min(max(low + int((high - low) * share), low + 1), high - 1)
        found = length(middle)
        if found <= num_tokens:
            low, low_tokens = middle, found
        else:
            high, high_tokens = middle, found
    for pad in _PADS:
        count = num_tokens - low_tokens
        for _ in range(_MAX_ROUNDS):
            prompt = build(low, pad * count)
            missing = num_tokens - len(encode(prompt))
            if missing == 0:
                return prompt, low
            count += missing
            if count < 0:
                break
    raise ConfigError(
        f"{name}: no prompt of exactly {num_tokens:,} tokens was found with this tokenizer; another length "
        "or seed may do"
    )
