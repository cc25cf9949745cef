"""`phsa-train claim-study fetch-text`: packages of Debian and npm to one .jsonl of text for each domain.

Inside a source a paragraph of 40 characters or more is kept once (licences, page headings), and documents of
under 200 characters are left out.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from phsa_megatron.data.manifest import write_text_durably
from phsa_megatron.evaluation.claim_study.extract import EXTRACTORS, Files, clean
from phsa_megatron.evaluation.claim_study.packages import SOURCES, Source, fetch, read_files

_LEAST_CHARS = 200
_PARAGRAPH_CHARS = 40


def fetch_texts(downloads: Path, output: Path, sources: Sequence[Source] = SOURCES) -> Iterator[str]:
    """Make OUTPUT/DOMAIN.jsonl and OUTPUT/packages.json, and yield a line about each source.

    Args:
        downloads: folder of the packages: what is there is used, the rest is downloaded and kept there.
        output: made anew.
        sources: what to take.

    Raises:
        DataError: a package cannot be had or read.
    """
    output.mkdir(parents=True, exist_ok=True)
    archives = fetch([source.package for source in sources], downloads)
    by_package: dict[str, list[Source]] = defaultdict(list)
    for source in sources:
        by_package[source.package].append(source)
    made: dict[Source, list[str]] = {}
    records = []
    for package, own in by_package.items():
        for source, files in zip(own, read_files(archives[package], own), strict=True):
            made[source] = list(documents(source, files))
            record = _record(source, archives[package], made[source])
            records.append(record)
            size = f"{record['documents']:,} documents, {record['bytes'] / 1e6:.2f} MB"
            yield f"{source.domain}: {package}: {size}"
    for domain in dict.fromkeys(source.domain for source in sources):
        lines = (_line(text, s) for s in sources if s.domain == domain for text in made[s])
        path = output / f"{domain}.jsonl"
        write_text_durably(path, "".join(lines))
        yield f"{path}: {path.stat().st_size / 1e6:.1f} MB"
    write_text_durably(output / "packages.json", json.dumps(records, indent=1) + "\n")


def documents(source: Source, files: Files) -> Iterator[str]:
    """Yield the documents of a source."""
    seen: set[bytes] = set()
    for text in _joined(EXTRACTORS[source.kind](files), source.join_chars):
        document = _without_repetitions(text, seen)
        if len(document) < _LEAST_CHARS:
            continue
        han = sum("\u4e00" <= character <= "\u9fff" for character in document)
        if han >= source.least_han_frac * len(document):
            yield document


def _joined(texts: Iterable[str], num_chars: int) -> Iterator[str]:
    """Yield texts, joined until they have so many characters."""
    parts: list[str] = []
    for text in filter(None, texts):
        parts.append(text)
        if sum(map(len, parts)) >= num_chars:
            yield "\n\n".join(parts)
            parts = []
    if parts:
        yield "\n\n".join(parts)


def _without_repetitions(text: str, seen: set[bytes]) -> str:
    lines = []
    for line in text.split("\n"):
        if len(line.strip()) >= _PARAGRAPH_CHARS:
            digest = hashlib.blake2b(line.strip().encode("utf-8", "replace"), digest_size=8).digest()
            if digest in seen:
                continue
            seen.add(digest)
        lines.append(line)
    return clean("\n".join(lines))


def _line(text: str, source: Source) -> str:
    # What no encoding can write down (half of a surrogate pair) becomes a question mark.
    sound = text.encode("utf-8", "replace").decode("utf-8")
    return json.dumps({"text": sound, "package": source.package}, ensure_ascii=False) + "\n"


def _record(source: Source, archive: Path, texts: Sequence[str]) -> dict[str, Any]:
    with archive.open("rb") as stream:
        sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
    return {
        "domain": source.domain,
        "package": source.package,
        "file": archive.name,
        "sha256": sha256,
        "documents": len(texts),
        "bytes": sum(len(text.encode("utf-8", "replace")) for text in texts),
    }
