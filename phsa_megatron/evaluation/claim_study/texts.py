"""`phsa-train claim-study prepare`: text files to a tokenizer and the prepared sets of the study.

Repeated documents are dropped, the rest is ordered by a hash of its text, and one in 25 is held out: a
document is on one side only, whatever files it came from. The vocabulary is learned from training text alone;
retrieval documents are made from each side's own prose.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from phsa_megatron.config.errors import DataError
from phsa_megatron.data.bpe import train_bpe
from phsa_megatron.data.demo import DOMAINS as DEMO_DOMAINS
from phsa_megatron.data.demo import EOD_TOKEN, read_texts
from phsa_megatron.data.manifest import write_text_durably
from phsa_megatron.data.prepare import PrepareRequest, prepare
from phsa_megatron.data.readers import Record, cut, read
from phsa_megatron.data.tokenizer import Tokenizer
from phsa_megatron.evaluation.claim_study.retrieval import LANGUAGES, RetrievalText, sentences

PROSE = {"english": "english_prose", "chinese": "chinese_prose"}
"""The domain that facts are hidden in, by language; both are required."""
SPLITS = ("train", "valid")
_VALID_ONE_IN = 25
_VOCABULARY_MB = 24
_MAX_FILLER_SENTENCES = 60_000


@dataclass(frozen=True)
class TextRequest:
    """What to prepare.

    Attributes:
        files: text files of each domain; english_prose and chinese_prose get the demo's text besides.
        output: folder of tokenizer.json, texts/ and the sets.
        vocab_size: of the byte-level BPE.
        max_tokens: of the training set of each domain that is named here, in whole documents, by hash; of
            the held-out set a twenty-fifth.
        num_retrieval: training documents of each language.
        retrieval_tokens: longest retrieval document.
        seed: of the retrieval documents.
        num_workers: processes that encode.
    """

    files: dict[str, list[Path]]
    output: Path
    vocab_size: int = 16384
    max_tokens: dict[str, int] | None = None
    num_retrieval: int = 2100
    retrieval_tokens: int = 4096
    seed: int = 0
    num_workers: int = 1


def prepare_sets(request: TextRequest) -> Iterator[str]:
    """Make everything anew and yield a line about each set.

    Raises:
        DataError: a file is missing or damaged, a domain has no held-out document, or the disk is full.
    """
    texts = request.output / "texts"
    texts.mkdir(parents=True, exist_ok=True)
    domains = {domain: _split(domain, files) for domain, files in request.files.items()}
    tokenizer_file = request.output / "tokenizer.json"
    vocabulary = train_bpe(_vocabulary_texts(domains), request.vocab_size, EOD_TOKEN)
    write_text_durably(tokenizer_file, vocabulary.to_str(pretty=False))
    tokenizer = Tokenizer.from_file(tokenizer_file, EOD_TOKEN)
    yield f"{tokenizer_file}: {tokenizer.vocab_size:,} tokens"
    for domain, split_texts in domains.items():
        limit = (request.max_tokens or {}).get(domain)
        if limit is not None:
            split_texts["train"] = _limited(split_texts["train"], limit, tokenizer)
            split_texts["valid"] = _limited(split_texts["valid"], limit // _VALID_ONE_IN, tokenizer)
        for split in SPLITS:
            yield _write_set(request, tokenizer_file, f"{domain}_{split}", split_texts[split])
    for language in LANGUAGES:
        for split in SPLITS:
            filler = sentences(iter(domains[PROSE[language]][split]), language)[:_MAX_FILLER_SENTENCES]
            maker = RetrievalText(language, filler, lambda text: len(tokenizer.encode(text)))
            count = request.num_retrieval if split == "train" else max(1, request.num_retrieval // 20)
            # The validation documents are of the same kind, from held-out text and numbers of their own.
            seed = request.seed if split == "train" else request.seed + 1
            documents = [maker.document(seed, n, request.retrieval_tokens) for n in range(count)]
            yield _write_set(request, tokenizer_file, f"retrieval_{language}_{split}", documents)


def held_out_sentences(folder: Path, language: str) -> list[str]:
    """Return the sentences of the held-out prose of a prepared folder.

    Raises:
        DataError: the folder has no such text.
    """
    path = folder / "texts" / f"{PROSE[language]}_valid.jsonl"
    if not path.is_file():
        raise DataError(f"{path} is missing: run phsa-train claim-study prepare --output {folder}")
    with path.open(encoding="utf-8") as stream:
        return sentences((json.loads(line)["text"] for line in stream), language)


def _split(domain: str, files: list[Path]) -> dict[str, list[str]]:
    """Return the documents of a domain by split, without repetitions, ordered by hash."""
    found: dict[bytes, str] = {}
    for text in _documents(domain, files):
        found[hashlib.sha256(text.encode()).digest()] = text
    split: dict[str, list[str]] = {name: [] for name in SPLITS}
    for number, digest in enumerate(sorted(found)):
        held_out = number % _VALID_ONE_IN == _VALID_ONE_IN // 2
        split["valid" if held_out else "train"].append(found[digest])
    for name, documents in split.items():
        if not documents:
            raise DataError(
                f"{domain}: no {name} document among {len(found)}; one in {_VALID_ONE_IN} is held out, so "
                "give files with more documents"
            )
    return split


def _documents(domain: str, files: list[Path]) -> Iterator[str]:
    for path in files:
        for shard in cut(path)[1]:
            for record in read(shard, "text"):
                if not isinstance(record, Record):
                    raise DataError(f"{record.where}: {record.why}")
                yield record.text
    for language in DEMO_DOMAINS:
        if domain == PROSE[language]:
            for split in SPLITS:
                yield from read_texts(language, split)


def _vocabulary_texts(domains: dict[str, dict[str, list[str]]]) -> Iterator[str]:
    """Yield the first documents of each domain's training text: no domain owns the vocabulary."""
    for splits in domains.values():
        left = _VOCABULARY_MB * 1_000_000 // len(domains)
        for text in splits["train"]:
            yield text
            left -= len(text.encode())
            if left < 0:
                break


def _limited(texts: list[str], max_tokens: int, tokenizer: Tokenizer) -> list[str]:
    kept, total = [], 0
    for text in texts:
        total += len(tokenizer.encode(text)) + 1
        if total > max_tokens:
            break
        kept.append(text)
    return kept


def _write_set(request: TextRequest, tokenizer_file: Path, name: str, texts: list[str]) -> str:
    path = request.output / "texts" / f"{name}.jsonl"
    lines = (json.dumps({"text": text}, ensure_ascii=False) for text in texts)
    write_text_durably(path, "\n".join(lines) + "\n")
    manifest = prepare(
        PrepareRequest(
            [path],
            request.output / name,
            tokenizer_file,
            eod_token=EOD_TOKEN,
            num_workers=request.num_workers,
            overwrite=True,
        )
    )
    if name not in {f"{domain}_valid" for domain in PROSE.values()}:
        path.unlink()  # trials are made from held-out prose alone
    return f"{request.output / name}: {manifest.num_documents:,} documents, {manifest.num_tokens:,} tokens"
