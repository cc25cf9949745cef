"""Writes safetensors files of limited size one after the other; a folder appears only when it is complete."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from phsa_megatron.config.errors import CheckpointError


@dataclass(frozen=True)
class Piece:
    """Tensors that become known together.

    Attributes:
        shapes: tensors by name, without memory.
        read: returns them with their values.
    """

    shapes: dict[str, Tensor]
    read: Callable[[], dict[str, Tensor]]

    @property
    def num_bytes(self) -> int:
        """Return the bytes of all tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.shapes.values())


def write_tensors(folder: Path, pieces: Sequence[Piece], max_file_bytes: int) -> int:
    """Write model*.safetensors and, if there are several, their index; return the bytes of all tensors.

    At most one file's tensors are in memory. A piece is never split: one larger than the limit is a file.

    Args:
        folder: exists.
        pieces: in the order of the files.
        max_file_bytes: limit of a file's tensors.
    """
    files = _by_file(pieces, max_file_bytes)
    names = ["model.safetensors"]
    if len(files) > 1:
        names = [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    where: dict[str, str] = {}
    for name, inside in zip(names, files, strict=True):
        tensors = {key: tensor.contiguous() for piece in inside for key, tensor in piece.read().items()}
        save_file(tensors, folder / name, metadata={"format": "pt"})
        where |= dict.fromkeys(tensors, name)
    total = sum(piece.num_bytes for piece in pieces)
    if len(files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
        text = json.dumps(index, indent=2) + "\n"
        (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    return total


def _by_file(pieces: Sequence[Piece], max_file_bytes: int) -> list[list[Piece]]:
    files: list[list[Piece]] = [[]]
    size = 0
    for piece in pieces:
        if files[-1] and size + piece.num_bytes > max_file_bytes:
            files.append([])
            size = 0
        files[-1].append(piece)
        size += piece.num_bytes
    return files


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Give a folder to fill, which gets the name `path` at the end and is removed after an error.

    Raises:
        CheckpointError: there is something already.
    """
    if path.exists():
        raise CheckpointError(f"{path} exists already: nothing is overwritten; remove it or choose another")
    partial = path.with_name(f"{path.name}.partial")
    if partial.exists():  # left by a conversion that was killed
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
