"""Loss and perplexity by position in a document: does a model still use what it read long ago?"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from phsa_megatron.config.errors import DataError
from phsa_megatron.evaluation.tasks.answerer import Answerer, Request
from phsa_megatron.evaluation.tasks.missing import check_files

_FIRST_EDGE = 128


class Part(NamedTuple):
    """The tokens of one document at the positions `first <= i < end`, counted from 0."""

    first: int
    end: int
    nats: float
    """Sum of their cross-entropies."""
    num_tokens: int


def edges(num_tokens: int) -> list[int]:
    """Return the bounds of the parts up to a length: 1, 128, 256, 512, ..., the length.

    The first token of a document has nothing before it and no loss.
    """
    found, edge = [1], _FIRST_EDGE
    while edge < num_tokens:
        found.append(edge)
        edge *= 2
    return [*found, num_tokens]


def read_texts(folder: Path | None) -> Iterator[tuple[str, str]]:
    """Yield (name, text): each *.txt file is a document, each line of *.jsonl too (its field `text`).

    Raises:
        DataError: no folder or no such file in it, or a record without text.
    """
    source = "texts of your own that the model was not trained on: *.txt, or *.jsonl with a field text"
    check_files(folder, [], source, "texts_dir")
    assert folder is not None
    paths = sorted([*folder.glob("*.txt"), *folder.glob("*.jsonl")])
    if not paths:
        check_files(folder, ["*.txt or *.jsonl"], source, "texts_dir")
    for path in paths:
        content = path.read_text(encoding="utf-8")
        if path.suffix == ".txt":
            yield path.name, content
            continue
        for number, line in enumerate(content.splitlines(), start=1):
            text = json.loads(line).get("text") if line.strip() else ""
            if text is None:
                raise DataError(f"{path}, line {number}: a record without the field text")
            if text:
                yield f"{path.name}:{number}", text


def by_position(answerer: Answerer, text: str, bounds: Sequence[int]) -> list[Part]:
    """Return the losses of a document's parts, as far as it reaches; it is cut at the last bound."""
    ids = answerer.encode(text)[: bounds[-1]]
    if len(ids) < 2:
        return []
    # scored[i] is of token i + 1.
    losses = -answerer.score([Request(ids, 1)])[0].logprobs.double()
    parts = []
    for first, end in zip(bounds, bounds[1:], strict=False):
        inside = losses[first - 1 : min(end, len(ids)) - 1]
        if len(inside):
            parts.append(Part(first, end, float(inside.sum()), len(inside)))
    return parts
