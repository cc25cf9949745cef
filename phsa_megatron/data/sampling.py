"""Which text sequence number n is made of: a pure function of the seed, the mixture and n.

Nothing else enters: not the number of processes, of workers or of steps. So a run's place in its data is one
integer, any place can be reached at once, and another layout reads the same text in the same order.

How it is computed (`ALGORITHM` names this version; change it when you change any of this):

1. A source and an epoch give a permutation of the source's documents. The documents, concatenated in that
   order, are a stream of T tokens, cut at every S tokens into sequences of S + 1 tokens: inputs, and labels
   one further. There are (T - 1) // S of them; the up to S tokens of the tail are not trained on in this
   epoch, and since each epoch permutes anew, hardly ever the same ones in the next.
2. The sequences of an epoch are visited in a second permutation.
3. Sources are mixed in cycles of `CYCLE` sequences. With cumulative shares W_0 = 0 .. W_n = 1 and an offset u
   in [0, 1) that belongs to the cycle, source s gets ceil(W_s * CYCLE - u) - ceil(W_{s-1} * CYCLE - u) of
   them (systematic sampling: never more than one off its share, and exact on average). u walks by the golden
   ratio, so that the error of a running count stays small. The order inside a cycle is a permutation of its
   own.

Every permutation sorts raw words of a Philox generator, whose stream numpy keeps stable (unlike the methods
of `Generator`), with a key that hashes what the permutation belongs to.

Memory per source: 16 bytes a document and 8 bytes a sequence for each of the two most recent epochs.

Validation has no randomness: sequences in natural order, see `ValidationOrder`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from phsa_megatron.config.errors import DataError
from phsa_megatron.data.indexed import IndexedSource

ALGORITHM = "phsa-order-1"
CYCLE = 1024
_CYCLES_PER_BLOCK = 4096
_GOLDEN_RATIO_BITS = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Piece:
    """A run of tokens of one document.

    Attributes:
        document: index of the document in its source.
        first_token: position of the first token inside the document.
        num_tokens: how many.
    """

    document: int
    first_token: int
    num_tokens: int


@dataclass(frozen=True)
class Sequence:
    """One sequence: where it comes from and its pieces, together up to S + 1 tokens.

    Attributes:
        source: name of the source; empty if a validation set has no sequence with this number.
        domain: domain of the source.
        pieces: in order. The last token of the last piece is a label only.
    """

    source: str
    domain: str
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class WeightedSource:
    """A source of the training mixture: its documents, its weight relative to the others, and its domain."""

    documents: IndexedSource
    weight: float
    domain: str


def permutation(size: int, *belongs_to: object) -> np.ndarray:
    """Return a permutation of `range(size)`, int64, that depends on the arguments and on nothing else."""
    key = hashlib.sha256(json.dumps([ALGORITHM, *belongs_to]).encode()).digest()[:16]
    words = np.random.Philox(key=int.from_bytes(key, "little")).random_raw(size)
    return np.argsort(words, kind="stable")


class DocumentStream:
    """Documents of a source, concatenated in a given order, with random access by token.

    Args:
        lengths: int [documents], tokens of each document of the source.
        order: int64 [documents], document indices in the order of the stream; None is the natural order.
    """

    def __init__(self, lengths: np.ndarray, order: np.ndarray | None) -> None:
        self._order = order
        self._starts = np.zeros(len(lengths) + 1, dtype=np.int64)
        np.cumsum(lengths if order is None else lengths[order], dtype=np.int64, out=self._starts[1:])

    @property
    def num_tokens(self) -> int:
        """Tokens in the stream."""
        return int(self._starts[-1])

    def pieces(self, first_token: int, num_tokens: int) -> tuple[Piece, ...]:
        """Return the documents under `num_tokens` tokens from `first_token` on, or to the stream's end."""
        end = min(first_token + num_tokens, self.num_tokens)
        found = []
        slot = int(np.searchsorted(self._starts, first_token, side="right")) - 1
        while first_token < end:
            start, stop = int(self._starts[slot]), min(int(self._starts[slot + 1]), end)
            if stop > first_token:
                document = slot if self._order is None else int(self._order[slot])
                found.append(Piece(document, first_token - start, stop - first_token))
                first_token = stop
            slot += 1
        return tuple(found)


class TrainingOrder:
    """The endless sequence of training sequences.

    Args:
        sources: by name. The order does not depend on the order of the names.
        seq_len_tokens: S.
        seed: of all permutations.

    Raises:
        DataError: no source, a weight that is not positive, or a source with fewer than S + 1 tokens.
    """

    def __init__(self, sources: Mapping[str, WeightedSource], seq_len_tokens: int, seed: int) -> None:
        if not sources:
            raise DataError("data.sources is empty: name at least one prepared data set to train on.")
        self._names = sorted(sources)
        self._sources = [sources[name] for name in self._names]
        self._seq_len = seq_len_tokens
        self._seed = seed
        for name, source in zip(self._names, self._sources, strict=True):
            if not source.weight > 0:
                raise DataError(
                    f"data.sources.{name}.weight={source.weight}: a weight is the source's share relative to "
                    f"the others and must be above 0; remove the source to leave it out."
                )
            if source.documents.num_tokens < seq_len_tokens + 1:
                raise DataError(
                    f"data.sources.{name} ({source.documents.prefix}) has {source.documents.num_tokens} "
                    f"tokens: fewer than one sequence of data.seq_len_tokens + 1 = {seq_len_tokens + 1}. "
                    f"Prepare more text or shorten data.seq_len_tokens."
                )
        weights = np.array([source.weight for source in self._sources], dtype=np.float64)
        self._bounds = np.concatenate([[0.0], np.cumsum(weights / weights.sum())])
        self._bounds[-1] = 1.0
        first_offset = hashlib.sha256(json.dumps([ALGORITHM, "mixture", seed]).encode()).digest()[:8]
        self._first_offset = np.uint64(int.from_bytes(first_offset, "little"))
        self._before_block = [np.zeros(len(self._names), dtype=np.int64)]
        # One cache per object, not per class, so that a dropped order frees its permutations.
        self._epoch = lru_cache(maxsize=2 * len(self._names))(self._compute_epoch)
        self._cycle = lru_cache(maxsize=4)(self._compute_cycle)
        self._block = lru_cache(maxsize=2)(self._compute_block)

    @property
    def num_sequences(self) -> int | None:
        """None: there is always a next one."""
        return None

    def epoch_sequences(self, name: str) -> int:
        """Return the number of sequences in one epoch of a source."""
        return self._sequences_of(self._names.index(name))

    def sequence(self, number: int) -> Sequence:
        """Return sequence `number`, counted from 0 over the whole mixture."""
        cycle, position = divmod(number, CYCLE)
        chosen, index_in_source = self._cycle(cycle)
        source = int(chosen[position])
        epoch, index = divmod(int(index_in_source[position]), self._sequences_of(source))
        stream, visit = self._epoch(source, epoch)
        pieces = stream.pieces(int(visit[index]) * self._seq_len, self._seq_len + 1)
        return Sequence(self._names[source], self._sources[source].domain, pieces)

    def _sequences_of(self, source: int) -> int:
        return (self._sources[source].documents.num_tokens - 1) // self._seq_len

    def _compute_epoch(self, source: int, epoch: int) -> tuple[DocumentStream, np.ndarray]:
        name, documents = self._names[source], self._sources[source].documents
        order = permutation(len(documents), "documents", self._seed, name, epoch)
        visit = permutation(self._sequences_of(source), "sequences", self._seed, name, epoch)
        return DocumentStream(documents.lengths, order), visit

    def _counts(self, first_cycle: int, num_cycles: int) -> np.ndarray:
        """Return how many sequences each source gives to each cycle: int64 [num_cycles, sources]."""
        cycles = np.arange(first_cycle, first_cycle + num_cycles, dtype=np.uint64)
        words = cycles * _GOLDEN_RATIO_BITS + self._first_offset
        offsets = (words >> np.uint64(11)) * 2.0**-53
        edges = np.ceil(self._bounds * CYCLE - offsets[:, None]).astype(np.int64)
        return np.diff(edges, axis=1)

    def _compute_block(self, block: int) -> np.ndarray:
        """Return the running count of each source before each cycle of a block and after its last one."""
        while len(self._before_block) <= block:
            first = (len(self._before_block) - 1) * _CYCLES_PER_BLOCK
            total = self._counts(first, _CYCLES_PER_BLOCK).sum(axis=0)
            self._before_block.append(self._before_block[-1] + total)
        counts = self._counts(block * _CYCLES_PER_BLOCK, _CYCLES_PER_BLOCK)
        return np.concatenate(
            [[self._before_block[block]], self._before_block[block] + counts.cumsum(axis=0)]
        )

    def _compute_cycle(self, cycle: int) -> tuple[np.ndarray, np.ndarray]:
        """Return, for each place in a cycle, its source and the number of the sequence inside that source."""
        block, inside = divmod(cycle, _CYCLES_PER_BLOCK)
        before, after = self._block(block)[inside : inside + 2]
        counts = after - before
        chosen = np.repeat(np.arange(len(counts)), counts)[permutation(CYCLE, "cycle", self._seed, cycle)]
        index_in_source = np.empty(CYCLE, dtype=np.int64)
        for source, count in enumerate(counts):
            index_in_source[chosen == source] = before[source] + np.arange(count)
        return chosen, index_in_source


class ValidationOrder:
    """The same `num_per_domain` sequences of each domain, always, in natural order.

    The documents of a source are read in the order of the file and cut at every S tokens; the last sequence
    may be short. A domain with several sources takes a sequence of each in turn. Domains follow each other by
    name: number n belongs to domain n // num_per_domain. A domain with fewer sequences than that has empty
    ones at the end, which count nothing: no text is ever repeated.

    Args:
        sources: by name, the validation set and its domain.
        seq_len_tokens: S.
        num_per_domain: sequences per domain.
    """

    def __init__(
        self, sources: Mapping[str, tuple[IndexedSource, str]], seq_len_tokens: int, num_per_domain: int
    ) -> None:
        self._seq_len = seq_len_tokens
        self._num_per_domain = num_per_domain
        self.domains = sorted({domain for _, domain in sources.values()})
        self._streams = {name: DocumentStream(source.lengths, None) for name, (source, _) in sources.items()}
        self._in_domain: dict[str, list[tuple[int, str]]] = {}
        for domain in self.domains:
            # One source's natural order, by turns with the others: sort by number, then by name.
            available = [
                (number, name)
                for name in sorted(sources)
                if sources[name][1] == domain
                for number in range(
                    min(num_per_domain, -(-(self._streams[name].num_tokens - 1) // seq_len_tokens))
                )
            ]
            self._in_domain[domain] = sorted(available)[:num_per_domain]

    @property
    def num_sequences(self) -> int:
        """Sequences of all domains, empty ones included."""
        return self._num_per_domain * len(self.domains)

    def sequence(self, number: int) -> Sequence:
        """Return validation sequence `number`; it may have no pieces."""
        if not 0 <= number < self.num_sequences:
            raise IndexError(f"validation sequence {number} of {self.num_sequences}")
        domain = self.domains[number // self._num_per_domain]
        index = number % self._num_per_domain
        if index >= len(self._in_domain[domain]):
            return Sequence("", domain, ())
        place, name = self._in_domain[domain][index]
        pieces = self._streams[name].pieces(place * self._seq_len, self._seq_len + 1)
        return Sequence(name, domain, pieces)
