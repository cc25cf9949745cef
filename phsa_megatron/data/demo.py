"""The demo's data, from the text that comes with the program to prepared sets."""

from __future__ import annotations

import json
import lzma
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

from phsa_megatron.config.errors import DataError
from phsa_megatron.data.bpe import train_bpe
from phsa_megatron.data.indexed import IndexedSource
from phsa_megatron.data.manifest import FileRecord, Manifest, file_of, write_text_durably
from phsa_megatron.data.prepare import PrepareRequest, prepare

DOMAINS = ("english", "chinese")
SPLITS = ("train", "valid")
VOCAB_SIZE = 8192
EOD_TOKEN = "<|endoftext|>"


def corpus_file(domain: str, split: str) -> Path:
    """Return the shipped text of a domain and split: .jsonl.xz with text, source, domain, id and title."""
    return Path(str(resources.files("phsa_megatron.data"))) / "demo_corpus" / f"{domain}_{split}.jsonl.xz"


def read_texts(domain: str, split: str) -> Iterator[str]:
    """Yield the documents of the shipped corpus.

    Raises:
        DataError: the file is missing from the installation.
    """
    path = corpus_file(domain, split)
    if not path.is_file():
        raise DataError(f"{path} is missing from this installation: install phsa-megatron again.")
    with lzma.open(path, "rt", encoding="utf-8") as stream:
        for line in stream:
            yield json.loads(line)["text"]


def prepare_demo_sets(folder: Path, overwrite: bool = False) -> Iterator[str]:
    """Make the demo's tokenizer and its four prepared sets, and yield a line about each.

    Args:
        folder: gets `tokenizer.json` and `DOMAIN_SPLIT.{bin,idx,json}`.
        overwrite: make everything anew; otherwise what was made from the same text and is intact is kept.

    Raises:
        DataError: the corpus is missing, or the disk is full.
    """
    tokenizer_file = folder / "tokenizer.json"
    made_from = folder / "tokenizer.made_from.json"
    inputs = {"vocab_size": VOCAB_SIZE} | {d: FileRecord.of(corpus_file(d, "train")).sha256 for d in DOMAINS}
    if not overwrite and tokenizer_file.is_file() and _recorded(made_from) == inputs | _hash(tokenizer_file):
        yield f"{tokenizer_file}: kept"
    else:
        folder.mkdir(parents=True, exist_ok=True)
        texts = (text for domain in DOMAINS for text in read_texts(domain, "train"))
        write_text_durably(tokenizer_file, train_bpe(texts, VOCAB_SIZE, EOD_TOKEN).to_str(pretty=False))
        write_text_durably(made_from, json.dumps(inputs | _hash(tokenizer_file), indent=2) + "\n")
        yield f"{tokenizer_file}: {VOCAB_SIZE:,} tokens, trained on the training text"
    for domain in DOMAINS:
        for split in SPLITS:
            yield _prepare_set(
                folder / f"{domain}_{split}", corpus_file(domain, split), tokenizer_file, overwrite
            )


def _prepare_set(prefix: Path, text_file: Path, tokenizer_file: Path, overwrite: bool) -> str:
    if not overwrite and _is_intact(prefix, text_file, tokenizer_file):
        manifest = Manifest.read(file_of(prefix, ".json"))
        state = "kept"
    else:
        manifest = prepare(
            PrepareRequest([text_file], prefix, tokenizer_file, eod_token=EOD_TOKEN, overwrite=True)
        )
        state = "prepared"
    return f"{prefix}: {state}, {manifest.num_documents:,} documents, {manifest.num_tokens:,} tokens"


def _is_intact(prefix: Path, text_file: Path, tokenizer_file: Path) -> bool:
    """Return whether a set was made from this text with this tokenizer and holds what was written then."""
    try:
        source = IndexedSource(prefix, FileRecord.of(tokenizer_file).sha256)
        source.verify_content()
    except DataError:
        # Whatever is wrong with it, it is made again; prepare reports what then still fails.
        return False
    made_from = [file.sha256 for file in source.manifest.input_files]
    return made_from == [FileRecord.of(text_file).sha256]


def _hash(path: Path) -> dict[str, str]:
    return {"tokenizer_sha256": FileRecord.of(path).sha256}


def _recorded(path: Path) -> object:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
