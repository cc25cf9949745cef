"""Synthetic long-range retrieval: sentences of real text with a few facts among them, asked for at the end.

A fact gives a name a number of four digits. Three tasks:

    single             one fact, asked for
    multi_key          eight facts, one of them asked for
    variable_tracking  one fact and two names that refer to it in a chain; the end of the chain is asked for

Training documents and trials have one format, but text (training against held-out documents), numbers and
places are drawn from other seeds. Training documents ask for every name that they hold, and those of
multi_key, two thirds of them, hold up to a fact for every 64 tokens: from a few answers a document nothing is
learned. The places of all facts are uniform in the text; in a trial the fact that has the number stands at a
chosen depth.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

TASKS = ("single", "multi_key", "variable_tracking")
LANGUAGES = ("english", "chinese")
DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
NUM_DIGITS = 4
_NUM_KEYS = 8
_TRAINING_WEIGHTS = (1, 4, 1)
_MOST_KEYS, _TOKENS_A_KEY = 32, 64
"""Of a training document; a fact and its answer take about 30 tokens."""
_MIN_DOCUMENT_TOKENS = 192
_LONGEST_SENTENCE_CHARS = 600

_FIRST = {
    "english": "amber ashen bitter brass calm clever copper crimson dusty eager faded gentle golden hollow "
    "humble iron jolly lonely mellow pale quiet rusty silver velvet",
    "chinese": "琥珀 灰色 苦涩 黄铜 平静 聪明 紫铜 深红 尘封 热切 褪色 温和 "
    "金色 空心 谦逊 铁制 快乐 孤独 醇厚 苍白 安静 生锈 银色 丝绒",
}
_SECOND = {
    "english": "anchor badger basket beacon candle falcon ferry garden hammer harbor kettle ladder lantern "
    "mirror needle orchard pigeon ribbon saddle shovel tailor teapot violin wagon",
    "chinese": "船锚 獾子 篮子 灯塔 蜡烛 猎鹰 渡船 花园 锤子 港口 水壶 梯子 "
    "灯笼 镜子 针线 果园 鸽子 丝带 马鞍 铲子 裁缝 茶壶 提琴 马车",
}
"""A name is one word of each: 576 names a language."""
_JOIN = {"english": " ", "chinese": ""}
_FACT = {
    "english": "The locker of the {name} opens with {number}.",
    "chinese": "{name}的柜子密码是{number}。",
}
_REFERENCE = {
    "english": "The locker of the {name} opens like the locker of the {other}.",
    "chinese": "{name}的柜子密码和{other}的一样。",
}
_START = {
    "english": "Keep the numbers of the lockers in mind while you read.",
    "chinese": "阅读时请记住各个柜子的密码。",
}
_ASK = {
    "english": "Now answer. The locker of the {name} opens with {number}",
    "chinese": "现在回答：{name}的柜子密码是{number}",
}
_SENTENCE_END = {"english": re.compile(r"(?<=[.!?])\s+"), "chinese": re.compile(r"(?<=[。！？])\s*|\n+")}


def sentences(texts: Iterator[str], language: str) -> list[str]:
    """Return the sentences of texts that are neither fragments nor longer than a paragraph, in order."""
    found = []
    for text in texts:
        for part in _SENTENCE_END[language].split(text):
            sentence = " ".join(part.split())
            if 8 <= len(sentence) <= _LONGEST_SENTENCE_CHARS:
                found.append(sentence)
    return found


@dataclass(frozen=True)
class Trial:
    """One question about one text.

    Attributes:
        task: one of TASKS.
        language: one of LANGUAGES.
        length_tokens: upper limit of the prompt and its answer, at most a sentence above their number.
        depth_frac: share of the text's sentences before the fact that has the number.
        text: the whole text; its last NUM_DIGITS characters are the answer.
    """

    task: str
    language: str
    length_tokens: int
    depth_frac: float
    text: str


class RetrievalText:
    """Makes documents and trials from sentences of one language.

    Args:
        language: one of LANGUAGES.
        filler: sentences of real text.
        num_tokens_of: number of tokens of a text; each sentence is asked for once.

    Raises:
        ValueError: there is no sentence.
    """

    def __init__(self, language: str, filler: Sequence[str], num_tokens_of: Callable[[str], int]) -> None:
        if not filler:
            raise ValueError(f"no sentence of {language} text to hide facts in")
        self._language = language
        self._filler = filler
        self._num_tokens_of = num_tokens_of
        self._lengths = [num_tokens_of(sentence) + 1 for sentence in filler]

    def document(self, seed: int, number: int, max_tokens: int) -> str:
        """Return a training document: a pure function of the arguments."""
        rng = random.Random(f"train/{self._language}/{seed}/{number}")
        task = rng.choices(TASKS, _TRAINING_WEIGHTS)[0]
        low, high = math.log(min(_MIN_DOCUMENT_TOKENS, max_tokens)), math.log(max_tokens)
        num_tokens = int(math.exp(rng.uniform(low, high)))
        most = max(2, min(_MOST_KEYS, num_tokens // _TOKENS_A_KEY))
        facts, answers = self._facts(rng, task, rng.randint(2, most))
        rng.shuffle(answers)
        end = _JOIN[self._language].join(self._ask(*answer) + self._stop for answer in answers)
        return self._text(rng, facts, end, num_tokens, None)

    def trial(self, task: str, length_tokens: int, depth_frac: float, seed: int, number: int) -> Trial:
        """Return a trial: a pure function of the arguments."""
        key = f"trial/{self._language}/{task}/{length_tokens}/{depth_frac}/{seed}/{number}"
        rng = random.Random(key)
        facts, answers = self._facts(rng, task, _NUM_KEYS)
        # The first answer is that of the first fact; a chain is asked for its last name.
        asked = answers[-1] if task == "variable_tracking" else answers[0]
        text = self._text(rng, facts, self._ask(*asked), length_tokens, depth_frac)
        return Trial(task, self._language, length_tokens, depth_frac, text)

    @property
    def _stop(self) -> str:
        return "." if self._language == "english" else "。"

    def _ask(self, name: str, number: str) -> str:
        return _ASK[self._language].format(name=name, number=number)

    def _facts(self, rng: random.Random, task: str, num_keys: int) -> tuple[list[str], list[tuple[str, str]]]:
        """Return sentences, the first of which has the number asked for, and (name, number) of every name."""
        language = self._language
        count = {"single": 1, "multi_key": num_keys, "variable_tracking": 3}[task]
        pairs = list(product(_FIRST[language].split(), _SECOND[language].split()))
        names = [_JOIN[language].join(pair) for pair in rng.sample(pairs, count)]
        numbers = [str(rng.randrange(10 ** (NUM_DIGITS - 1), 10**NUM_DIGITS)) for _ in names]
        if task == "variable_tracking":
            references = [
                _REFERENCE[language].format(name=name, other=other)
                for other, name in zip(names, names[1:], strict=False)
            ]
            fact = _FACT[language].format(name=names[0], number=numbers[0])
            return [fact, *references], [(name, numbers[0]) for name in names]
        answers = list(zip(names, numbers, strict=True))
        return [_FACT[language].format(name=name, number=number) for name, number in answers], answers

    def _text(
        self, rng: random.Random, facts: list[str], end: str, max_tokens: int, depth_frac: float | None
    ) -> str:
        start = _START[self._language]
        fixed = sum(self._num_tokens_of(part) + 1 for part in [start, *facts, end])
        first = rng.randrange(len(self._filler))
        chosen: list[str] = []
        total = fixed
        for offset in range(len(self._filler)):
            place = (first + offset) % len(self._filler)
            total += self._lengths[place]
            if total > max_tokens:
                break
            chosen.append(self._filler[place])
        depths = [rng.random() for _ in facts]
        if depth_frac is not None:
            depths[0] = depth_frac
        # Where several facts stand between the same sentences, their order is that of their depths.
        inserted = sorted(zip(depths, facts, strict=True), key=lambda pair: pair[0], reverse=True)
        num_sentences = len(chosen)
        for depth, fact in inserted:
            chosen.insert(round(depth * num_sentences), fact)
        return _JOIN[self._language].join([start, *chosen, end])
