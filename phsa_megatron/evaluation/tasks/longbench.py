"""LongBench (Bai et al., arXiv 2308.14508) from a local folder: NAME.jsonl of each data set.

Prompts are this project's own wording; `longbench_prompts=FILE` takes the benchmark's (a JSON object from a
data set's name to a text with {context} and {input}), which published scores were made with. A prompt that
is too long loses its middle.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phsa_megatron.config.errors import DataError
from phsa_megatron.evaluation.tasks import longbench_metrics as metrics
from phsa_megatron.evaluation.tasks.answerer import Answerer
from phsa_megatron.evaluation.tasks.longbench_metrics import Metric
from phsa_megatron.evaluation.tasks.missing import check_files

SOURCE = "data.zip of the dataset THUDM/LongBench on the Hugging Face hub"


@dataclass(frozen=True)
class Dataset:
    """How one data set is asked and scored.

    Attributes:
        prompt: own wording, with {context} and {input}.
        metric: of an answer and one reference; the best reference counts.
        max_new_tokens: room for the answer.
        first_line: only the answer's first line counts.
    """

    prompt: str
    metric: Metric
    max_new_tokens: int
    first_line: bool = False


_QA = (
    "Use only the text below to answer a question. Reply with the answer in as few words as you can.\n\n"
    "Text:\n{context}\n\nQuestion: {input}\nShort answer:"
)
_QASPER = (
    "Use only the paper below to answer a question, in as few words as you can. Reply yes or no to a "
    "question of that kind, and 'unanswerable' if the paper does not tell.\n\n"
    "Paper:\n{context}\n\nQuestion: {input}\nShort answer:"
)
_QA_ZH = "只根据下面的文字回答问题，回答要尽量简短。\n\n文字：\n{context}\n\n问题：{input}\n回答："
_SUMMARY = "Summarize the following text on one page.\n\nText:\n{context}\n\nSummary:"
_MEETING = (
    "Below are the minutes of a meeting and a request about it. Reply in a few sentences.\n\n"
    "Minutes:\n{context}\n\nRequest: {input}\nReply:"
)
_MEETING_ZH = "请总结下面的会议记录。\n\n会议记录：\n{context}\n\n总结："
_EXAMPLES = "Go on in the manner of the examples.\n\n{context}\n{input}"
_EXAMPLES_ZH = "请按照例子的方式继续。\n\n{context}\n{input}"
_COUNT = (
    "Some of the following paragraphs are repeated. How many different paragraphs are there? Reply with the "
    "number only.\n\n{context}\n\nNumber of different paragraphs:"
)
_FIND = (
    "Below are 30 numbered paragraphs and an abstract of one of them. Name that paragraph, in the form "
    "'Paragraph 1'.\n\n{context}\n\nAbstract: {input}\n\nThe abstract is of"
)
_FIND_ZH = (
    "下面是若干个有编号的段落和其中一段的摘要。请写出是哪一段，格式为“段落1”。\n\n"
    "{context}\n\n摘要：{input}\n\n这个摘要属于"
)
_CODE = "Write the next line of this code.\n{context}{input}"

DATASETS: dict[str, Dataset] = {
    "narrativeqa": Dataset(_QA, metrics.qa_f1, 128),
    "qasper": Dataset(_QASPER, metrics.qa_f1, 128),
    "multifieldqa_en": Dataset(_QA, metrics.qa_f1, 64),
    "multifieldqa_zh": Dataset(_QA_ZH, metrics.qa_f1_zh, 64),
    "hotpotqa": Dataset(_QA, metrics.qa_f1, 32),
    "2wikimqa": Dataset(_QA, metrics.qa_f1, 32),
    "musique": Dataset(_QA, metrics.qa_f1, 32),
    "dureader": Dataset(_QA_ZH, metrics.rouge_l_zh, 128),
    "gov_report": Dataset(_SUMMARY, metrics.rouge_l, 512),
    "qmsum": Dataset(_MEETING, metrics.rouge_l, 512),
    "multi_news": Dataset(_SUMMARY, metrics.rouge_l, 512),
    "vcsum": Dataset(_MEETING_ZH, metrics.rouge_l_zh, 512),
    "trec": Dataset(_EXAMPLES, metrics.classification, 64, first_line=True),
    "triviaqa": Dataset(_EXAMPLES, metrics.qa_f1, 32, first_line=True),
    "samsum": Dataset(_EXAMPLES, metrics.rouge_l, 128, first_line=True),
    "lsht": Dataset(_EXAMPLES_ZH, metrics.classification, 64, first_line=True),
    "passage_count": Dataset(_COUNT, metrics.count, 32),
    "passage_retrieval_en": Dataset(_FIND, metrics.retrieval, 32),
    "passage_retrieval_zh": Dataset(_FIND_ZH, metrics.retrieval_zh, 32),
    "lcc": Dataset(_CODE, metrics.edit_similarity, 64),
    "repobench-p": Dataset(_CODE, metrics.edit_similarity, 64),
}
"""The 21 data sets; room for answers as in the benchmark."""


def read(folder: Path | None, name: str, limit: int | None = None) -> list[dict[str, Any]]:
    """Return a data set's records, the first `limit` of them.

    Raises:
        DataError: the file is missing, or a record lacks a field.
    """
    check_files(folder, [f"{name}.jsonl"], SOURCE, "longbench_dir")
    assert folder is not None
    path = folder / f"{name}.jsonl"
    records: list[dict[str, Any]] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if limit is not None and len(records) == limit:
            break
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{path}, line {number}: not JSON ({error}); take the file from {SOURCE}"
            ) from None
        lacking = [field for field in ("context", "input", "answers") if field not in record]
        if lacking or not record["answers"]:
            raise DataError(
                f"{path}, line {number}: no {', '.join(lacking) or 'answers'}; take it from {SOURCE}"
            )
        records.append(record)
    if not records:
        raise DataError(f"{path} holds no record; take it from {SOURCE}")
    return records


def read_prompts(file: Path | None) -> dict[str, str]:
    """Return the prompt of each data set, this project's own where the file has none.

    Raises:
        DataError: the file is no such object.
    """
    prompts = {name: dataset.prompt for name, dataset in DATASETS.items()}
    if file is None:
        return prompts
    try:
        given = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise DataError(f"longbench_prompts={file} cannot be read: {error}") from None
    wrong = [name for name, text in given.items() if not isinstance(text, str) or "{context}" not in text]
    if wrong:
        raise DataError(f"longbench_prompts={file}: {', '.join(wrong)} must be texts with {{context}}")
    return prompts | {name: text for name, text in given.items() if name in DATASETS}


def score(name: str, answer: str, record: Mapping[str, Any]) -> float:
    """Return the score of an answer against its best reference, 0 to 1."""
    dataset = DATASETS[name]
    if dataset.first_line:
        answer = answer.lstrip("\n").split("\n")[0]
    classes = record.get("all_classes") or ()
    return max(dataset.metric(answer, reference, classes) for reference in record["answers"])


def ask(
    answerer: Answerer, name: str, records: list[dict[str, Any]], prompt: str
) -> Iterator[tuple[str, float]]:
    """Yield (answer, score) of each record."""
    room = DATASETS[name].max_new_tokens
    for record in records:
        # Not str.format: contexts and prompts may hold other braces.
        text = prompt.replace("{input}", record["input"]).replace("{context}", record["context"])
        text = without_middle(answerer, text, answerer.max_tokens - room)
        answer = answerer.generate([text], room)[0]
        yield answer, score(name, answer, record)


def without_middle(answerer: Answerer, text: str, max_tokens: int) -> str:
    """Return the text, cut in its middle to at most so many tokens."""
    ids = answerer.encode(text)
    kept = max_tokens
    while len(answerer.encode(text)) > max_tokens:
        text = answerer.decode(ids[: kept // 2]) + answerer.decode(ids[len(ids) - kept // 2 :])
        kept -= 2  # where the halves meet, tokens may come out otherwise
    return text
