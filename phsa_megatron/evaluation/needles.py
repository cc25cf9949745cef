"""One needle in a haystack: a 7-digit number in a text, asked for at its end.

The prompt gives the answer up to the number. A trial is a hit if each of the seven digits is the most likely
next token after the digits before it: exactly then greedy generation gives the number, and one pass over the
answer tells.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from tokenizers import Tokenizer

_CITIES = ("Paris", "Tokyo", "Cairo", "Lima", "Oslo", "Rome", "Quito", "Delhi", "Accra", "Perth")
DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
NUM_DIGITS = 7


@dataclass(frozen=True)
class Needle:
    """One trial.

    Attributes:
        prefix: tokens up to the end of the haystack.
        question: the tokens after it, the digits included.
        digits: the last tokens of `question`.
        depth_frac: where in the haystack the needle is.
    """

    prefix: list[int]
    question: list[int]
    digits: list[int]
    depth_frac: float


def make_needle(tokenizer: Tokenizer, haystack: list[int], num_tokens: int, trial: int) -> Needle:
    """Return a trial: a pure function of its arguments.

    Args:
        tokenizer: of the model, special tokens included.
        haystack: tokens of a text, at least as many as the prompt.
        num_tokens: of the whole prompt, the answer included.
        trial: number of the trial; depths go round, and number, city and place in the text are drawn from it.

    Raises:
        ValueError: the haystack is shorter than the prompt.
    """
    rng = random.Random(f"needle/{trial}")
    city, number = rng.choice(_CITIES), str(rng.randint(10 ** (NUM_DIGITS - 1), 10**NUM_DIGITS - 1))
    depth = DEPTHS[trial % len(DEPTHS)]

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    start = encode("<|im_start|>user\nRead the text and remember the magic number.\n\n")
    needle = encode(f"\nThe magic number for {city} is {number}.\n")
    question = encode(
        f"\n\nWhat is the magic number for {city}?<|im_end|>\n<|im_start|>assistant\n"
        f"The magic number for {city} is {number}"
    )
    room = num_tokens - len(start) - len(needle) - len(question)
    if len(haystack) < room:
        raise ValueError(f"the haystack has {len(haystack)} tokens, the prompt has room for {room}")
    first = rng.randrange(len(haystack) - room + 1)
    hay = haystack[first : first + room]
    cut = int(room * depth)
    return Needle(start + hay[:cut] + needle + hay[cut:], question, question[-NUM_DIGITS:], depth)
