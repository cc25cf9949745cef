"""Which token ids are punctuation: a named recipe and a table of one flag per id (method, section 1).

The table follows from the tokenizer's decoded vocabulary alone. Its name and hash go into every checkpoint,
because a model trained with one set must not be run with another.
"""

from __future__ import annotations

import hashlib
import string
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from phsa_megatron.config.schema import (
    AttentionConfig,
    PunctuationLanguage,
    PunctuationMatch,
    Selector,
)

ENGLISH_MARKS = frozenset(string.punctuation)
"""The 32 punctuation characters of ASCII."""

CHINESE_MARKS = frozenset(
    # ideographic comma, full stop and ditto mark; CJK brackets and quotes in pairs; wave dashes
    "\u3001\u3002\u3003"
    "\u3008\u3009\u300a\u300b\u300c\u300d\u300e\u300f\u3010\u3011"
    "\u3014\u3015\u3016\u3017\u3018\u3019\u301a\u301b\u301c\u301d\u301e\u301f\u3030"
    # marks of General Punctuation in Chinese text: dashes, quotes, ellipses, middle dots, reference mark
    "\u2010\u2013\u2014\u2015\u2018\u2019\u201c\u201d\u2025\u2026\u2027\u00b7\u30fb\u203b"
    # half-width CJK stop, corner brackets, comma and dot; full-width white parentheses
    "\uff61\uff62\uff63\uff64\uff65\uff5f\uff60"
) | frozenset(
    chr(ord(mark) + 0xFEE0) for mark in ENGLISH_MARKS
)  # and the full-width forms of the ASCII marks
"""Marks of Chinese text, full-width forms included. With ENGLISH_MARKS they make the language `en_zh`."""

SEPLLM_SEPARATORS = frozenset({".", ",", "?", "!", ";", ":", " ", "\t", "\n"})
"""Tokens that SepLLM keeps."""


@dataclass(frozen=True)
class PunctuationTable:
    """One flag per token id, with a name and a hash that identify it."""

    is_punctuation: Tensor
    """bool [vocabulary size], on the CPU until `to` moves it."""
    name: str
    """Recipe, such as `exact-en`."""
    sha256: str
    """Hash of the name and of the table."""

    @classmethod
    def build(
        cls, decoded_tokens: Sequence[str], match: PunctuationMatch, language: PunctuationLanguage
    ) -> PunctuationTable:
        """Return the table of a vocabulary.

        Args:
            decoded_tokens: the string that each id decodes to, in the order of ids. A special token decodes
                to the empty string or to its name, such as `<|endoftext|>`: both are never punctuation.
            match: `exact`: the token is one mark; `exact_any`: it is one or more marks; `strip_any`: it is
                one or more marks once white space around it is gone.
            language: whose marks count.
        """
        marks = ENGLISH_MARKS | (CHINESE_MARKS if language == PunctuationLanguage.en_zh else frozenset())
        flags = torch.tensor([_matches(token, match, marks) for token in decoded_tokens], dtype=torch.bool)
        return cls.of_flags(f"{PunctuationMatch(match).value}-{PunctuationLanguage(language).value}", flags)

    @classmethod
    def of_flags(cls, name: str, is_punctuation: Tensor) -> PunctuationTable:
        """Return the table of flags bool [vocabulary size] on the CPU that were built before."""
        return cls(is_punctuation, name, _digest(name, is_punctuation))

    @classmethod
    def separators(cls, decoded_tokens: Sequence[str]) -> PunctuationTable:
        """Return the table of SepLLM's separators: tokens that are exactly one of them."""
        flags = torch.tensor([token in SEPLLM_SEPARATORS for token in decoded_tokens], dtype=torch.bool)
        return cls.of_flags("sepllm", flags)

    def shuffled(self, decoded_tokens: Sequence[str], seed: int) -> PunctuationTable:
        """Return a table with as many flags on other ids, drawn at random: a control for this one.

        A draw from the whole vocabulary would hit words that hardly occur. It is made among the lowest ids
        that are words or parts of words of two characters and more, eight times as many as there are flags:
        in a vocabulary of merges these are the first merges, the frequent ones. Its density in text is not
        that of this table; `phsa-train punctuation` prints both.
        """
        count = int(self.is_punctuation.sum())
        words = [
            i for i, token in enumerate(decoded_tokens) if len(token.strip()) > 1 and token.strip().isalpha()
        ]
        pool = torch.tensor(words[: 8 * count], dtype=torch.int64)
        order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))
        flags = torch.zeros_like(self.is_punctuation)
        flags[pool[order[:count]]] = True
        return PunctuationTable.of_flags(f"{self.name}-shuffled-{seed}", flags)

    def to(self, device: torch.device) -> PunctuationTable:
        """Return the same table with its flags on `device`."""
        return PunctuationTable(self.is_punctuation.to(device), self.name, self.sha256)


def table_of(decoded_tokens: Sequence[str], attention: AttentionConfig) -> PunctuationTable:
    """Return the table that a run's settings ask for; some controls have another set than punctuation."""
    if attention.selector == Selector.separators:
        return PunctuationTable.separators(decoded_tokens)
    table = PunctuationTable.build(
        decoded_tokens, attention.punctuation_match, attention.punctuation_language
    )
    if attention.selector == Selector.shuffled:
        return table.shuffled(decoded_tokens, attention.control_seed)
    return table


def _digest(name: str, flags: Tensor) -> str:
    digest = hashlib.sha256(name.encode())
    digest.update(flags.to(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _matches(token: str, match: PunctuationMatch, marks: frozenset[str]) -> bool:
    if match == PunctuationMatch.strip_any:
        token = token.strip()
    if match == PunctuationMatch.exact and len(token) != 1:
        return False
    return bool(token) and marks.issuperset(token)
