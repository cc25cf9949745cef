"""`phsa-train punctuation`: a tokenizer's punctuation sets, and how dense they are in texts.

  phsa-train punctuation tokenizer=prepared/demo/tokenizer.json
  phsa-train punctuation tokenizer=qwen/tokenizer.json --text essays.txt news.jsonl.zst --plot density.png
  phsa-train punctuation tokenizer=qwen/tokenizer.json match=strip_any language=en_zh --all

Without match and language every set is printed, SepLLM's separators and a shuffled set of each among them. A
block without any token of the set has only its plain mean: its share tells how often the second branch is
silent. Files ending in .jsonl (.gz, .xz, .zst) or .parquet are read document by document, others as one.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from tokenizers import Tokenizer as HuggingFaceTokenizer

from phsa_megatron.attention.punctuation import PunctuationTable
from phsa_megatron.config.errors import ConfigError, DataError
from phsa_megatron.config.keys import did_you_mean
from phsa_megatron.config.schema import PunctuationLanguage, PunctuationMatch
from phsa_megatron.data.readers import ENDINGS, BadRecord, cut, read

_KEYS = {
    "tokenizer": None,
    "match": tuple(match.value for match in PunctuationMatch),
    "language": tuple(language.value for language in PunctuationLanguage),
}
_SHOWN_TOKENS = 40
_BATCH_DOCUMENTS = 64


@dataclass(frozen=True)
class Density:
    """How dense one set is in one file.

    Attributes:
        file: the file.
        table: name of the set.
        num_tokens: of the file.
        num_marks: tokens that are in the set.
        num_blocks: complete blocks; blocks restart at every document.
        num_silent: of them without a token of the set.
    """

    file: str
    table: str
    num_tokens: int
    num_marks: int
    num_blocks: int
    num_silent: int

    @property
    def density_frac(self) -> float:
        """Return the share of tokens in the set."""
        return self.num_marks / max(self.num_tokens, 1)

    @property
    def silent_frac(self) -> float:
        """Return the share of blocks without any."""
        return self.num_silent / max(self.num_blocks, 1)


def main(argv: list[str]) -> int:
    """Run the command.

    Raises:
        PhsaError: an argument is unknown, or a file cannot be read.
    """
    arguments = _parse(argv)
    settings = _settings(arguments.settings)
    backend = _tokenizer(Path(settings["tokenizer"]))
    decoded = backend.decode_batch(
        [[i] for i in range(backend.get_vocab_size(with_added_tokens=True))], skip_special_tokens=False
    )
    tables = list(_tables(decoded, settings, arguments.seed))
    console = Console()
    for table in tables:
        ids = table.is_punctuation.nonzero().flatten().tolist()
        shown = ids if arguments.all else ids[:_SHOWN_TOKENS]
        words = " ".join(json.dumps(decoded[i], ensure_ascii=False) for i in shown)
        more = f" ... and {len(ids) - len(shown)} more (--all)" if len(ids) > len(shown) else ""
        console.print(
            f"{table.name}: {len(ids):,} of {len(decoded):,} ids, sha256 {table.sha256[:16]}", markup=False
        )
        console.print(f"  {words}{more}", markup=False, highlight=False)
    found = [
        density
        for path in track(arguments.text, "reading", console=Console(stderr=True), transient=True)
        for density in densities(path, backend, tables, arguments.block_tokens, arguments.text_field)
    ]
    if found:
        console.print(_as_table(found, arguments.block_tokens))
    if arguments.json:
        records = [vars(d) | {"density_frac": d.density_frac, "silent_frac": d.silent_frac} for d in found]
        arguments.json.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    if arguments.plot:
        if not found:
            raise ConfigError(f"--plot={arguments.plot}: there is nothing to plot; give --text FILE ...")
        plot(arguments.plot, found, arguments.block_tokens)
        print(f"written: {arguments.plot}")
    return 0


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="phsa-train punctuation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("settings", nargs="+", metavar="KEY=VALUE", help="tokenizer=FILE, match=, language=")
    parser.add_argument("--text", nargs="+", type=Path, default=[], metavar="FILE", help="texts to measure")
    parser.add_argument("--text-field", default="text", help="of .jsonl and .parquet (default: text)")
    parser.add_argument("--block-tokens", type=int, default=16, help="tokens of a block (default: 16)")
    parser.add_argument("--seed", type=int, default=0, help="of the shuffled sets (attention.control_seed)")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw density and silent blocks")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers")
    parser.add_argument("--all", action="store_true", help="print every token of a set")
    arguments = parser.parse_intermixed_args(argv)
    if arguments.block_tokens < 1:
        parser.error("--block-tokens must be at least 1")
    return arguments


def _settings(pairs: list[str]) -> dict[str, str]:
    settings: dict[str, str] = {}
    for pair in pairs:
        key, sign, value = pair.partition("=")
        if not sign or key not in _KEYS:
            raise ConfigError(f"unknown setting '{pair}'.{did_you_mean(key, list(_KEYS))} Use tokenizer=FILE")
        choices = _KEYS[key]
        if choices is not None and value not in choices:
            raise ConfigError(f"{key}={value}: expected one of {', '.join(choices)}")
        settings[key] = value
    if "tokenizer" not in settings:
        raise ConfigError("tokenizer=FILE is missing: give a Hugging Face tokenizer.json")
    return settings


def _tokenizer(path: Path) -> HuggingFaceTokenizer:
    if not path.is_file():
        raise DataError(
            f"tokenizer={path} does not exist: give a tokenizer.json (phsa-train prepare-demo makes one)"
        )
    try:
        return HuggingFaceTokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises plain Exception for anything it cannot parse
        raise DataError(f"tokenizer={path} is not a Hugging Face tokenizer.json: {error}") from error


def _tables(decoded: list[str], settings: dict[str, str], seed: int) -> Iterator[PunctuationTable]:
    for match in PunctuationMatch:
        for language in PunctuationLanguage:
            asked = settings.get("match", match.value), settings.get("language", language.value)
            if asked == (match.value, language.value):
                table = PunctuationTable.build(decoded, match, language)
                yield table
                yield table.shuffled(decoded, seed)
    yield PunctuationTable.separators(decoded)


def densities(
    path: Path,
    backend: HuggingFaceTokenizer,
    tables: list[PunctuationTable],
    block_tokens: int,
    text_field: str = "text",
) -> list[Density]:
    """Return the density of each set in one file.

    Raises:
        DataError: the file is missing, or none of it can be read.
    """
    counts = torch.zeros(len(tables), 2, dtype=torch.int64)
    num_tokens = num_blocks = 0
    batch: list[str] = []

    def count() -> None:
        nonlocal num_tokens, num_blocks
        for encoding in backend.encode_batch(batch, add_special_tokens=False):
            ids = torch.tensor(encoding.ids, dtype=torch.int64)
            blocks = len(ids) // block_tokens
            num_tokens, num_blocks = num_tokens + len(ids), num_blocks + blocks
            for i, table in enumerate(tables):
                flags = table.is_punctuation[ids]
                silent = ~flags[: blocks * block_tokens].view(blocks, block_tokens).any(1)
                counts[i] += torch.stack([flags.sum(), silent.sum()])
        batch.clear()

    for text in _documents(path, text_field):
        batch.append(text)
        if len(batch) == _BATCH_DOCUMENTS:
            count()
    count()
    return [
        Density(str(path), table.name, num_tokens, int(marks), num_blocks, int(silent))
        for table, (marks, silent) in zip(tables, counts.tolist(), strict=True)
    ]


def _documents(path: Path, text_field: str) -> Iterator[str]:
    if not path.is_file():
        raise DataError(f"--text {path}: there is no such file")
    if not path.name.endswith(tuple(ending for ending in ENDINGS if ending != ".txt")):
        yield path.read_text(encoding="utf-8", errors="replace")
        return
    for shard in cut(path)[1]:
        for record in read(shard, text_field):
            if isinstance(record, BadRecord):
                raise DataError(str(record))
            yield record.text


def _as_table(found: list[Density], block_tokens: int) -> Table:
    blocks = f"blocks of {block_tokens} without any"
    table = Table("file", "set", "tokens", "in the set", "blocks", blocks)
    for d in found:
        row: list[Any] = [
            f"{d.num_tokens:,}",
            f"{d.density_frac:.1%}",
            f"{d.num_blocks:,}",
            f"{d.silent_frac:.1%}",
        ]
        table.add_row(Path(d.file).name, d.table, *row)
    return table


def plot(path: Path, found: list[Density], block_tokens: int) -> None:
    """Draw, for each file and set, the share of tokens in it and of blocks without any."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names, files = list(dict.fromkeys(d.table for d in found)), list(dict.fromkeys(d.file for d in found))
    figure = Figure(figsize=(10, 1.6 + 0.26 * len(names) * len(files)), layout="constrained")
    titles = "share of tokens in the set", f"share of blocks of {block_tokens} without any"
    for axes, title, which in zip(
        figure.subplots(1, 2, sharey=True), titles, ("density", "silent"), strict=True
    ):
        for f, file in enumerate(files):
            places = [n * (len(files) + 1) + f for n in range(len(names))]
            values = [
                getattr(d, f"{which}_frac")
                for name in names
                for d in found
                if (d.file, d.table) == (file, name)
            ]
            axes.barh(places, values, label=Path(file).name)
        axes.set(title=title, xlim=(0, None))
        axes.grid(alpha=0.3, axis="x")
    axes.set_yticks([n * (len(files) + 1) + (len(files) - 1) / 2 for n in range(len(names))], names)
    axes.invert_yaxis()
    axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_figure(path, dpi=110)
