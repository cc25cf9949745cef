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

from phsa_megatron.config.schema import PunctuationLanguage, PunctuationMatch

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
        name = f"{PunctuationMatch(match).value}-{PunctuationLanguage(language).value}"
        digest = hashlib.sha256(name.encode())
        digest.update(flags.to(torch.uint8).numpy().tobytes())
        return cls(flags, name, digest.hexdigest())

    def to(self, device: torch.device) -> PunctuationTable:
        """Return the same table with its flags on `device`."""
        return PunctuationTable(self.is_punctuation.to(device), self.name, self.sha256)


def _matches(token: str, match: PunctuationMatch, marks: frozenset[str]) -> bool:
    if match == PunctuationMatch.strip_any:
        token = token.strip()
    if match == PunctuationMatch.exact and len(token) != 1:
        return False
    return bool(token) and marks.issuperset(token)
