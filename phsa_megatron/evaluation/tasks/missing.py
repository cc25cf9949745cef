"""Data that a person has to bring: an error says which files, from where, and into which folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from phsa_megatron.config.errors import DataError


def check_files(folder: Path | None, files: Sequence[str], source: str, setting: str) -> None:
    """Refuse to start without the files of a data set.

    Args:
        folder: where they have to be, or None if nobody said.
        files: relative to the folder.
        source: where a person gets them.
        setting: names the folder.

    Raises:
        DataError: a file or the folder is missing.
    """
    if folder is None:
        raise DataError(
            f"{setting}=FOLDER is missing: this task reads {', '.join(files)} from there, which come from "
            f"{source}. Nothing is fetched from the network."
        )
    lacking = [file for file in files if not (folder / file).exists()]
    if lacking:
        raise DataError(
            f"{setting}={folder}: {', '.join(lacking)} not found. Get them from {source} and put them into "
            f"{folder.absolute()}. Nothing is fetched from the network."
        )
