"""A prepared data set, opened for reading: verified first, then memory-mapped."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDataset

from phsa_megatron.config.errors import DataError
from phsa_megatron.data.manifest import FileRecord, Manifest, file_of


class IndexedSource:
    """The documents of one prepared data set, as ids.

    Opening checks that the three files exist, that .bin and .idx have the sizes that the .json and the index
    say, and that the ids were made by the tokenizer of the run. The .bin file is memory-mapped: the operating
    system holds what is read, and several processes of a host share it. Three int64 per document stay in
    memory through the index.

    Attributes:
        prefix: path without ending.
        manifest: content of the .json file.
        lengths: int32 [documents], tokens of each document, its end-of-document token included.
        offsets: int64 [documents + 1], position of each document in the .bin file, in tokens.
        content_sha256: hash of the content, the same wherever the files lie.
    """

    def __init__(self, prefix: str | Path, tokenizer_sha256: str) -> None:
        """Open a prepared data set.

        Args:
            prefix: path of the set without .bin, .idx or .json.
            tokenizer_sha256: hash of the run's tokenizer file.

        Raises:
            DataError: a file is missing, truncated or damaged, or another tokenizer made the ids.
        """
        self.prefix = str(prefix)
        self.manifest = Manifest.read(file_of(prefix, ".json"))
        for ending, record in ((".bin", self.manifest.bin_file), (".idx", self.manifest.idx_file)):
            _check_size(file_of(prefix, ending), record)
        if self.manifest.tokenizer_sha256 != tokenizer_sha256:
            raise DataError(
                f"{self.prefix} was prepared with another tokenizer: {file_of(prefix, '.json').name} says "
                f"sha256 {self.manifest.tokenizer_sha256[:16]}, data.tokenizer_file of this run has "
                f"{tokenizer_sha256[:16]}. The ids would mean other text. Set data.tokenizer_file to the "
                f"tokenizer it was prepared with, or prepare the text again with this one."
            )
        self._dataset = IndexedDataset(self.prefix)
        self.lengths = np.array(self._dataset.sequence_lengths)
        self.offsets = np.zeros(len(self.lengths) + 1, dtype=np.int64)
        np.cumsum(self.lengths, dtype=np.int64, out=self.offsets[1:])
        self._check_counts()
        self.content_sha256 = hashlib.sha256(
            (self.manifest.bin_file.sha256 + self.manifest.idx_file.sha256).encode()
        ).hexdigest()

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents, end-of-document tokens included."""
        return int(self.offsets[-1])

    def tokens(self, document: int, first: int = 0, count: int | None = None) -> np.ndarray:
        """Return ids of a document from token `first` on: [count], in the file's dtype, a copy."""
        # A copy: megatron unmaps the file when its data set is dropped, under any array that still shows it.
        return np.array(self._dataset.get(document, offset=first, length=count))

    def verify_content(self) -> None:
        """Read both files whole and compare their hashes with the .json file.

        Raises:
            DataError: a file's content has changed since it was prepared.
        """
        for ending, record in ((".bin", self.manifest.bin_file), (".idx", self.manifest.idx_file)):
            path = file_of(self.prefix, ending)
            found = FileRecord.of(path)
            if found.sha256 != record.sha256:
                raise DataError(
                    f"{path} has sha256 {found.sha256[:16]}, but {record.sha256[:16]} when it was prepared: "
                    f"its content has changed. Run `phsa-train prepare-data --overwrite` for this prefix "
                    f"again."
                )

    def _check_counts(self) -> None:
        itemsize = np.dtype(self.manifest.dtype).itemsize
        expected = self.num_tokens * itemsize
        found = self.manifest.bin_file.num_bytes
        counts = (len(self), self.num_tokens)
        if expected != found or counts != (self.manifest.num_documents, self.manifest.num_tokens):
            raise DataError(
                f"{self.prefix}: the index describes {counts[0]:,} documents with {counts[1]:,} tokens, that "
                f"is {expected:,} bytes; the .json file {self.manifest.num_documents:,} documents with "
                f"{self.manifest.num_tokens:,} tokens and {found:,} bytes. The files do not belong together: "
                f"run `phsa-train prepare-data --overwrite` for this prefix again."
            )


def _check_size(path: Path, record: FileRecord) -> None:
    if not path.is_file():
        raise DataError(
            f"{path} does not exist, though {path.with_suffix('.json').name} does. Copy all three files of "
            f"the set, or run `phsa-train prepare-data --overwrite` for this prefix again."
        )
    found = path.stat().st_size
    if found != record.num_bytes:
        state = "truncated" if found < record.num_bytes else "too long"
        raise DataError(
            f"{path} is {state}: {found:,} bytes, but {record.num_bytes:,} when it was prepared. Copy it "
            f"again from where it was made, or run `phsa-train prepare-data --overwrite` for this prefix "
            f"again."
        )
