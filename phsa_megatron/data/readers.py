"""Reads text records out of files, and cuts files into shards that are read independently of each other."""

from __future__ import annotations

import gzip
import hashlib
import json
import lzma
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import zstandard

from phsa_megatron.config.errors import DataError
from phsa_megatron.data.manifest import FileRecord

ENDINGS = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".jsonl.xz", ".parquet")
SHARD_BYTES = 64 * 2**20
_READ_BYTES = 4 * 2**20
_DAMAGED = (EOFError, zlib.error, gzip.BadGzipFile, lzma.LZMAError, zstandard.ZstdError)


@dataclass(frozen=True)
class Shard:
    """A part of a file.

    Attributes:
        path: the file.
        ending: which of `ENDINGS` it has.
        first: first byte (.jsonl) or row group (.parquet); else 0.
        last: byte or row group after the last one; -1 is the end of the file.
        first_line: number of the first line (.jsonl) or row (.parquet), from 1, for messages.
        num_bytes: size in the file, for the progress bar.
    """

    path: str
    ending: str
    first: int
    last: int
    first_line: int
    num_bytes: int


@dataclass(frozen=True)
class Record:
    """One document's text."""

    text: str


@dataclass(frozen=True)
class BadRecord:
    """A record that cannot be used.

    Attributes:
        where: `file:line`, the line counted from 1; `file:row` of a parquet file.
        why: what is wrong with it.
    """

    where: str
    why: str

    def __str__(self) -> str:
        return f"{self.where}: {self.why}"


def ending_of(path: Path) -> str:
    """Return which kind of file this is by its name.

    Raises:
        DataError: none that can be read.
    """
    for ending in ENDINGS:
        if path.name.endswith(ending):
            return ending
    raise DataError(f"{path}: unknown kind of file. The name must end in one of {' '.join(ENDINGS)}.")


def cut(path: Path, shard_bytes: int = SHARD_BYTES) -> tuple[FileRecord, list[Shard]]:
    """Return a file's record and its shards. Reads the whole file once.

    A .jsonl file is cut between lines, a .parquet file between row groups; a compressed file and a .txt file
    (which is one document) are one shard each.

    Raises:
        DataError: the file is missing, of an unknown kind, or no parquet file.
    """
    ending = ending_of(path)
    if not path.is_file():
        raise DataError(f"input file {path} does not exist or is not a file.")
    if ending == ".jsonl":
        return _cut_lines(path, shard_bytes)
    record = FileRecord.of(path)
    if ending == ".parquet":
        return record, _cut_row_groups(path, record.num_bytes)
    return record, [Shard(str(path), ending, 0, -1, 1, record.num_bytes)]


def _cut_lines(path: Path, shard_bytes: int) -> tuple[FileRecord, list[Shard]]:
    digest = hashlib.sha256()
    shards: list[Shard] = []
    first, first_line, line, position = 0, 1, 1, 0
    with path.open("rb") as stream:
        while chunk := stream.read(_READ_BYTES):
            # A shard ends with the first line that ends past its size; several may end in one chunk.
            searched = 0
            while (newline := chunk.find(b"\n", max(searched, first + shard_bytes - position - 1))) >= 0:
                line += chunk.count(b"\n", searched, newline + 1)
                end = position + newline + 1
                shards.append(Shard(str(path), ".jsonl", first, end, first_line, end - first))
                first, first_line, searched = end, line, newline + 1
            line += chunk.count(b"\n", searched)
            digest.update(chunk)
            position += len(chunk)
    if position > first or not shards:
        shards.append(Shard(str(path), ".jsonl", first, position, first_line, position - first))
    return FileRecord(str(path), position, digest.hexdigest()), shards


def _cut_row_groups(path: Path, num_bytes: int) -> list[Shard]:
    from pyarrow import ArrowInvalid, parquet  # an import of half a second that only this format needs

    try:
        metadata = parquet.read_metadata(path)
    except (ArrowInvalid, OSError) as error:
        raise DataError(f"{path} is not a readable parquet file: {error}.") from error
    shards = []
    first_row = 1
    for group in range(metadata.num_row_groups):
        size = num_bytes // metadata.num_row_groups
        shards.append(Shard(str(path), ".parquet", group, group + 1, first_row, size))
        first_row += metadata.row_group(group).num_rows
    return shards


def read(shard: Shard, text_field: str) -> Iterator[Record | BadRecord]:
    """Yield the records of a shard in their order.

    Args:
        shard: what to read.
        text_field: field of a JSON object, or column, that holds the text.

    Raises:
        DataError: the file cannot be read on (damaged compression), or lacks the text column.
    """
    if shard.ending == ".txt":
        yield _decoded(Path(shard.path).read_bytes(), shard.path)
    elif shard.ending == ".parquet":
        yield from _read_row_group(shard, text_field)
    else:
        for number, line in _lines(shard):
            if line.strip():
                yield _from_json(line, text_field, f"{shard.path}:{number}")


def _decoded(content: bytes, where: str) -> Record | BadRecord:
    try:
        return Record(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        return BadRecord(f"{where}:{line}", f"invalid UTF-8 at byte {error.start}")


def _lines(shard: Shard) -> Iterator[tuple[int, bytes]]:
    number = shard.first_line
    try:
        position = shard.first
        for line in _raw_lines(shard):
            yield number, line
            number += 1
            position += len(line)
            if position == shard.last:
                return
    except _DAMAGED as error:
        raise DataError(
            f"{shard.path} is damaged after line {number - 1}: {error}. Its other lines cannot be read; "
            f"replace the file or leave it out."
        ) from error


def _raw_lines(shard: Shard) -> Iterator[bytes]:
    match shard.ending:
        case ".jsonl.gz":
            with gzip.open(shard.path, "rb") as stream:
                yield from stream
        case ".jsonl.xz":
            with lzma.open(shard.path, "rb") as stream:
                yield from stream
        case ".jsonl.zst":
            yield from _zstandard_lines(Path(shard.path))
        case _:
            with Path(shard.path).open("rb") as stream:
                stream.seek(shard.first)
                yield from stream


def _zstandard_lines(path: Path) -> Iterator[bytes]:
    """Yield lines over all frames; unlike zstandard's own stream, a frame that is cut off is an error."""
    frame = None
    rest = b""
    with path.open("rb") as stream:
        while compressed := stream.read(_READ_BYTES):
            while compressed:
                frame = frame or zstandard.ZstdDecompressor().decompressobj()
                lines = (rest + frame.decompress(compressed)).split(b"\n")
                rest = lines.pop()
                yield from (line + b"\n" for line in lines)
                compressed = frame.unused_data if frame.eof else b""
                frame = None if frame.eof else frame
    if frame is not None:
        raise EOFError("the last frame is cut off")
    if rest:
        yield rest


def _from_json(line: bytes, text_field: str, where: str) -> Record | BadRecord:
    try:
        content = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return BadRecord(where, f"invalid UTF-8 at byte {error.start} of the line")
    except (json.JSONDecodeError, RecursionError) as error:
        return BadRecord(where, f"invalid JSON: {error}")
    if not isinstance(content, dict):
        return BadRecord(where, f"a JSON {type(content).__name__}, not an object")
    if text_field not in content:
        return BadRecord(where, f"no field {text_field!r}; fields: {', '.join(map(repr, content)) or 'none'}")
    return _checked(content[text_field], text_field, where)


def _checked(text: object, text_field: str, where: str) -> Record | BadRecord:
    if not isinstance(text, str):
        return BadRecord(where, f"{text_field!r} is {type(text).__name__}, not a string")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return BadRecord(where, f"{text_field!r} has half of a surrogate pair, which is no character")
    return Record(text)


def _read_row_group(shard: Shard, text_field: str) -> Iterator[Record | BadRecord]:
    from pyarrow import ArrowException, parquet

    try:
        file = parquet.ParquetFile(shard.path)
        if text_field not in file.schema_arrow.names:
            raise DataError(
                f"{shard.path} has no column {text_field!r}; columns: {', '.join(file.schema_arrow.names)}. "
                f"Name the text's column with --text-field."
            )
        row = shard.first_line
        for batch in file.iter_batches(batch_size=256, row_groups=[shard.first], columns=[text_field]):
            for value in batch.column(0):
                yield _from_parquet(value, text_field, f"{shard.path}:{row}")
                row += 1
    except (ArrowException, OSError) as error:
        raise DataError(f"{shard.path} is damaged in row group {shard.first}: {error}.") from error


def _from_parquet(value: object, text_field: str, where: str) -> Record | BadRecord:
    from pyarrow import Scalar

    try:
        content = cast(Scalar, value).as_py()
    except UnicodeDecodeError as error:
        return BadRecord(where, f"invalid UTF-8 at byte {error.start} of {text_field!r}")
    return _checked(content, text_field, where)
