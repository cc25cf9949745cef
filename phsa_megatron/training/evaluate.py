"""Validation loss by domain, on the same sequences every time, without a trace in the training state."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from phsa_megatron.attention.punctuation import PunctuationTable
from phsa_megatron.attention.selection_stats import SelectionRecorder
from phsa_megatron.config.schema import AttentionKind, TrainConfig
from phsa_megatron.data.batches import Batch, BatchReader
from phsa_megatron.data.tokenizer import Tokenizer
from phsa_megatron.parallel.groups import Groups
from phsa_megatron.training.forward_step import ForwardStep
from phsa_megatron.training.optimizer import Parts
from phsa_megatron.training.state import capture_rng, restore_rng
from phsa_megatron.training.step import forward_backward

CHOICE_METRIC = "attention/frac_queries_with_more_candidates_than_k"
SHAPE_METRICS = (
    "selected_punctuation_frac",
    "selected_distance_blocks",
    "neighbour_overlap_frac",
    "selection_entropy_frac",
)
_DISTANCE = re.compile(r"(attention/(?:layer_\d+/)?)distance_log2_\d+_frac")
_NATS_PER_BIT = math.log(2.0)


@dataclass(frozen=True)
class Loss:
    """A summed cross-entropy, and what to divide it by."""

    nats: float
    """Sum over tokens."""
    num_tokens: int
    """Tokens with a loss."""
    num_bytes: int
    """UTF-8 bytes of text that those tokens stand for; the end of a document stands for none."""

    @property
    def nats_per_token(self) -> float:
        """Returns the mean cross-entropy."""
        return self.nats / self.num_tokens

    @property
    def bits_per_byte(self) -> float:
        """Returns the bits needed per byte of text: comparable between tokenizers."""
        return self.nats / _NATS_PER_BIT / self.num_bytes


@dataclass(frozen=True)
class Evaluation:
    """What one evaluation found; equal on all processes."""

    domains: dict[str, Loss]
    """Loss of each domain that has a token."""
    selection: dict[str, float]
    """Selection statistics by metric name; empty for dense attention."""
    seconds: float
    """Wall time."""

    @property
    def total(self) -> Loss:
        """Returns the loss over all domains' tokens."""
        parts = self.domains.values()
        return Loss(
            sum(p.nats for p in parts), sum(p.num_tokens for p in parts), sum(p.num_bytes for p in parts)
        )

    def metrics(self) -> dict[str, float]:
        """Returns the values under their names in the metrics table."""
        values = {"val/loss_nats": self.total.nats_per_token}
        for domain, loss in self.domains.items():
            values[f"val/{domain}/loss_nats"] = loss.nats_per_token
            values[f"val/{domain}/bits_per_byte"] = loss.bits_per_byte
        return values | self.selection | {"val/eval_s": self.seconds}

    def histograms(self) -> list[Histogram]:
        """Returns the distances of selected blocks over all layers, then by layer."""
        shares: dict[str, list[float]] = {}
        for name, share in self.selection.items():
            if match := _DISTANCE.fullmatch(name):
                shares.setdefault(match[1], []).append(share)
        return [
            Histogram(f"{where}distance_histogram", values, [2.0**m for m in range(len(values) + 1)])
            for where, values in shares.items()
        ]


@dataclass(frozen=True)
class Histogram:
    """How far away selected blocks are: shares of the bins between edges, in blocks."""

    name: str
    shares: list[float]
    edges: list[float]


class Evaluator:
    """Evaluates on fixed sequences: the first `evaluate.num_sequences_per_domain` of each domain.

    Args:
        config: the run.
        groups: process groups.
        tokenizer: the run's tokenizer.
        table: punctuation flags on the model's device.

    Raises:
        DataError: there is nothing to validate on.
    """

    def __init__(
        self, config: TrainConfig, groups: Groups, tokenizer: Tokenizer, table: PunctuationTable
    ) -> None:
        self.reader = BatchReader(config, "valid", tokenizer)
        self._config = config
        self._groups = groups
        self._table = table
        self._bytes_of_token = torch.from_numpy(tokenizer.token_num_bytes())

    def run(self, parts: Parts, should_leave: Callable[[], bool]) -> Evaluation | None:
        """Evaluates the weights as they are.

        Leaves the random generators, the model's mode, the optimizer and the position in the training data as
        they were.

        Args:
            parts: what is evaluated.
            should_leave: asked on all processes before each round of micro-batches; collective.

        Returns:
            The losses, or None if `should_leave` said so.
        """
        start_s = time.perf_counter()
        domains = self.reader.order.domains
        sums = torch.zeros(len(domains), 3, dtype=torch.float64, device=self._groups.device)
        recorder = None
        if self._config.attention.kind is AttentionKind.phsa:
            recorder = SelectionRecorder(self._config.model.num_layers)
        # Dense layers do not read the number of selected blocks, which is 0 for them.
        topk = parts.derived.topk_inference or self._config.attention.train_topk
        forward_step = ForwardStep(self._config, self._table, topk, self._groups, recorder)
        with _unchanged(parts):
            for batch in self._rounds(should_leave):
                if batch is None:
                    return None
                if batch:
                    rows = forward_backward(parts, batch, forward_step, forward_only=True)
                    self._add(sums, batch[0], rows)
                elif self._config.parallel.expert_size > 1:
                    # Others' tokens may need this process's experts: it goes along, and counts nothing.
                    along = [self.reader.micro_batch(0, 1)]
                    forward_backward(parts, along, replace(forward_step, recorder=None), forward_only=True)
        sums = self._groups.from_last_stage(self._groups.sum_over_data(sums))
        losses = {
            domain: Loss(nats, int(num_tokens), int(num_bytes))
            for domain, (nats, num_tokens, num_bytes) in zip(domains, sums.tolist(), strict=True)
            if num_tokens
        }
        selection = {} if recorder is None else _selection_metrics(recorder, self._groups)
        return Evaluation(losses, selection, time.perf_counter() - start_s)

    def _rounds(self, should_leave: Callable[[], bool]) -> Iterator[list[Batch] | None]:
        """Yields this process's micro-batch of each round (none if it has nothing left), or None to leave.

        All processes go through the same number of rounds, because they agree on leaving in each.
        """
        size = self._config.evaluate.micro_batch_sequences
        num_sequences = self.reader.num_sequences or 0
        for round_start in range(0, num_sequences, size * self._groups.data_size):
            if should_leave():
                yield None
                return
            first = round_start + self._groups.data_rank * size
            count = min(size, num_sequences - first)
            yield [self.reader.micro_batch(first, count)] if count > 0 else []

    def _add(self, sums: Tensor, batch: Batch, rows: list[Tensor]) -> None:
        """Adds a micro-batch to the sums [domains, (nats, tokens, bytes)]; only the last stage has rows."""
        if not rows:
            return
        labels, counted = self._groups.own_part(batch.labels), self._groups.own_part(batch.loss_mask) > 0
        num_bytes = (self._bytes_of_token[labels] * counted).sum(dim=1)
        for i, domain in enumerate(batch.domains):
            row = sums[self.reader.order.domains.index(domain)]
            row[:2] += rows[0][:, i]
            row[2] += int(num_bytes[i])


def _selection_metrics(recorder: SelectionRecorder, groups: Groups) -> dict[str, float]:
    """Returns the statistics of all processes under their names in the metrics table. Collective."""
    layers = recorder.layers(groups.sum_over_world(recorder.sums.to(groups.device)))
    values = {}
    for number, layer in layers.items():
        values[f"attention/layer_{number}/selected_mass_frac"] = layer.selected_mass_frac
        values[f"attention/layer_{number}/attended_key_frac"] = layer.attended_key_frac
    # Every layer saw the same queries, so the mean over layers is the mean over queries.
    choosing = [layer.frac_queries_with_more_candidates_than_k for layer in layers.values()]
    if choosing:
        values[CHOICE_METRIC] = sum(choosing) / len(choosing)
    shapes = recorder.shapes_by_layer(groups.sum_over_world(recorder.shapes.to(groups.device)))
    for number, shape in shapes.items():
        for name in SHAPE_METRICS if number else ("block_punctuation_frac",):
            where = f"layer_{number}/" if number else ""
            values[f"attention/{where}{name}"] = getattr(shape, name)
    for number, shape in shapes.items():
        reached = 1 + max(m for m, share in enumerate(shapes[0].distance_frac) if share or m == 0)
        where = f"layer_{number}/" if number else ""
        for bucket, share in enumerate(shape.distance_frac[:reached] if number else shape.distance_frac):
            values[f"attention/{where}distance_log2_{bucket}_frac"] = share
    # Where no layer chose anything there is no share of it.
    return {name: value for name, value in values.items() if math.isfinite(value)}


@contextmanager
def _unchanged(parts: Parts) -> Iterator[None]:
    """Holds the model in evaluation mode without gradients, and puts back all that evaluation could touch."""
    rng = capture_rng()
    modes = [chunk.training for chunk in parts.model]
    with parts.gathered_parameters(), torch.no_grad():
        for chunk in parts.model:
            chunk.eval()
        try:
            yield
        finally:
            for chunk, training in zip(parts.model, modes, strict=True):
                chunk.train(training)
            restore_rng(rng)
