"""Turns one shard of text into ids, in a worker process: no torch, no megatron.

A finished shard is three files in the folder of parts: `.bin` (ids), `.len` (tokens of each document) and
`.json`, which is written last and holds the sizes and hashes of the other two. A shard without a matching
`.json` does not count as finished and is done again.
"""

from __future__ import annotations

import ctypes
import dataclasses
import errno
import json
import os
import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np

from phsa_megatron.config.errors import DataError
from phsa_megatron.data.manifest import FileRecord, write_json_durably
from phsa_megatron.data.readers import BadRecord, Record, Shard, read
from phsa_megatron.data.tokenizer import Tokenizer

BAD_RECORDS_KEPT = 100
_BATCH_CHARACTERS = 1_000_000
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_PR_SET_PDEATHSIG = 1

_worker_tokenizer: Tokenizer | None = None


@dataclass(frozen=True)
class ShardResult:
    """What came out of a shard.

    Attributes:
        num_documents: documents written.
        num_tokens: ids written.
        text_num_bytes: UTF-8 bytes of the documents.
        num_empty_documents: records with an empty text.
        num_bad_records: records that could not be used.
        bad_records: the first `BAD_RECORDS_KEPT` of them, as text.
        bin_file: ids.
        len_file: int32 per document.
    """

    num_documents: int
    num_tokens: int
    text_num_bytes: int
    num_empty_documents: int
    num_bad_records: int
    bad_records: list[str]
    bin_file: FileRecord
    len_file: FileRecord


@contextmanager
def full_disk_is_a_data_error(path: Path) -> Iterator[None]:
    """Turn "no space left", "quota exceeded" and "file too large" into a `DataError` that names the path."""
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_SPACE:
            raise
        raise DataError(
            f"cannot write {path}: {error.strerror}. Nothing was left under the final name. Free space there "
            f"(or raise the quota) and run the same command again: it goes on from the finished parts; or "
            f"choose an --output on another disk."
        ) from error


def start_worker(tokenizer_file: Path, eod_token: str) -> None:
    """Prepare a worker process: it ends with its parent, however that ends, and encodes in one thread."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # An interrupt from the keyboard reaches the whole group; the parent alone decides what follows from it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    global _worker_tokenizer
    _worker_tokenizer = Tokenizer.from_file(tokenizer_file, eod_token)


def encode_in_worker(shard: Shard, text_field: str, dtype: str, stem: Path) -> ShardResult:
    """Run `encode_shard` with the worker's tokenizer."""
    assert _worker_tokenizer is not None, "start_worker initializes each worker process"
    return encode_shard(shard, text_field, dtype, stem, _worker_tokenizer)


def encode_shard(shard: Shard, text_field: str, dtype: str, stem: Path, tokenizer: Tokenizer) -> ShardResult:
    """Write the documents of a shard as ids, each ended by the end-of-document id; return the counts.

    Args:
        shard: what to read.
        text_field: field or column of the text.
        dtype: of the ids, uint16 or int32.
        stem: path of the results without ending.
        tokenizer: makes the ids.

    Raises:
        DataError: the file cannot be read on, or there is no space left.
    """
    bin_path, len_path = _file(stem, ".bin"), _file(stem, ".len")
    temporary = _file(stem, ".bin.tmp")
    with full_disk_is_a_data_error(bin_path):
        with temporary.open("wb") as stream:
            tally = _write_documents(stream, read(shard, text_field), dtype, tokenizer)
            _sync(stream)
        temporary.replace(bin_path)
        with len_path.open("wb") as stream:
            stream.write(np.array(tally.lengths, dtype=np.int32).tobytes())
            _sync(stream)
        result = ShardResult(
            num_documents=len(tally.lengths),
            num_tokens=sum(tally.lengths),
            text_num_bytes=tally.text_num_bytes,
            num_empty_documents=tally.num_empty,
            num_bad_records=tally.num_bad,
            bad_records=tally.bad,
            bin_file=FileRecord.of(bin_path),
            len_file=FileRecord.of(len_path),
        )
        write_json_durably(_file(stem, ".json"), dataclasses.asdict(result))
    return result


@dataclass
class _Tally:
    lengths: list[int] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)
    num_bad: int = 0
    num_empty: int = 0
    text_num_bytes: int = 0


def _write_documents(
    stream: BinaryIO, records: Iterable[Record | BadRecord], dtype: str, tokenizer: Tokenizer
) -> _Tally:
    tally = _Tally()
    waiting: list[str] = []
    num_characters = 0

    def write_waiting() -> None:
        for ids in tokenizer.encode_batch(waiting):
            stream.write(np.array([*ids, tokenizer.eod_id], dtype=dtype).tobytes())
            tally.lengths.append(len(ids) + 1)
        waiting.clear()

    for record in records:
        if isinstance(record, BadRecord):
            tally.num_bad += 1
            if len(tally.bad) < BAD_RECORDS_KEPT:
                tally.bad.append(str(record))
        elif not record.text:
            tally.num_empty += 1
        else:
            waiting.append(record.text)
            tally.text_num_bytes += len(record.text.encode("utf-8"))
            num_characters += len(record.text)
            if num_characters >= _BATCH_CHARACTERS:
                write_waiting()
                num_characters = 0
    write_waiting()
    return tally


def finished_result(stem: Path) -> ShardResult | None:
    """Return the result of a shard that was finished earlier, its files read and compared, or None."""
    try:
        content = json.loads(_file(stem, ".json").read_text(encoding="utf-8"))
        content["bin_file"] = FileRecord(**content["bin_file"])
        content["len_file"] = FileRecord(**content["len_file"])
        result = ShardResult(**content)
        intact = (
            FileRecord.of(_file(stem, ".bin")).sha256 == result.bin_file.sha256
            and FileRecord.of(_file(stem, ".len")).sha256 == result.len_file.sha256
        )
    except (OSError, ValueError, KeyError, TypeError):
        # Missing or damaged in any way means: not finished, so it is done again.
        return None
    return result if intact else None


def _file(stem: Path, ending: str) -> Path:
    return stem.with_name(stem.name + ending)


def _sync(stream: BinaryIO) -> None:
    stream.flush()
    os.fsync(stream.fileno())
