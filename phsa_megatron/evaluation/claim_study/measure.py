"""What is measured of a trained model, in every view: losses by domain and position, needles, kept mass.

The model is built with selecting layers whatever it was trained with, because core attentions have no
parameters; a view then says how they attend. Every view sees the same sequences and the same trials.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby, product
from pathlib import Path
from typing import Any

import torch
from megatron.core.transformer.module import Float16Module
from torch import Tensor

from phsa_megatron.attention.core_attention import PHSACoreAttention
from phsa_megatron.attention.information_loss import InformationRecorder
from phsa_megatron.attention.punctuation import PunctuationTable, table_of
from phsa_megatron.attention.selection_stats import frac_queries_with_more_candidates_than_k
from phsa_megatron.attention.side_info import SideInfo
from phsa_megatron.config.errors import ConfigError
from phsa_megatron.config.schema import AttentionConfig, AttentionKind, TrainConfig
from phsa_megatron.data.batches import Batch, BatchReader
from phsa_megatron.data.tokenizer import Tokenizer
from phsa_megatron.evaluation.claim_study.retrieval import (
    DEPTHS,
    LANGUAGES,
    NUM_DIGITS,
    TASKS,
    RetrievalText,
    Trial,
)
from phsa_megatron.evaluation.claim_study.texts import held_out_sentences
from phsa_megatron.evaluation.claim_study.units import View
from phsa_megatron.model.factory import build_model
from phsa_megatron.parallel.groups import Groups
from phsa_megatron.training.information import new_recorder

POSITION_EDGES = (256, 512, 1024, 2048, 4096)
"""Losses are added up by the position in the document, between these; the last range is open."""
_TRIAL_SEED = 7
_PAD_TOKENS = 16


@dataclass(frozen=True)
class Measures:
    """How much is measured.

    Attributes:
        lengths: tokens of the trials' prompts.
        trials: of each task, language, length and depth.
        mass_batches: validation micro-batches of each domain whose attention mass is looked at.
        mass_rows: queries of each layer and micro-batch.
        batch_tokens: of one forward pass over trials.
    """

    lengths: tuple[int, ...] = (512, 1024, 2048, 4096)
    trials: int = 8
    mass_batches: int = 1
    mass_rows: int = 64
    batch_tokens: int = 32768


@dataclass(frozen=True)
class EncodedTrial:
    """A trial and its tokens; the last NUM_DIGITS are the answer."""

    trial: Trial
    tokens: list[int]


class Questions:
    """What every model of a study is asked: made once, kept on the CPU.

    Args:
        config: any unit's settings; data and evaluation are read.
        folder: where `claim-study prepare` wrote.
        measures: how much.

    Raises:
        DataError: there is no held-out text.
    """

    def __init__(self, config: TrainConfig, folder: Path, measures: Measures) -> None:
        self.measures = measures
        self.tokenizer = Tokenizer.from_file(config.data.tokenizer_file, config.data.eod_token)
        self.reader = BatchReader(config, "valid", self.tokenizer)
        self._folder = folder
        self._batch_sequences = config.evaluate.micro_batch_sequences

    @cached_property
    def batches(self) -> list[Batch]:
        """Returns the validation sequences that have text, one domain a micro-batch."""
        per_domain = self.reader.num_sequences or 0
        per_domain //= len(self.reader.order.domains)
        size = self._batch_sequences
        found = []
        for number in range(len(self.reader.order.domains)):
            for first in range(0, per_domain, size):
                start = number * per_domain + first
                found.append(self.reader.micro_batch(start, min(size, per_domain - first)))
        return found

    @cached_property
    def trials(self) -> list[EncodedTrial]:
        """Returns all trials, by length."""
        encoded = []
        for language in LANGUAGES:
            filler = held_out_sentences(self._folder, language)
            maker = RetrievalText(language, filler, lambda text: len(self.tokenizer.encode(text)))
            cells = product(self.measures.lengths, TASKS, DEPTHS, range(self.measures.trials))
            for length, task, depth, number in cells:
                trial = maker.trial(task, length, depth, _TRIAL_SEED, number)
                encoded.append(EncodedTrial(trial, self.tokenizer.encode(trial.text)))
        for item in encoded:
            answer = self.tokenizer.decode(item.tokens[-NUM_DIGITS:])
            if answer != item.trial.text[-NUM_DIGITS:]:
                raise ConfigError(
                    f"data.tokenizer_file: digits are not tokens of their own, {answer!r} ends a trial; use "
                    "the tokenizer of phsa-train claim-study prepare"
                )
        return sorted(encoded, key=lambda item: item.trial.length_tokens)


class Model:
    """A trained model whose layers attend as a view says.

    Args:
        config: the unit's settings.
        weights: state of its bare module.
        groups: of this one process.
        tokenizer: the run's.
    """

    def __init__(
        self, config: TrainConfig, weights: dict[str, Any], groups: Groups, tokenizer: Tokenizer
    ) -> None:
        selecting = replace(config.attention, kind=AttentionKind.phsa)
        self.config = replace(config, attention=selecting)
        self.groups = groups
        self._decoded = tokenizer.decoded_tokens()
        self._tables: dict[tuple[str, ...], PunctuationTable] = {}
        (self._model,) = build_model(self.config, groups)
        bare = self._model.module if isinstance(self._model, Float16Module) else self._model
        bare.load_state_dict(weights, strict=True)
        self._model.eval()
        self._layers = [m for m in self._model.modules() if isinstance(m, PHSACoreAttention)]

    def table(self, attention: AttentionConfig) -> PunctuationTable:
        """Returns the punctuation flags of some settings, on the model's device."""
        key = (
            attention.punctuation_match,
            attention.punctuation_language,
            attention.selector,
            str(attention.control_seed),
        )
        if key not in self._tables:
            self._tables[key] = table_of(self._decoded, attention).to(self.groups.device)
        return self._tables[key]

    @contextmanager
    def attending(self, view: View) -> Iterator[None]:
        """Gives every layer a view's settings for a while."""
        before = [layer.attention for layer in self._layers]
        for layer in self._layers:
            layer.attention = view.attention
        try:
            yield
        finally:
            for layer, settings in zip(self._layers, before, strict=True):
                layer.attention = settings

    def forward(
        self,
        view: View,
        tokens: Tensor,
        cu_seqlens: Tensor,
        labels: Tensor | None = None,
        recorder: InformationRecorder | None = None,
    ) -> tuple[Tensor, SideInfo]:
        """Returns losses fp32 [b, S] in nats where there are labels, else logits [b, S, vocabulary].

        Args:
            view: how layers attend; `attending` holds it.
            tokens: int64 [b, S].
            cu_seqlens: int32 document boundaries over the b * S flattened tokens.
            labels: int64 [b, S], or None.
            recorder: sees what is selected.
        """
        device = self.groups.device
        boundaries = cu_seqlens
        tokens, cu_seqlens = tokens.to(device), cu_seqlens.to(device)
        table = self.table(view.attention)
        side_info = SideInfo.build(
            tokens,
            cu_seqlens,
            table,
            view.attention,
            view.topk,
            recorder,
            is_dense=view.is_dense,
            host_cu_seqlens=boundaries,
        )
        positions = torch.arange(tokens.shape[1], device=device).expand_as(tokens)
        labels = None if labels is None else labels.to(device)
        with torch.no_grad():
            output = self._model(tokens, positions, None, labels=labels, packed_seq_params=side_info)
        return output, side_info


def measure(model: Model, questions: Questions, view: View) -> dict[str, Any]:
    """Returns what a view gives, ready for JSON.

    Args:
        model: the trained model.
        questions: what it is asked.
        view: how its layers attend.
    """
    with model.attending(view):
        return {**_text(model, view, questions), "needles": _needles(model, view, questions)}


def _text(model: Model, view: View, questions: Questions) -> dict[str, Any]:
    """Returns losses by domain and position, by sequence, and the kept attention mass by domain."""
    edges = torch.tensor(POSITION_EDGES, dtype=torch.int32, device=model.groups.device)
    by_position: dict[str, Tensor] = {}
    by_sequence: dict[str, list[list[float]]] = {}
    mass: dict[str, dict[str, float | None]] = {}
    seen: dict[str, int] = {}
    for batch in questions.batches:
        domain = batch.domains[0]
        seen[domain] = seen.get(domain, 0) + 1
        recorder = None
        # In the dense view of a model that selects nothing there is no choice to look at.
        if seen[domain] <= questions.measures.mass_batches and not view.is_dense:
            recorder = new_recorder(model.config, model.groups, questions.measures.mass_rows)
        losses, side_info = model.forward(view, batch.tokens, batch.cu_seqlens, batch.labels, recorder)
        counted = batch.loss_mask.to(losses.device) > 0
        nats = torch.where(counted, losses.float(), 0.0).double()
        position = side_info.positions()[0].view(losses.shape)
        place = torch.bucketize(position, edges, right=True)
        sums = torch.zeros(len(edges) + 1, 2, dtype=torch.float64, device=losses.device)
        sums[:, 0].index_add_(0, place.flatten(), nats.flatten())
        sums[:, 1].index_add_(0, place.flatten(), counted.flatten().double())
        by_position[domain] = by_position.get(domain, 0) + sums.cpu()
        rows = torch.stack([nats.sum(1), counted.double().sum(1)], dim=1)
        by_sequence.setdefault(domain, []).extend(
            [round(total, 4), count] for total, count in rows.tolist() if count
        )
        if recorder is not None:
            shares = vars(recorder.total())
            mass[domain] = {k: None if math.isnan(v) else round(v, 6) for k, v in shares.items()}
    return {
        "nats_and_tokens_by_position": {k: v.tolist() for k, v in by_position.items()},
        "nats_and_tokens_by_sequence": by_sequence,
        "mass": mass,
    }


def _needles(model: Model, view: View, questions: Questions) -> list[dict[str, Any]]:
    """Returns a record for each task, language, length and depth: hits and nats of its trials, in order."""
    cells: dict[tuple[Any, ...], dict[str, Any]] = {}
    for length, group in groupby(questions.trials, key=lambda item: item.trial.length_tokens):
        items = list(group)
        size = max(1, questions.measures.batch_tokens // length)
        for first in range(0, len(items), size):
            chunk = items[first : first + size]
            for item, (hit, nats) in zip(chunk, _answers(model, view, chunk, length), strict=True):
                trial = item.trial
                key = (trial.task, trial.language, length, trial.depth_frac)
                cell = cells.setdefault(
                    key,
                    {
                        "task": trial.task,
                        "language": trial.language,
                        "length_tokens": length,
                        "depth_frac": trial.depth_frac,
                        "hits": [],
                        "nats": [],
                    },
                )
                cell["hits"].append(hit)
                cell["nats"].append(round(nats, 4))
    return list(cells.values())


def _answers(model: Model, view: View, items: list[EncodedTrial], length: int) -> list[tuple[int, float]]:
    """Returns, for each trial, whether greedy generation would give the answer, and the answer's nats."""
    longest = max(length, *(len(item.tokens) for item in items))
    width = -(-longest // _PAD_TOKENS) * _PAD_TOKENS
    tokens = torch.zeros(len(items), width, dtype=torch.int64)
    for row, item in enumerate(items):
        # What stands after the answer is never seen by it.
        tokens[row, : len(item.tokens)] = torch.tensor(item.tokens)
    boundaries = torch.arange(0, len(items) * width + 1, width, dtype=torch.int32)
    logits, _ = model.forward(view, tokens, boundaries)
    ends = torch.tensor([len(item.tokens) for item in items])
    places = ends[:, None] - NUM_DIGITS + torch.arange(NUM_DIGITS)
    rows = torch.arange(len(items))[:, None]
    answers = tokens[rows, places].to(logits.device)
    predictions = logits[rows.to(logits.device), places.to(logits.device) - 1].float()
    hits = (predictions.argmax(-1) == answers).all(1)
    nats = -predictions.log_softmax(-1).gather(-1, answers[..., None]).sum((1, 2))
    return list(zip(hits.int().tolist(), nats.tolist(), strict=True))


def choice_fractions(config: TrainConfig, topks: tuple[int, ...], num_batches: int = 16) -> dict[int, float]:
    """Returns the share of training queries that have more candidates than k, by k.

    Measured on the first micro-batches of the run's own data order.

    Args:
        config: a unit that selects blocks.
        topks: values of k.
        num_batches: micro-batches that are looked at.
    """
    reader = BatchReader(config, "train")
    size = config.optim.micro_batch_sequences
    boundaries = [reader.micro_batch(i * size, size).cu_seqlens for i in range(num_batches)]
    return {
        k: math.fsum(frac_queries_with_more_candidates_than_k(b, config.attention, k) for b in boundaries)
        / num_batches
        for k in topks
    }
