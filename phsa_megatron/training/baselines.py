"""What counting words would reach: unigram and bigram cross-entropy on the validation tokens.

A language model that does not beat the bigram has learned nothing about context.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from phsa_megatron.data.batches import BatchReader

MAX_TOKENS = 1 << 24
"""Training tokens counted at most; the estimates barely move beyond."""
_CHUNK_SEQUENCES = 64


@dataclass(frozen=True)
class Baselines:
    """Cross-entropies of counting models, in nats per token of the validation set."""

    unigram_entropy_nats: float
    """Add-one smoothed frequencies of the training tokens."""
    bigram_entropy_nats: float
    """Frequencies given the token before, smoothed with the unigram (Witten-Bell)."""


def measure_baselines(train: BatchReader, valid: BatchReader, num_train_sequences: int) -> Baselines:
    """Counts training sequences and measures the counts on all validation sequences.

    Args:
        train: the training set.
        valid: the validation set.
        num_train_sequences: sequences to count, from the first on; cut to about MAX_TOKENS tokens.

    Returns:
        Both cross-entropies, over exactly the (input, label) pairs that have a loss.
    """
    vocab_size = train.order.tokenizer.vocab_size
    seq_len = train.micro_batch(0, 1).tokens.shape[1]
    inputs, labels = _pairs(train, min(num_train_sequences, max(1, MAX_TOKENS // seq_len)))
    valid_inputs, valid_labels = _pairs(valid, valid.num_sequences or 0)

    unigram = (np.bincount(labels, minlength=vocab_size) + 1.0) / (len(labels) + vocab_size)
    pairs, counts = np.unique(inputs * vocab_size + labels, return_counts=True)
    num_after = np.bincount(inputs, minlength=vocab_size)
    num_kinds_after = np.bincount(pairs // vocab_size, minlength=vocab_size)

    wanted = valid_inputs * vocab_size + valid_labels
    found = np.searchsorted(pairs, wanted)
    hit = np.zeros(len(wanted), dtype=bool)
    inside = found < len(pairs)
    hit[inside] = pairs[found[inside]] == wanted[inside]
    pair_count = np.zeros(len(wanted))
    pair_count[hit] = counts[found[hit]]
    # Witten-Bell: a token never seen before its successor leaves everything to the unigram.
    kinds = np.maximum(num_kinds_after[valid_inputs], 1)
    bigram = (pair_count + kinds * unigram[valid_labels]) / (num_after[valid_inputs] + kinds)
    return Baselines(float(-np.log(unigram[valid_labels]).mean()), float(-np.log(bigram).mean()))


def _pairs(reader: BatchReader, num_sequences: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns inputs and labels of all positions with a loss: int64 [tokens] each."""
    chunks = list(_chunks(reader, num_sequences))
    return np.concatenate([c[0] for c in chunks]), np.concatenate([c[1] for c in chunks])


def _chunks(reader: BatchReader, num_sequences: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for first in range(0, num_sequences, _CHUNK_SEQUENCES):
        batch = reader.micro_batch(first, min(_CHUNK_SEQUENCES, num_sequences - first))
        counted = batch.loss_mask > 0
        yield batch.tokens[counted].numpy(), batch.labels[counted].numpy()
