"""A model on a GPU whose training step is run with one row's settings after the other.

The step is the run's own (`training.step.train_step`) on batches of the run's own reader. The model is built
once: the core attentions have no parameters, so they are exchanged, and what else a row changes (length,
windows, k, recomputation, micro-batch) is read from settings in every step. Weights go on being trained from
row to row.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import build_module

from phsa_megatron.attention.core_attention import DenseCoreAttention, PHSACoreAttention
from phsa_megatron.attention.punctuation import table_of
from phsa_megatron.attention.spec import layer_spec
from phsa_megatron.config.derive import derive
from phsa_megatron.config.errors import ConfigError
from phsa_megatron.config.schema import CudaGraphs, Recompute, TrainConfig
from phsa_megatron.data.batches import Batch, BatchReader
from phsa_megatron.data.prefetch import Prefetcher
from phsa_megatron.data.tokenizer import Tokenizer
from phsa_megatron.model.transformer_config import recompute_settings
from phsa_megatron.parallel.groups import initialize
from phsa_megatron.training.optimizer import build_parts
from phsa_megatron.training.progress import Progress
from phsa_megatron.training.state import TrainState
from phsa_megatron.training.step import StepResult, micro_batch_starts, train_step

_NO_RECOMPUTE = {"recompute_granularity": None, "recompute_method": None, "recompute_num_layers": None}


@dataclass(frozen=True)
class Timing:
    """What steps took.

    Attributes:
        step_s: seconds of each timed step, from batch to updated weights.
        peak_memory_gib: most that torch had allocated.
        reserved_gib: most that torch had taken from the device.
        losses_nats: of all steps, warm-up included.
        document_tokens: real lengths of the documents of each timed step.
    """

    step_s: list[float]
    peak_memory_gib: float
    reserved_gib: float
    losses_nats: list[float]
    document_tokens: list[list[int]]

    @property
    def tokens_of_a_tokens_document(self) -> float:
        """Return the length of the document that a token is in, in the mean over the timed steps' tokens."""
        lengths = [tokens for step in self.document_tokens for tokens in step]
        return sum(tokens**2 for tokens in lengths) / sum(lengths)

    @property
    def median_s(self) -> float:
        """Return the median step."""
        return statistics.median(self.step_s)


@dataclass
class Session:
    """An open model; `adopt` gives it a row's settings, `steps` trains it.

    Attributes:
        config: the settings in use.
    """

    config: TrainConfig
    state: TrainState = field(default_factory=TrainState)

    def __post_init__(self) -> None:
        self.groups = initialize(self.config)
        self.tokenizer = Tokenizer.from_file(self.config.data.tokenizer_file, self.config.data.eod_token)
        attention = self.config.attention
        self.table = table_of(self.tokenizer.decoded_tokens(), attention).to(self.groups.device)
        self.parts = build_parts(self.config, self.groups)
        self.progress = Progress()

    @property
    def on_gpu(self) -> bool:
        """Return whether the model is on a GPU."""
        return self.groups.device.type == "cuda"

    def adopt(self, config: TrainConfig) -> None:
        """Use other settings for the steps to come: attention, lengths, batch, recomputation."""
        if (config.compute.cuda_graphs == CudaGraphs.none) != (self.parts.graph is None):
            raise ConfigError(
                f"compute.cuda_graphs={config.compute.cuda_graphs}: the model was built for the other one; "
                "give the setting to all rows"
            )
        self.config = self.parts.config = config
        self.parts.derived = derive(config)
        core: Any = layer_spec(config).submodules
        core = core.self_attention.submodules.core_attention
        for module in self.parts.modules:
            megatron_config: Any = module.config
            fields = {**_NO_RECOMPUTE, **recompute_settings(config)}
            for name, value in fields.items():
                setattr(megatron_config, name, value)
            for layer in module.decoder.layers:  # type: ignore[union-attr]
                layer.recompute_mlp = config.parallel.recompute == Recompute.mlp
                attention = layer.self_attention
                attention.checkpoint_core_attention = config.parallel.recompute == Recompute.selective
                old = attention.core_attention
                assert isinstance(old, PHSACoreAttention | DenseCoreAttention)
                attention.core_attention = build_module(
                    core,
                    config=megatron_config,
                    layer_number=old.layer_number,
                    attn_mask_type=AttnMaskType.causal,
                    attention_type="self",
                    pg_collection=self.groups.collection,
                )
                attention.core_attention.train(layer.training)

    @contextmanager
    def batches(self, num_steps: int) -> Iterator[Prefetcher[int, list[Batch]]]:
        """Read the batches of so many steps ahead, in a thread, as a run does."""
        reader = BatchReader(self.config, "train", self.tokenizer)
        size, consumed = self.config.optim.micro_batch_sequences, self.state.consumed_sequences
        per_step = self.config.optim.global_batch_sequences

        def read(step: int) -> list[Batch]:
            starts = micro_batch_starts(self.config, self.groups, consumed + step * per_step)
            made = [reader.micro_batch(first, size) for first in starts]
            return [batch.pinned() for batch in made] if self.on_gpu else made

        with Prefetcher(read, range(num_steps), depth=2) as prefetcher:
            yield prefetcher

    def step(self, batches: list[Batch]) -> StepResult:
        """Train one step, and wait until the weights are updated."""
        result = train_step(self.parts, batches, self.table, self.state, self.progress)
        if self.on_gpu:
            torch.cuda.synchronize()
        return result

    def time_steps(self, num_warm_up: int, num_timed: int) -> Timing:
        """Train so many steps and return how long they took."""
        self.free()
        seconds, losses, documents = [], [], []
        with self.batches(num_warm_up + num_timed) as source:
            for _ in range(num_warm_up + num_timed):
                start_s = time.perf_counter()
                batches = next(source)
                losses.append(self.step(batches).loss_nats)
                seconds.append(time.perf_counter() - start_s)
                documents.append([tokens for batch in batches for tokens in batch.document_tokens])
        gib = 2**30
        peak = torch.cuda.max_memory_allocated() / gib if self.on_gpu else 0.0
        reserved = torch.cuda.max_memory_reserved() / gib if self.on_gpu else 0.0
        return Timing(seconds[num_warm_up:], peak, reserved, losses, documents[num_warm_up:])

    def free(self) -> None:
        """Give back what earlier rows left: a failed step's gradients, a recording's activations."""
        if self.parts.graph is not None:
            self.parts.graph.release()
        self.parts.zero_grad()
        for _, parameter in self.parts.named_parameters():
            parameter.grad = None
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
