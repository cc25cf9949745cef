"""Batched generation with a cache: prompts by the training forward pass, then one new token a sequence.

A new token costs scores over the pooled blocks and attention over the selected tokens, at any length. One
process; a checkpoint of any layout is loaded into it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from phsa_megatron.attention.kv_cache import DecodeStep, KeyValueCache, PromptCache, check_selector
from phsa_megatron.attention.punctuation import PunctuationTable
from phsa_megatron.attention.side_info import SideInfo
from phsa_megatron.config.errors import ConfigError
from phsa_megatron.config.schema import KernelImpl, TrainConfig
from phsa_megatron.config.selector_kinds import inference_topk
from phsa_megatron.inference.decode_graph import DecodeGraph
from phsa_megatron.inference.sampling import Sampling, choose_tokens

# Rows of prompts are padded to a multiple, so that few shapes occur.
_LENGTH_MULTIPLE = 64


@dataclass
class Completion:
    """What follows a prompt.

    Attributes:
        tokens: generated ids; the end-of-document token, if it came, is the last one.
        finish_reason: 'stop' after the end-of-document token, 'length' after max_tokens.
    """

    tokens: list[int]
    finish_reason: str = "length"


class Generator:
    """Continues prompts with a model.

    Args:
        model: one GPTModel, wrapped or not, on its device; it is put into evaluation mode for each call.
        config: the recipe of the model.
        table: punctuation flags of the recipe's selector (`punctuation.table_of`), on the device.
        vocab_size: ids the tokenizer knows; rows above them are padding and are never generated.
        eod_id: ends a sequence; None never does.
        topk: blocks that a query selects, None for the recipe's `attention.infer_topk`.
        prefill_tokens: most tokens of prompts that are read in one pass, padding included; at least one
            prompt is.
        cuda_graph: capture the step of a new token and replay it; needs CUDA and attention.impl=triton.

    Raises:
        ConfigError: the recipe's layout, selector or device is not one that this generates with.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        config: TrainConfig,
        table: PunctuationTable,
        *,
        vocab_size: int,
        eod_id: int | None = None,
        topk: int | None = None,
        prefill_tokens: int = 16384,
        cuda_graph: bool = False,
    ) -> None:
        check_can_generate(config)
        bare: Any = model
        while hasattr(bare, "module"):
            bare = bare.module
        self._model = bare
        self._config, self._table = config, table
        self._vocab_size, self._eod_id = vocab_size, eod_id
        self.topk = inference_topk(config.attention) if topk is None else topk
        if self.topk < 1:
            raise ConfigError(f"topk={self.topk} must be at least 1; attention=window selects nothing")
        self._prefill_tokens = prefill_tokens
        weight = next(model.parameters())
        self._device, self._dtype = weight.device, weight.dtype
        self._cuda_graph = cuda_graph
        if cuda_graph:
            _check_capturable(config, self._device)
        self.cache_bytes = 0
        """Of the last call."""

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        first_number: int = 0,
        on_token: Callable[[int, int], None] | None = None,
    ) -> list[Completion]:
        """Return the continuation of each prompt, in one batch.

        Args:
            prompts: token ids, at least one each; each is the start of one document.
            sampling: how tokens are chosen, and how many at most.
            first_number: number of the first prompt, for its random numbers (`Sampling.seed`).
            on_token: told (index of the prompt, token) as tokens come.

        Raises:
            ValueError: no prompt, an empty one, or an id outside of the vocabulary.

        Deterministic for equal arguments and weights. The model's state is left as it was.
        """
        if not prompts or not all(prompts):
            raise ValueError("every prompt needs at least one token, such as the end-of-document token")
        if not all(0 <= token < self._vocab_size for prompt in prompts for token in prompt):
            raise ValueError(f"a prompt has a token that is not in 0 to {self._vocab_size - 1}")
        completions = [Completion([]) for _ in prompts]
        capacity = max(map(len, prompts)) + sampling.max_tokens
        draws = [sampling.random_numbers(first_number + i) for i in range(len(prompts))]
        with _evaluation_mode(self._model):
            cache = self._new_cache(len(prompts), capacity)
            logits = self._read_prompts(prompts, cache)
            step = self._step_function(cache)
            lengths = torch.tensor([len(prompt) for prompt in prompts], dtype=torch.int32)
            while True:
                tokens = self._choose(logits, sampling, draws)
                for i, token in enumerate(tokens.tolist()):
                    if lengths[i]:
                        self._take(completions[i], token, sampling)
                        lengths[i] = 0 if self._is_finished(completions[i], sampling) else lengths[i] + 1
                        if on_token is not None:
                            on_token(i, token)
                if not lengths.any():
                    return completions
                logits = step(tokens, lengths.to(self._device))

    def _take(self, completion: Completion, token: int, sampling: Sampling) -> None:
        completion.tokens.append(token)
        if token == self._eod_id:
            completion.finish_reason = "stop"

    def _is_finished(self, completion: Completion, sampling: Sampling) -> bool:
        return completion.finish_reason == "stop" or len(completion.tokens) >= sampling.max_tokens

    def _new_cache(self, batch: int, capacity_tokens: int) -> KeyValueCache:
        cache = KeyValueCache(
            self._config.model,
            self._config.attention,
            self._table,
            batch=batch,
            capacity_tokens=capacity_tokens,
            topk=self.topk,
            dtype=self._dtype,
            device=self._device,
        )
        self.cache_bytes = cache.num_bytes
        return cache

    def _read_prompts(self, prompts: Sequence[Sequence[int]], cache: KeyValueCache) -> Tensor:
        """Fill the cache; return the logits [B, vocabulary] after each prompt."""
        logits = []
        for first, part in self._passes(prompts):
            lengths = [len(prompt) for prompt in part]
            row_tokens = -(-max(lengths) // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE
            tokens = torch.zeros(len(part), row_tokens, dtype=torch.int64)
            for row, prompt in zip(tokens, part, strict=True):
                row[: len(prompt)] = torch.tensor(prompt)
            # Each row is a prompt and its padding, two documents.
            bounds = [row * row_tokens + n for row, length in enumerate(lengths) for n in (0, length)]
            side_info = SideInfo.build(
                tokens.to(self._device),
                torch.tensor([*bounds, tokens.numel()], dtype=torch.int32).to(self._device),
                self._table,
                self._config.attention,
                self.topk,
            )
            side_info.prompt_cache = PromptCache(cache, first, lengths)
            angles = self._model.rotary_pos_emb.get_emb(row_tokens)
            positions = torch.arange(row_tokens, device=self._device).expand_as(tokens)
            hidden = self._hidden(side_info.token_ids, positions, angles, side_info)
            last = torch.tensor(lengths, device=self._device) - 1
            logits.append(self._logits(hidden[last, torch.arange(len(part), device=self._device)]))
        return torch.cat(logits)

    def _passes(self, prompts: Sequence[Sequence[int]]) -> Iterator[tuple[int, Sequence[Sequence[int]]]]:
        """Yield (first row, prompts) that are read together, in order."""
        first = 0
        while first < len(prompts):
            end, longest = first + 1, len(prompts[first])
            while end < len(prompts):
                longest = max(longest, len(prompts[end]))
                if longest * (end + 1 - first) > self._prefill_tokens:
                    break
                end += 1
            yield first, prompts[first:end]
            first = end

    def _step_function(self, cache: KeyValueCache) -> Callable[[Tensor, Tensor], Tensor]:
        """Return (tokens int64 [B], lengths int32 [B], 0 for finished ones) -> logits [B, vocabulary]."""
        angles = self._model.rotary_pos_emb.get_emb(cache.capacity_tokens)

        def step(tokens: Tensor, lengths: Tensor) -> Tensor:
            info = DecodeStep(cache=cache, lengths=lengths, marks=cache.marks(tokens, lengths))
            positions = (lengths - 1).clamp(min=0).long()
            own_angles = angles[positions].transpose(0, 1)  # [1, B, 1, dim]
            hidden = self._hidden(tokens[:, None], positions[:, None], own_angles, info)
            return self._logits(hidden[0])

        return DecodeGraph(step, self._device) if self._cuda_graph else step

    def _hidden(
        self, tokens: Tensor, positions: Tensor, angles: Tensor, info: SideInfo | DecodeStep
    ) -> Tensor:
        """Return the hidden states [S, b, hidden] of tokens [b, S]; angles are [S, 1 or b, 1, dim]."""
        embedded = self._model.embedding(input_ids=tokens, position_ids=positions)
        hidden: Tensor = self._model.decoder(
            hidden_states=embedded, attention_mask=None, rotary_pos_emb=angles, packed_seq_params=info
        )
        return hidden

    def _logits(self, hidden: Tensor) -> Tensor:
        """Return logits [B, vocabulary] of hidden states [B, hidden]."""
        model = self._model
        weight = (
            model.shared_embedding_or_output_weight() if model.share_embeddings_and_output_weights else None
        )
        logits: Tensor = model.output_layer(hidden.unsqueeze(0), weight=weight)[0][0]
        return logits[:, : self._vocab_size]

    def _choose(self, logits: Tensor, sampling: Sampling, draws: list[torch.Generator]) -> Tensor:
        if sampling.temperature == 0:
            return choose_tokens(logits, sampling, None)
        uniforms = torch.cat([torch.rand(1, dtype=torch.float64, generator=draw) for draw in draws])
        return choose_tokens(logits, sampling, uniforms.to(logits.device))


def check_can_generate(config: TrainConfig) -> None:
    """Refuse recipes that generation with a cache does not serve.

    Raises:
        ConfigError: it names the field, the rule and the fix.
    """
    parallel = config.parallel
    for field in ("tensor_size", "pipeline_size", "context_size", "expert_size"):
        if getattr(parallel, field) != 1:
            raise ConfigError(
                f"parallel.{field}={getattr(parallel, field)}: generation with a cache runs in one process; "
                f"load the checkpoint with parallel.{field}=1 (weights are resharded as they are read)"
            )
    check_selector(config.attention)


def _check_capturable(config: TrainConfig, device: torch.device) -> None:
    if device.type != "cuda" or config.attention.impl != KernelImpl.triton or config.model.num_experts:
        raise ConfigError(
            f"cuda_graph needs a CUDA device, attention.impl=triton and a model without experts; this is "
            f"{device.type}, {config.attention.impl.value}, model.num_experts={config.model.num_experts}"
        )


@contextmanager
def _evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """Put the model into evaluation mode, and back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
