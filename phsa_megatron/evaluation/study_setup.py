"""What the measurements of the selector study share: model, texts, finished cells and progress."""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer
from torch import Tensor

from phsa_megatron.attention.punctuation import PunctuationTable, table_of
from phsa_megatron.config.errors import DataError
from phsa_megatron.config.schema import AttentionConfig
from phsa_megatron.data.tokenizer import Tokenizer as RunTokenizer
from phsa_megatron.evaluation.probe_attention import OTHER_LAMBDAS, SELECTORS, Probe, selects, settings_of
from phsa_megatron.evaluation.probe_model import ProbeModel
from phsa_megatron.evaluation.study_texts import text_of

TOPK = (1, 2, 4, 8, 16)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_SECONDS_BETWEEN_LINES = 10.0

_T = TypeVar("_T")
Cell = tuple[str, AttentionConfig | None, int]
"""Selector, its settings (None: dense) and k; k is 0 where nothing is selected."""


class Study:
    """Model, tokenizer, texts and the file of finished cells."""

    def __init__(self, arguments: argparse.Namespace, name: str) -> None:
        self.dtype: str = arguments.dtype
        self.device = torch.device(arguments.device)
        self.file: Path = arguments.out / f"{name}.jsonl"
        self.done = read_cells(self.file)
        self._refuse_another_dtype()
        self.model = ProbeModel(arguments.model, DTYPES[self.dtype], self.device)
        self.tokenizer = Tokenizer.from_file(str(arguments.model / "tokenizer.json"))
        self.essays_dir: Path | None = arguments.essays_dir
        self.deadline = Deadline(arguments.deadline_s)
        self._tables: dict[str, PunctuationTable] = {}
        self._decoded = RunTokenizer.from_file(
            arguments.model / "tokenizer.json", "<|endoftext|>"
        ).decoded_tokens()
        self._texts: dict[str, tuple[list[int], str]] = {}
        self.file.parent.mkdir(parents=True, exist_ok=True)

    def _refuse_another_dtype(self) -> None:
        other = {cell["dtype"] for cell in self.done} - {self.dtype}
        if other:
            raise DataError(
                f"{self.file} holds cells of dtype {', '.join(sorted(other))}, and --dtype is {self.dtype}: "
                "one folder has one dtype; give another --out"
            )

    def text(self, name: str) -> tuple[list[int], str]:
        """Return a text's tokens, and the first 12 hex digits of its SHA-256."""
        if name not in self._texts:
            content = text_of(name, self.essays_dir)
            ids = self.tokenizer.encode(content, add_special_tokens=False).ids
            self._texts[name] = ids, hashlib.sha256(content.encode()).hexdigest()[:12]
        return self._texts[name]

    def probe(self, tokens: Tensor, settings: AttentionConfig) -> Probe:
        """Return the probe of documents int64 [b, T]; punctuation tables are made once."""
        name = f"{settings.selector}/{settings.punctuation_language}/{settings.punctuation_match}"
        if name not in self._tables:
            self._tables[name] = table_of(self._decoded, settings).to(self.device)
        return Probe.of(tokens, settings, self._tables[name])

    def keep(self, cells: list[dict[str, Any]]) -> None:
        """Append finished cells, in one write."""
        origin = {"dtype": self.dtype, "device": device_name(self.device)}
        with self.file.open("a", encoding="utf-8") as stream:
            stream.write("".join(json.dumps(cell | origin) + "\n" for cell in cells))


class Deadline:
    """When to stop; what is not measured by then is left for the next start."""

    def __init__(self, seconds: float | None) -> None:
        self._end = None if seconds is None else time.monotonic() + seconds

    def has_passed(self) -> bool:
        """Return whether it is time to stop."""
        return self._end is not None and time.monotonic() > self._end


def device_name(device: torch.device) -> str:
    """Return what the device is, in words."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()


def read_cells(file: Path) -> list[dict[str, Any]]:
    """Return the finished cells; a last line that a kill cut short is left out."""
    if not file.is_file():
        return []
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def cells_of(
    windows: tuple[int, int],
    language: str,
    selectors: Sequence[str] = SELECTORS,
    topks: Sequence[int] = TOPK,
) -> Iterator[Cell]:
    """Yield every selector with every k, without dense attention."""
    for name in (*SELECTORS, *OTHER_LAMBDAS):
        if name in selectors:
            settings = settings_of(name, *windows, language=language)
            for topk in topks if selects(name, settings) else (0,):
                yield name, settings, topk


def progress(todo: Sequence[_T], title: str) -> Iterator[_T]:
    """Yield the work with a bar on a terminal, and elsewhere a line every few seconds, with the time left."""
    console = Console(stderr=True, highlight=False)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    start = last = time.monotonic()
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=len(todo))
        for number, piece in enumerate(todo, start=1):
            yield piece
            bar.advance(task)
            now = time.monotonic()
            if not console.is_terminal and (now - last > _SECONDS_BETWEEN_LINES or number in (1, len(todo))):
                last, left = now, (now - start) / number * (len(todo) - number)
                line = f"{title}: {number}/{len(todo)} in {now - start:.0f} s, about {left:.0f} s left"
                console.print(line, soft_wrap=True)
