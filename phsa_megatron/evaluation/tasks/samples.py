"""Answers as they come, a line each in OUT/samples.jsonl: a second start asks only what is missing."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Key = tuple[Any, ...]


class Samples:
    """The file of finished samples.

    Attributes:
        file: JSON lines; a record's `key` says which sample it is.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        file.parent.mkdir(parents=True, exist_ok=True)
        self._found: dict[Key, dict[str, Any]] = {}
        whole = ""
        if file.is_file():
            for line in file.read_text(encoding="utf-8").splitlines(keepends=True):
                if line.endswith("\n"):  # a kill may have cut the last line short
                    record = json.loads(line)
                    self._found[tuple(record["key"])] = record
                    whole += line
            file.write_text(whole, encoding="utf-8")

    def get(self, key: Key) -> dict[str, Any] | None:
        """Return a finished sample, or None."""
        return self._found.get(key)

    def add(self, key: Key, values: dict[str, Any]) -> dict[str, Any]:
        """Keep a finished sample and return its record."""
        record = {"key": list(key), **values}
        self._found[key] = record
        with self.file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(record, ensure_ascii=False) + "\n")
        return record

    def all_of(self, keys: Iterable[Key]) -> list[dict[str, Any]]:
        """Return finished samples in this order."""
        return [self._found[key] for key in keys]
