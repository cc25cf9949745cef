"""Long-context tasks that are made on the spot, of exact length: needles, variables and common words.

The kinds of tasks are those of RULER (Hsieh et al., arXiv 2404.06654, section 3); wording, filler and
numbers are this project's own, so that scores are not comparable with published ones. Every sample is a pure
function of (task, length, depth, seed, trial, tokenizer, filler).
"""

from __future__ import annotations

import random
import re
import string
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from phsa_megatron.config.errors import ConfigError
from phsa_megatron.evaluation.tasks.fitting import Encode, fit
from phsa_megatron.evaluation.tasks.words import NOUNS, names, sentences

NUM_KEYS = 8
"""Named numbers in `multi_key`; one is asked for."""
NUM_VALUES = 4
"""Numbers of the one name in `multi_value`; all are asked for."""
NUM_CHAINS, NUM_HOPS = 3, 4
"""In `variables`: chains, of which one is asked for, and copies after a chain's first name."""
NUM_COMMON = 10
"""Words to be found in `common_words`."""
_MAX_COMMON_COUNT = 30


@dataclass(frozen=True)
class Sample:
    """One question.

    Attributes:
        task: its name.
        prompt: what the model reads.
        expected: all of them are in a perfect answer.
        max_new_tokens: room for the answer: twice what a terse one takes, and 8.
        num_tokens: of prompt and answer together, exactly the length that was asked for.
        depth_frac: where in the filler the needle is, where the task has one.
        seed: of the evaluation.
        trial: number of the sample.
    """

    task: str
    prompt: str
    expected: tuple[str, ...]
    max_new_tokens: int
    num_tokens: int
    depth_frac: float | None
    seed: int
    trial: int

    def score(self, answer: str) -> float:
        """Return the share of what is expected that is in the answer, as whole words or numbers."""
        return sum(_is_in(word, answer) for word in self.expected) / len(self.expected)


def _is_in(word: str, answer: str) -> bool:
    return re.search(rf"(?<![\w-]){re.escape(word)}(?![\w-])", answer, re.IGNORECASE) is not None


@dataclass(frozen=True)
class Recipe:
    """A question whose filler is still open.

    Attributes:
        head: what comes first.
        inserts: (position as a share of the filler, sentence), ascending.
        filler: pieces of the filler without end, or until they run out.
        separator: between pieces.
        tail: what comes last.
        expected: all of them are in a perfect answer.
    """

    head: str
    inserts: list[tuple[float, str]]
    filler: Iterator[str]
    separator: str
    tail: str
    expected: tuple[str, ...]


def _numbers(rng: random.Random, count: int) -> list[str]:
    return [str(number) for number in rng.sample(range(1_000_000, 10_000_000), count)]


def _places(rng: random.Random, count: int) -> list[float]:
    return sorted(rng.random() for _ in range(count))


_HEAD = "A few codes are hidden in the following text. Remember them: the last line asks for some.\n\n"


def _needle(rng: random.Random, depth: float) -> Recipe:
    name, (number,) = next(names(rng)), _numbers(rng, 1)
    tail = f"\n\nQuestion: which number is the code of {name}?\nAnswer: the code of {name} is"
    return Recipe(_HEAD, [(depth, f"The code of {name} is {number}.")], sentences(rng), " ", tail, (number,))


def _multi_key(rng: random.Random, _: float) -> Recipe:
    pairs = list(zip(names(rng), _numbers(rng, NUM_KEYS), strict=False))
    needles = [f"The code of {name} is {number}." for name, number in pairs]
    inserts = list(zip(_places(rng, NUM_KEYS), needles, strict=True))
    name, number = rng.choice(pairs)
    tail = f"\n\nQuestion: which number is the code of {name}?\nAnswer: the code of {name} is"
    return Recipe(_HEAD, inserts, sentences(rng), " ", tail, (number,))


def _multi_value(rng: random.Random, _: float) -> Recipe:
    name = next(names(rng))
    numbers = tuple(_numbers(rng, NUM_VALUES))
    inserts = [
        (place, f"One code of {name} is {number}.")
        for place, number in zip(_places(rng, NUM_VALUES), numbers, strict=True)
    ]
    tail = (
        f"\n\nQuestion: which {NUM_VALUES} numbers are the codes of {name}?\nAnswer: the codes of {name} are"
    )
    return Recipe(_HEAD, inserts, sentences(rng), " ", tail, numbers)


def _variables(rng: random.Random, _: float) -> Recipe:
    drawn = ("".join(rng.choices(string.ascii_uppercase, k=5)) for _ in range(NUM_CHAINS * 4 * NUM_HOPS))
    pool = iter(dict.fromkeys(drawn))
    chains = [(list(islice(pool, NUM_HOPS + 1)), number) for number in _numbers(rng, NUM_CHAINS)]
    steps: list[tuple[float, str]] = []
    for chain, number in chains:
        lines = [f"Let {chain[0]} be {number}."]
        lines += [f"Let {new} be equal to {old}." for old, new in zip(chain, chain[1:], strict=False)]
        # In its order within a chain, mixed between chains.
        steps += zip(_places(rng, len(lines)), lines, strict=True)
    chain, number = rng.choice(chains)
    head = "Some names get a value in the following text. Follow which value each name has.\n\n"
    tail = (
        f"\n\nQuestion: which {len(chain)} names have the value {number}?\n"
        f"Answer: the names with the value {number} are"
    )
    return Recipe(head, sorted(steps), sentences(rng), " ", tail, tuple(chain))


_TASKS: dict[str, Callable[[random.Random, float], Recipe]] = {
    "needle": _needle,
    "multi_key": _multi_key,
    "multi_value": _multi_value,
    "variables": _variables,
}
COMMON_WORDS = "common_words"
LONG_TASKS = (*_TASKS, COMMON_WORDS)
"""Names of the tasks."""
HAS_DEPTH = frozenset({"needle"})
"""Tasks whose samples lie at each depth that is asked for."""


def make_sample(
    task: str,
    encode: Encode,
    num_tokens: int,
    *,
    seed: int,
    trial: int,
    depth_frac: float = 0.5,
    haystack: Sequence[str] | None = None,
) -> Sample:
    """Return one sample.

    Args:
        task: one of LONG_TASKS.
        encode: of the model that will read it.
        num_tokens: of prompt and answer together.
        seed: of the evaluation.
        trial: number of the sample.
        depth_frac: where in the filler the needle of a task in HAS_DEPTH is, 0 to 1.
        haystack: sentences of a text to be the filler, from a random one on, round and round; None makes
            sentences of its own.

    Raises:
        ConfigError: the length is too short for the task.
    """
    rng = random.Random(f"{task}/{num_tokens}/{depth_frac if task in HAS_DEPTH else None}/{seed}/{trial}")
    depth = depth_frac if task in HAS_DEPTH else None
    if task == COMMON_WORDS:
        prompt, expected, room = _common_words(rng, encode, num_tokens)
        return Sample(task, prompt, expected, room, num_tokens, depth, seed, trial)
    recipe = _TASKS[task](rng, depth_frac)
    filler = recipe.filler if haystack is None else _round(haystack, rng)
    pieces: list[str] = []

    def build(count: int, pad: str) -> str:
        pieces.extend(islice(filler, max(0, count - len(pieces))))
        return _assemble(recipe, pieces[:count], pad)

    room = _room(encode, recipe.expected)
    prompt, _ = fit(build, encode, num_tokens - room, task)
    return Sample(task, prompt, recipe.expected, room, num_tokens, depth, seed, trial)


def _room(encode: Encode, expected: Sequence[str]) -> int:
    return 2 * len(encode(" " + ", ".join(expected))) + 8


def _round(haystack: Sequence[str], rng: random.Random) -> Iterator[str]:
    if not haystack:
        raise ConfigError("haystack: the text is empty")
    first = rng.randrange(len(haystack))
    while True:
        yield haystack[first % len(haystack)]
        first += 1


def _assemble(recipe: Recipe, filler: list[str], pad: str) -> str:
    parts: list[str] = []
    done = 0
    for place, sentence in recipe.inserts:
        position = round(place * len(filler))
        parts += filler[done:position]
        parts.append(sentence)
        done = position
    parts += filler[done:]
    return recipe.head + recipe.separator.join(parts) + pad + recipe.tail


def _common_words(rng: random.Random, encode: Encode, num_tokens: int) -> tuple[str, tuple[str, ...], int]:
    """Return (prompt, the common words, room for the answer).

    Half of the list are the common words, each equally often (30 times at most); every other word comes at
    most a tenth as often, once where lists are short.
    """
    common = tuple(rng.sample(NOUNS, NUM_COMMON))
    others = list(names(rng))
    shuffle_seed = rng.random()
    head = "Here is a list of words. Some of them come much more often than others.\n\n"
    tail = (
        f"\n\nQuestion: which {NUM_COMMON} words come most often in the list?\n"
        f"Answer: the {NUM_COMMON} most frequent words are"
    )

    def build(count: int, pad: str) -> str:
        often = min(_MAX_COMMON_COUNT, max(2, count // (2 * NUM_COMMON)))
        seldom = max(1, often // 10)
        rest = max(0, count - often * NUM_COMMON)
        words = list(common) * often + [others[i // seldom % len(others)] for i in range(rest)]
        random.Random(shuffle_seed).shuffle(words)
        return head + ", ".join(words) + pad + tail

    room = _room(encode, common)
    prompt, _ = fit(build, encode, num_tokens - room, COMMON_WORDS)
    return prompt, common, room
