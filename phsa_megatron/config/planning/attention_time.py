"""The time of one layer's attention on one process, from measured rows of the kernels.

Rows are of one document on one GPU (`h100_attention.json`, made from the benchmark's results). Between
measured lengths time is a power of the length, between measured k it is linear. Beyond the longest row,
selection and dense attention grow with the square of the length, everything else linearly; below the
shortest, everything shrinks linearly, so that short texts are not promised what was not measured.

The sequences of a micro-batch are one launch of each kernel. It takes no longer than its sequences one after
the other, and PHSA's no longer than one document of all their tokens, by attended pairs: the smaller of both
is taken. A sequence of 4k alone leaves a part of the GPU idle, which eight together do not.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_left
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from phsa_megatron.config.errors import ConfigError
from phsa_megatron.config.flops import is_dense, selected_pairs
from phsa_megatron.config.schema import AttentionConfig, AttentionKind, KernelImpl, Selector, TrainConfig
from phsa_megatron.config.selector_kinds import EAGER_ONLY

TABLE_FILE = Path(__file__).parent / "h100_attention.json"
_SQUARE, _LINEAR = 2.0, 1.0


@dataclass(frozen=True)
class AttentionTime:
    """Milliseconds of one layer, one micro-batch and one process.

    Attributes:
        forward_ms: pooling, selection and attention.
        backward_ms: of attention; selection has none.
        select_ms: the part of `forward_ms` that selects, which hides the gather of keys and values.
        notes: where the rows do not cover the run, and what was assumed instead.
    """

    forward_ms: float
    backward_ms: float
    select_ms: float
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Curve:
    """Milliseconds by length, at measured lengths (ascending)."""

    lengths: tuple[int, ...]
    ms: tuple[float, ...]

    def at(self, length: int, power_beyond: float) -> float:
        """Return the time at any length; `power_beyond` is the growth beyond the longest."""
        if length >= self.lengths[-1]:
            return self.ms[-1] * math.pow(length / self.lengths[-1], power_beyond)
        if length <= self.lengths[0]:
            return self.ms[0] * length / self.lengths[0]
        i = bisect_left(self.lengths, length)
        low, high = self.lengths[i - 1], self.lengths[i]
        share = math.log(length / low) / math.log(high / low)
        return math.exp((1 - share) * math.log(self.ms[i - 1]) + share * math.log(self.ms[i]))


@dataclass(frozen=True)
class Table:
    """The measured rows.

    Attributes:
        header: device, versions, window sizes and the file that the rows come from.
        phsa: curves by (query heads, stage, pass, k).
        dense: curves by (query heads, pass).
        group: query heads of a key-value head, by query heads.
        eager_ms: the call from Python at the shortest length, where Python is what takes the time, by pass.
    """

    header: dict[str, Any]
    phsa: dict[tuple[int, str, str, int], Curve]
    dense: dict[tuple[int, str], Curve]
    group: dict[int, float]
    eager_ms: dict[str, float]

    def topks(self, heads: int, stage: str, which: str) -> list[int]:
        """Return the k of a stage's rows, ascending."""
        return sorted(k for h, s, p, k in self.phsa if (h, s, p) == (heads, stage, which))

    def phsa_ms(self, heads: int, stage: str, which: str, topk: int, length: int, power: float) -> float:
        """Return a stage's time, linear in k between (and beyond) the measured k."""
        ks = self.topks(heads, stage, which)
        i = min(max(bisect_left(ks, topk), 1), len(ks) - 1)
        low, high = (self.phsa[heads, stage, which, k].at(length, power) for k in (ks[i - 1], ks[i]))
        return max(0.0, low + (high - low) * (topk - ks[i - 1]) / (ks[i] - ks[i - 1]))


@lru_cache(maxsize=1)
def table() -> Table:
    """Return the packaged rows."""
    raw = json.loads(TABLE_FILE.read_text(encoding="utf-8"))
    points: dict[Any, list[tuple[int, float]]] = {}
    group = {}
    for heads, kv_heads, length, topk, stage, which, ms in raw["phsa"]:
        points.setdefault((heads, stage, which, topk), []).append((length, ms))
        group[heads] = heads / kv_heads
    for heads, _, length, which, ms in raw["dense"]:
        points.setdefault((heads, which), []).append((length, ms))
    curves = {key: Curve(*zip(*sorted(rows), strict=True)) for key, rows in points.items()}
    eager = {which: [row[-1] for row in raw["eager"] if row[-2] == which] for which in ("fwd", "fwd_bwd")}
    return Table(
        header={key: value for key, value in raw.items() if not isinstance(value, list)},
        phsa={key: curve for key, curve in curves.items() if len(key) == 4},
        dense={key: curve for key, curve in curves.items() if len(key) == 2},
        group=group,
        eager_ms={which: sum(values) / len(values) for which, values in eager.items()},
    )


def attention_time(
    config: TrainConfig, document_tokens: float | None = None, packed_slowdown: float = 1.0
) -> AttentionTime:
    """Return the time of one layer's attention for one micro-batch on one process of this run.

    Args:
        config: the run.
        document_tokens: length of the document that a token is in, in the mean over tokens, where dense
            attention keeps packed documents apart; None takes every sequence to be one document.
        packed_slowdown: of dense attention's kernel for documents of many lengths, against cuDNN's.

    Raises:
        ConfigError: the run's attention has no measured rows at all.
    """
    model, attention, length = config.model, config.attention, config.data.seq_len_tokens
    rows, notes = table(), list[str]()
    group = model.num_query_heads / model.num_kv_heads
    heads = min(rows.group, key=lambda h: abs(math.log(rows.group[h] / group)))
    if rows.group[heads] != group:
        notes.append(f"R = {group:g} has no rows: those of R = {rows.group[heads]:g}, by query heads")
    # A process has a part of the heads (TP) and of the queries (CP).
    scale = model.num_query_heads / config.parallel.tensor_size / heads
    scale /= config.parallel.context_size
    sequences = config.optim.micro_batch_sequences
    scale *= model.head_dim / rows.header["head_dim"]
    if model.head_dim != rows.header["head_dim"]:
        notes.append(f"head dim {model.head_dim} has no rows: those of 128, by channels")
    longest = rows.dense[heads, "fwd"].lengths[-1]
    if length > longest:
        notes.append(f"{length:,} tokens are beyond the longest row ({longest:,}): extrapolated")
    if is_dense(length, attention):
        if attention.kind == AttentionKind.phsa:
            notes.append("documents up to attention.dense_len_tokens: cuDNN's rows")
        forward, both = (rows.dense[heads, which].at(length, _SQUARE) for which in ("fwd", "fwd_bwd"))
        if document_tokens is not None and attention.kind == AttentionKind.dense:
            forward, both = (
                packed_slowdown * _packed_ms(rows.dense[heads, which], length, document_tokens)
                for which in ("fwd", "fwd_bwd")
            )
        scale *= sequences
        return AttentionTime(scale * forward, scale * (both - forward), 0.0, tuple(notes))
    if attention.kind != AttentionKind.phsa:
        raise ConfigError(
            f"attention.kind={attention.kind}: only phsa and dense have measured times; plan one of them"
        )
    if attention.impl == KernelImpl.reference:
        raise ConfigError(
            "attention.impl=reference: only the Triton kernels have measured times; set attention.impl=triton"
        )
    forward, backward, select = _phsa_ms(rows, heads, attention, length, sequences, notes)
    return AttentionTime(scale * forward, scale * backward, scale * select, tuple(notes))


def _packed_ms(curve: Curve, tokens: int, document_tokens: float) -> float:
    """Return the time of so many tokens in documents: all are one launch, so short ones fill the GPU too."""
    row = max(round(document_tokens), curve.lengths[0])
    return curve.at(row, _SQUARE) * tokens / row * document_tokens / row


def _phsa_ms(
    rows: Table, heads: int, attention: AttentionConfig, length: int, sequences: int, notes: list[str]
) -> tuple[float, float, float]:
    """Return (forward, backward, selection) of all heads of a row's shape, on one process."""
    k, measured = attention.train_topk, rows.header
    if k > rows.topks(heads, "module", "fwd")[-1]:
        notes.append(f"k = {k} is beyond the rows: extrapolated")
    of_rows = (measured["block"], measured["init_tokens"], measured["local_tokens"], k)

    def select_ms(tokens: int) -> float:
        return rows.phsa_ms(heads, "select", "fwd", k, tokens, _SQUARE)

    def rest_ms(tokens: int) -> tuple[float, float]:
        # The module is timed for every k, the stages for two; its rest grows linearly beyond the longest row.
        inside = min(tokens, rows.dense[heads, "fwd"].lengths[-1])
        forward, both = (
            rows.phsa_ms(heads, "module", which, k, inside, _LINEAR) for which in ("fwd", "fwd_bwd")
        )
        return tokens / inside * (forward - select_ms(inside)), tokens / inside * (both - forward)

    # As one document of all tokens of the micro-batch: its sequences have fewer pairs.
    joined = sequences * length
    fewer = sequences * _pairs(length, *of_rows) / _pairs(joined, *of_rows)
    select = min(sequences * select_ms(length), select_ms(joined))
    forward, backward = (
        min(sequences * one, fewer * all_tokens)
        for one, all_tokens in zip(rest_ms(length), rest_ms(joined), strict=True)
    )
    if measured["block"] != attention.block_tokens:
        notes.append(f"blocks of {attention.block_tokens} have no rows: selection by the number of blocks")
    select *= measured["block"] / attention.block_tokens
    if attention.selector == Selector.halves:
        select *= 2
        notes.append("two vectors a block have no rows: twice the selection of one")
    elif attention.selector in EAGER_ONLY:
        notes.append(f"attention.selector={attention.selector} chooses eagerly, which takes longer than this")
    if attention.group_score.value != measured["group_score"]:
        notes.append(f"{attention.group_score.value} has no rows: those of {measured['group_score']}")
    own = (attention.block_tokens, attention.init_tokens, attention.local_tokens, k)
    pairs = _pairs(length, *own) / _pairs(length, *of_rows)
    if own != of_rows:
        notes.append(
            f"windows {attention.init_tokens} + {attention.local_tokens} have no rows: those of "
            f"{measured['init_tokens']} + {measured['local_tokens']}"
            + (", by attended pairs" if pairs > 1 else ", an upper bound")
        )
    more = max(1.0, pairs)
    return select + more * forward, more * backward, select


@lru_cache(maxsize=256)
def _pairs(length: int, block: int, init: int, local: int, topk: int) -> int:
    shape = AttentionConfig(block_tokens=block, init_tokens=init, local_tokens=local, train_topk=topk)
    return selected_pairs(length, shape, topk)
