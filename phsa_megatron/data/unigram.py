"""What simple statistics of the training text reach on the validation targets: the yardstick of a first run.

Both are measured on exactly the targets that evaluation counts: the same sequences, the same loss mask.

Unigram. c(t) is how often token t is in the training sets, each source scaled so that it counts by its share
of the mixture; N is the sum of all c, V the size of the vocabulary:

    p1(t) = (c(t) + 1) / (N + V)

Bigram, interpolated with the unigram by a Dirichlet prior of weight `BIGRAM_PRIOR` = mu. c(a, b) counts b
directly after a inside one document, scaled in the same way; c(a) is the sum over b:

    p2(b | a) = (c(a, b) + mu * p1(b)) / (c(a) + mu)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from phsa_megatron.config.errors import DataError
from phsa_megatron.config.schema import TrainConfig
from phsa_megatron.data.batches import BatchReader
from phsa_megatron.data.indexed import IndexedSource
from phsa_megatron.data.order import SequenceOrder
from phsa_megatron.data.tokenizer import Tokenizer

BIGRAM_PRIOR = 64.0
_CHUNK_TOKENS = 1 << 24


@dataclass(frozen=True)
class CrossEntropy:
    """Losses of the two models on some targets.

    Attributes:
        unigram_nats: mean over the targets, in nats per token.
        bigram_nats: the same of the bigram.
        num_targets: targets counted.
        num_bytes: UTF-8 bytes of text that the targets stand for.
    """

    unigram_nats: float
    bigram_nats: float
    num_targets: int
    num_bytes: int

    @property
    def unigram_bits_per_byte(self) -> float:
        """The unigram's loss in bits per byte of text."""
        return self.unigram_nats * self.num_targets / self.num_bytes / float(np.log(2.0))

    @property
    def bigram_bits_per_byte(self) -> float:
        """The bigram's loss in bits per byte of text."""
        return self.bigram_nats * self.num_targets / self.num_bytes / float(np.log(2.0))


@dataclass(frozen=True)
class Baseline:
    """The yardstick: over all validation targets, each counting the same, and by domain."""

    overall: CrossEntropy
    by_domain: Mapping[str, CrossEntropy]


@dataclass(frozen=True)
class _Targets:
    context: np.ndarray
    target: np.ndarray


def measure_baseline(config: TrainConfig) -> Baseline:
    """Return the cross-entropy of the training unigram and bigram on the run's validation targets.

    Reads each training set once. Deterministic.

    Raises:
        DataError: as `SequenceOrder`, or the validation sets hold no target.
    """
    tokenizer = Tokenizer.from_file(config.data.tokenizer_file, config.data.eod_token)
    targets = _validation_targets(config, tokenizer)
    order = SequenceOrder(config, "train", tokenizer)
    sources = {name: order.source(name) for name in order.source_names()}
    total_weight = sum(config.data.sources[name].weight for name in sources)
    num_tokens = sum(source.num_tokens for source in sources.values())
    # Counts of a source are scaled to its share of the mixture, the sum of all counts staying what it is.
    scales = {
        name: config.data.sources[name].weight / total_weight * num_tokens / source.num_tokens
        for name, source in sources.items()
    }
    every = _Targets(
        np.concatenate([t.context for t in targets.values()]),
        np.concatenate([t.target for t in targets.values()]),
    )
    unigram = _unigram(sources, scales, tokenizer.vocab_size)
    unigram_loss = -np.log(unigram[every.target])
    bigram_loss = _bigram_loss(every, sources, scales, unigram)
    target_bytes = tokenizer.token_num_bytes()[every.target]
    by_domain, first = {}, 0
    for domain, its in targets.items():
        part = slice(first, first + len(its.target))
        by_domain[domain] = _summary(unigram_loss[part], bigram_loss[part], target_bytes[part])
        first = part.stop
    return Baseline(_summary(unigram_loss, bigram_loss, target_bytes), by_domain)


def _summary(unigram_loss: np.ndarray, bigram_loss: np.ndarray, target_bytes: np.ndarray) -> CrossEntropy:
    return CrossEntropy(
        float(unigram_loss.mean()), float(bigram_loss.mean()), len(unigram_loss), int(target_bytes.sum())
    )


def _validation_targets(config: TrainConfig, tokenizer: Tokenizer) -> dict[str, _Targets]:
    reader = BatchReader(config, "valid", tokenizer)
    found: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    for number in range(reader.num_sequences or 0):
        batch = reader.micro_batch(number, 1)
        counted = batch.loss_mask[0] > 0
        pair = (batch.tokens[0][counted].numpy(), batch.labels[0][counted].numpy())
        found.setdefault(batch.domains[0], []).append(pair)
    targets = {
        domain: _Targets(np.concatenate([a for a, _ in pairs]), np.concatenate([b for _, b in pairs]))
        for domain, pairs in found.items()
    }
    empty = [domain for domain, its in targets.items() if not len(its.target)]
    if empty or not targets:
        raise DataError(
            f"the validation sets of domain {', '.join(empty) or '(none)'} hold no target token; prepare "
            f"more validation text, or set data.sources.NAME.valid_prefix to null."
        )
    return targets


def _chunks(source: IndexedSource) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield ids int64 [n] of whole documents, and bool [n], true at the last token of each document."""
    first = 0
    while first < len(source):
        limit = source.offsets[first] + _CHUNK_TOKENS
        last = max(first + 1, int(np.searchsorted(source.offsets, limit, side="right")) - 1)
        ids = np.concatenate([source.tokens(document) for document in range(first, last)]).astype(np.int64)
        ends = np.zeros(len(ids), dtype=bool)
        ends[source.offsets[first + 1 : last + 1] - source.offsets[first] - 1] = True
        yield ids, ends
        first = last


def _unigram(
    sources: Mapping[str, IndexedSource], scales: Mapping[str, float], vocab_size: int
) -> np.ndarray:
    counts = np.zeros(vocab_size, dtype=np.float64)
    for name, source in sources.items():
        for ids, _ in _chunks(source):
            counts += scales[name] * np.bincount(ids, minlength=vocab_size)
    smoothed: np.ndarray = (counts + 1.0) / (counts.sum() + vocab_size)
    return smoothed


def _bigram_loss(
    every: _Targets, sources: Mapping[str, IndexedSource], scales: Mapping[str, float], unigram: np.ndarray
) -> np.ndarray:
    vocab_size = len(unigram)
    # Only the pairs that validation asks for are counted: memory follows the targets, not the training text.
    pairs, which = np.unique(every.context * vocab_size + every.target, return_inverse=True)
    pair_counts = np.zeros(len(pairs), dtype=np.float64)
    context_counts = np.zeros(vocab_size, dtype=np.float64)
    for name, source in sources.items():
        for ids, ends in _chunks(source):
            inside = ~ends[:-1]
            left, right = ids[:-1][inside], ids[1:][inside]
            context_counts += scales[name] * np.bincount(left, minlength=vocab_size)
            keys = left * vocab_size + right
            places = np.minimum(np.searchsorted(pairs, keys), len(pairs) - 1)
            hits = places[pairs[places] == keys]
            pair_counts += scales[name] * np.bincount(hits, minlength=len(pairs))
    numerator = pair_counts[which] + BIGRAM_PRIOR * unigram[every.target]
    loss: np.ndarray = -np.log(numerator / (context_counts[every.context] + BIGRAM_PRIOR))
    return loss
