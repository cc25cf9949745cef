"""Sequences as tensors: tokens, labels, loss mask, positions and document boundaries.

Shapes:
    b sequences, S = data.seq_len_tokens, D = data.max_documents_per_sequence.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from phsa_megatron.config.documents import documents_limit
from phsa_megatron.config.errors import ConfigError
from phsa_megatron.config.schema import TrainConfig
from phsa_megatron.data.order import Piece, Sequence, SequenceOrder, Split
from phsa_megatron.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Batch:
    """Some sequences, on the CPU.

    Attributes:
        tokens: int64 [b, S], inputs.
        labels: int64 [b, S], the token after each input.
        loss_mask: fp32 [b, S], 1 where the label counts. It is 0 on padding and, with isolated documents,
            where the label is the first token of the next document.
        position_ids: int64 [b, S], from 0 in each piece of a document.
        cu_seqlens: int32 [b * D + 1], starts of the pieces in the b * S flattened tokens, then b * S
            repeated.
        domains: domain of each sequence.
        sources: source of each sequence; empty for one that is all padding.
        pieces: documents under each sequence, the one token that is only a label included.
        num_overflow_tokens: inputs that became padding because a sequence had more than D pieces.
        document_tokens: lengths of the runs of tokens that attention does not leave, padding left out.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    loss_mask: torch.Tensor
    position_ids: torch.Tensor
    cu_seqlens: torch.Tensor
    domains: list[str]
    sources: list[str]
    pieces: list[tuple[Piece, ...]]
    num_overflow_tokens: int
    document_tokens: list[int]

    def pinned(self) -> Batch:
        """Return the same batch in memory that a GPU copies from without a pause."""
        tensors = ("tokens", "labels", "loss_mask", "position_ids", "cu_seqlens")
        return replace(self, **{name: getattr(self, name).pin_memory() for name in tensors})


@dataclass(frozen=True)
class _Row:
    """One sequence of a batch, as arrays of S elements, the starts of its pieces, and their real lengths."""

    tokens: np.ndarray
    labels: np.ndarray
    loss_mask: np.ndarray
    position_ids: np.ndarray
    starts: list[int]
    num_overflow_tokens: int
    document_tokens: list[int]


class BatchReader:
    """Sequences of a split, by their numbers; the same numbers give the same tensors, always.

    It has no state but the open files: any process may read any numbers in any order.

    Attributes:
        order: the order of the sequences.
        fingerprint: of that order.
        num_sequences: None for training, which is endless.
    """

    def __init__(self, config: TrainConfig, split: Split, tokenizer: Tokenizer | None = None) -> None:
        """Open the sources of a split.

        Args:
            config: the run's configuration.
            split: train or valid.
            tokenizer: the run's tokenizer if it is open already.

        Raises:
            ConfigError: a limit that leaves no room for a document, or a vocabulary larger than the model's.
            DataError: see `SequenceOrder`.
        """
        self.order = SequenceOrder(config, split, tokenizer)
        self.fingerprint = self.order.fingerprint
        self.num_sequences = self.order.num_sequences
        self._seq_len = config.data.seq_len_tokens
        self._isolate = config.data.isolate_documents
        self._max_documents = documents_limit(config.data)
        self._pad_id = self.order.tokenizer.eod_id
        if self._isolate and self._max_documents < 2:
            raise ConfigError(
                f"data.max_documents_per_sequence={self._max_documents} must be at least 2 with "
                f"data.isolate_documents=true: the last place is kept for what does not fit. Raise it, or "
                f"leave it null for seq_len_tokens / 16."
            )
        if self.order.tokenizer.vocab_size > config.model.vocab_size:
            raise ConfigError(
                f"model.vocab_size={config.model.vocab_size} is smaller than the tokenizer's "
                f"{self.order.tokenizer.vocab_size} ids ({config.data.tokenizer_file}): some tokens would "
                f"have no embedding. Set model.vocab_size to at least {self.order.tokenizer.vocab_size}."
            )

    @property
    def cu_seqlens_per_sequence(self) -> int:
        """D: places for pieces of documents in each sequence."""
        return self._max_documents

    def micro_batch(self, first_sequence: int, count: int) -> Batch:
        """Return sequences `first_sequence` up to `first_sequence + count`."""
        sequences = [self.order.sequence(first_sequence + i) for i in range(count)]
        rows = [self._row(sequence) for sequence in sequences]
        boundaries = np.full(count * self._max_documents + 1, count * self._seq_len, dtype=np.int32)
        starts = [i * self._seq_len + start for i, row in enumerate(rows) for start in row.starts]
        boundaries[: len(starts)] = starts
        return Batch(
            tokens=torch.from_numpy(np.stack([row.tokens for row in rows])),
            labels=torch.from_numpy(np.stack([row.labels for row in rows])),
            loss_mask=torch.from_numpy(np.stack([row.loss_mask for row in rows])),
            position_ids=torch.from_numpy(np.stack([row.position_ids for row in rows])),
            cu_seqlens=torch.from_numpy(boundaries),
            domains=[sequence.domain for sequence in sequences],
            sources=[sequence.source for sequence in sequences],
            pieces=[sequence.pieces for sequence in sequences],
            num_overflow_tokens=sum(row.num_overflow_tokens for row in rows),
            document_tokens=[length for row in rows for length in row.document_tokens],
        )

    def _row(self, sequence: Sequence) -> _Row:
        length = self._seq_len
        ids = np.full(length + 1, self._pad_id, dtype=np.int64)
        read = self.order.tokens(sequence)
        ids[: len(read)] = read
        # Which piece each of the S + 1 tokens belongs to; -1 is padding.
        owner = np.full(length + 1, -1, dtype=np.int64)
        owner[: len(read)] = np.repeat(
            np.arange(len(sequence.pieces)), [p.num_tokens for p in sequence.pieces]
        )

        num_overflow = 0
        if self._isolate:
            num_pieces, padded = int(owner[:length].max()) + 1, bool((owner[:length] < 0).any())
            if num_pieces + padded > self._max_documents:
                # The last place holds all that does not fit, as one piece of padding.
                too_many = owner >= self._max_documents - 1
                num_overflow = int(too_many[:length].sum())
                ids[too_many], owner[too_many] = self._pad_id, -1

        same_document = owner[:-1] == owner[1:] if self._isolate else owner[1:] >= 0
        counts = (owner[:-1] >= 0) & same_document
        starts = [0]
        if self._isolate:
            starts += (np.flatnonzero(np.diff(owner[:length])) + 1).tolist()
        lengths = np.diff([*starts, length])
        real = np.add.reduceat(owner[:length] >= 0, starts, dtype=np.int64)
        return _Row(
            tokens=ids[:-1],
            labels=ids[1:],
            loss_mask=counts.astype(np.float32),
            position_ids=np.arange(length) - np.repeat(starts, lengths),
            starts=starts,
            num_overflow_tokens=num_overflow,
            document_tokens=real[real > 0].tolist(),
        )
