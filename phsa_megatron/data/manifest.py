"""What a prepared data set says about itself: `PREFIX.json`, written last to mark a finished set."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from phsa_megatron.config.errors import DataError

FORMAT_VERSION = 1
_READ_BYTES = 1 << 22


@dataclass(frozen=True)
class FileRecord:
    """One file: its path, its size in bytes and the sha256 of its content."""

    path: str
    num_bytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> FileRecord:
        """Return the record of a file, which is read whole."""
        digest = hashlib.sha256()
        num_bytes = 0
        with path.open("rb") as stream:
            while chunk := stream.read(_READ_BYTES):
                digest.update(chunk)
                num_bytes += len(chunk)
        return cls(str(path), num_bytes, digest.hexdigest())


@dataclass(frozen=True)
class Manifest:
    """The content of `PREFIX.json`.

    Attributes:
        format_version: version of this file.
        tokenizer_sha256: hash of the tokenizer file that made the ids.
        vocab_size: the tokenizer's largest id + 1.
        eod_id: the id that ends every document.
        dtype: of the ids in the .bin file: uint16 below 65,500 ids, else int32 (Megatron's rule).
        num_documents: documents in the set.
        num_tokens: ids, the end-of-document ones included.
        text_num_bytes: UTF-8 bytes of the documents' text.
        num_empty_documents: records with an empty text, left out.
        num_bad_records: records that could not be used, left out.
        bad_records: the first of them, as `file:line: why`.
        input_files: what was read.
        bin_file: the ids. Its path is the file's name, so that a set can be moved.
        idx_file: Megatron's index.
    """

    tokenizer_sha256: str
    vocab_size: int
    eod_id: int
    dtype: str
    num_documents: int
    num_tokens: int
    text_num_bytes: int
    num_empty_documents: int
    num_bad_records: int
    bad_records: list[str]
    input_files: list[FileRecord]
    bin_file: FileRecord
    idx_file: FileRecord
    format_version: int = field(default=FORMAT_VERSION)

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """Return a manifest from its file.

        Raises:
            DataError: the file is missing, damaged, or of another format version.
        """
        redo = "run `phsa-train prepare-data` for this prefix again"
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise DataError(
                f"{path} does not exist: the data set was not prepared, or its preparation did not finish; "
                f"{redo}."
            ) from None
        except (ValueError, OSError) as error:
            raise DataError(f"{path} cannot be read as JSON: {error}; {redo}.") from error
        version = content.get("format_version") if isinstance(content, dict) else None
        if version != FORMAT_VERSION:
            raise DataError(
                f"{path} has format_version={version}; this program reads {FORMAT_VERSION}; {redo}."
            )
        try:
            for key in ("bin_file", "idx_file"):
                content[key] = FileRecord(**content[key])
            content["input_files"] = [FileRecord(**entry) for entry in content["input_files"]]
            return cls(**content)
        except (KeyError, TypeError) as error:
            raise DataError(f"{path} is damaged: {error}; {redo}.") from error

    def write(self, path: Path) -> None:
        """Write the manifest: to a temporary name, synced, then renamed."""
        write_json_durably(path, dataclasses.asdict(self))


def write_json_durably(path: Path, content: Any) -> None:
    """Write JSON as `write_text_durably` does."""
    write_text_durably(path, json.dumps(content, ensure_ascii=False, indent=2) + "\n")


def write_text_durably(path: Path, content: str) -> None:
    """Write a text so that `path` holds either its old content or all of the new, also after a crash."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_of(prefix: str | Path, ending: str) -> Path:
    """Return `PREFIX` + `.bin`, `.idx` or `.json`; a dot inside the prefix is no suffix."""
    return Path(str(prefix) + ending)
