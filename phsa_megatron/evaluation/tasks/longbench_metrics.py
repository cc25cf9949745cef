"""LongBench's metrics (Bai et al., arXiv 2308.14508, appendix B): one answer against one reference, 0 to 1.

Rouge, the Chinese word segmentation and the edit similarity are those of the libraries that define them
(rouge, jieba, rapidfuzz), which the extra `eval` brings.
"""

from __future__ import annotations

import importlib
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from types import ModuleType

from phsa_megatron.config.errors import ConfigError

Metric = Callable[[str, str, Sequence[str]], float]
"""Takes an answer, a reference and all classes of the data set (empty where it has none)."""

_ZH_PUNCTUATION = (
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—"
    "‘’‛“”„‟…‧﹏."
)
_COMMENT_MARKS = ("`", "#", "//")


def qa_f1(answer: str, reference: str, classes: Sequence[str] = ()) -> float:
    """F1 of the English words in common, without case, punctuation and articles."""
    return _f1(_english_words(answer), _english_words(reference))


def qa_f1_zh(answer: str, reference: str, classes: Sequence[str] = ()) -> float:
    """F1 of the Chinese words in common, without case and punctuation."""
    return _f1(_chinese_words(answer), _chinese_words(reference))


def rouge_l(answer: str, reference: str, classes: Sequence[str] = ()) -> float:
    """F1 by the longest common subsequence of words; 0 for an answer without a word."""
    if not answer.strip() or not reference.strip():
        return 0.0
    try:
        score = _library("rouge").Rouge().get_scores([answer], [reference], avg=True)
    except ValueError:  # an answer of full stops only has no sentence
        return 0.0
    return float(score["rouge-l"]["f"])


def rouge_l_zh(answer: str, reference: str, classes: Sequence[str] = ()) -> float:
    """The same over the words that Chinese text is segmented into."""
    jieba = _library("jieba")
    return rouge_l(" ".join(jieba.cut(answer)), " ".join(jieba.cut(reference)))


def classification(answer: str, reference: str, classes: Sequence[str] = ()) -> float:
    """1 over the number of classes that the answer names, if the right one is among them.

    A class whose name is a part of the right one's is not counted as named.
    """
    named = [name for name in classes if name in answer and (name == reference or name not in reference)]
    return 1.0 / len(named) if reference in named else 0.0


def retrieval(answer: str, reference: str, classes: Sequence[str] = ()) -> float:
    """Share of the numbers in the answer that are the reference's number, as in 'Paragraph 7'."""
    return _share_of_numbers(answer, re.findall(r"Paragraph (\d+)", reference))


def retrieval_zh(answer: str, reference: str, classes: Sequence[str] = ()) -> float:
    """The same with 段落7."""
    return _share_of_numbers(answer, re.findall(r"段落(\d+)", reference))


def count(answer: str, reference: str, classes: Sequence[str] = ()) -> float:
    """Share of the numbers in the answer that are the reference."""
    return _share_of_numbers(answer, [reference.strip()])


def edit_similarity(answer: str, reference: str, classes: Sequence[str] = ()) -> float:
    """Edit similarity of the reference and the answer's first line that is code, in whole percents."""
    lines = answer.lstrip("\n").split("\n")
    code = next((line for line in lines if not any(mark in line for mark in _COMMENT_MARKS)), "")
    percents: float = _library("rapidfuzz.fuzz").ratio(code, reference)
    return round(percents) / 100


def _library(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"this metric of LongBench is that of the package '{name.partition('.')[0]}', which is not "
            "installed here; install phsa-megatron[eval]"
        ) from error


def _share_of_numbers(answer: str, wanted: list[str]) -> float:
    found = re.findall(r"\d+", answer)
    return sum(number == wanted[0] for number in found) / len(found) if found and wanted else 0.0


def _f1(answer: list[str], reference: list[str]) -> float:
    same = sum((Counter(answer) & Counter(reference)).values())
    if not same:
        return 0.0
    precision, recall = same / len(answer), same / len(reference)
    return 2 * precision * recall / (precision + recall)


def _english_words(text: str) -> list[str]:
    kept = "".join(char for char in text.lower() if char not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", kept).split()


def _chinese_words(text: str) -> list[str]:
    drop = set(string.punctuation) | set(_ZH_PUNCTUATION)
    words = (
        "".join(char for char in word.lower() if char not in drop and not char.isspace())
        for word in _library("jieba").cut(text, cut_all=False)
    )
    return [word for word in words if word]
