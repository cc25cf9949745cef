"""Keys, values, pooled blocks and running sums of sequences that are being generated, layer by layer.

Layers get them through `packed_seq_params`, as they get side information in training: prompts are read by
the training forward pass, whose SideInfo carries a `PromptCache` that keeps what layers have computed; a new
token goes through the layers with a `DecodeStep` instead of a SideInfo. Letters: B sequences, C tokens of
capacity, Hq/Hkv heads, D head dim, m tokens a block, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from phsa_kernels.api import append_keys, decode_attention, pool
from phsa_megatron.attention.controls import branch_flags
from phsa_megatron.attention.punctuation import PunctuationTable
from phsa_megatron.config.errors import ConfigError
from phsa_megatron.config.schema import AttentionConfig, AttentionKind, ModelConfig, Selector
from phsa_megatron.config.selector_kinds import WITHOUT_SELECTION

if TYPE_CHECKING:
    from phsa_megatron.attention.side_info import SideInfo

CACHED_SELECTORS = (
    Selector.phsa,
    Selector.mean_pool,
    Selector.last_token,
    Selector.shuffled,
    Selector.separators,
    Selector.window,
)
"""Selectors whose block is two running sums: a token is in the second branch or not when it comes."""


@dataclass(frozen=True)
class _Layer:
    keys: Tensor
    values: Tensor
    pooled: Tensor
    open_sums: Tensor
    open_marks: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.keys, self.values, self.pooled, self.open_sums, self.open_marks


class KeyValueCache:
    """The caches of all layers for B sequences of up to C tokens.

    A layer keeps keys and values [B, C, Hkv, D] and pooled keys [B, C / m, Hkv, D] of complete blocks, in the
    model's dtype, heads outermost in memory; and of each open block the fp32 sums of its keys and of its keys
    in the second branch (punctuation), and the number of the latter.

    Args:
        model: sizes.
        attention: of the run; its selector must be one of CACHED_SELECTORS.
        table: punctuation flags, on the device.
        batch: B.
        capacity_tokens: C at least; rounded up to whole blocks.
        topk: blocks that a query selects; the training's k or another.
        dtype: of the model's activations.
        device: of the model.

    Raises:
        ConfigError: the selector's blocks are not running sums.
    """

    def __init__(
        self,
        model: ModelConfig,
        attention: AttentionConfig,
        table: PunctuationTable,
        *,
        batch: int,
        capacity_tokens: int,
        topk: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        check_selector(attention)
        m = attention.block_tokens
        self.attention, self.table, self.topk = attention, table, topk
        self.capacity_tokens = -(-capacity_tokens // m) * m
        heads, dim = model.num_kv_heads, model.head_dim
        wide = torch.float64 if dtype == torch.float64 else torch.float32

        def cache(rows: int) -> Tensor:
            return torch.empty(batch, heads, rows, dim, dtype=dtype, device=device).transpose(1, 2)

        self._layers = {
            number: _Layer(
                cache(self.capacity_tokens),
                cache(self.capacity_tokens),
                cache(self.capacity_tokens // m),
                torch.empty(batch, heads, 2, dim, dtype=wide, device=device),
                torch.empty(batch, heads, dtype=torch.int32, device=device),
            )
            for number in range(1, model.num_layers + 1)
        }

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        tensors = [tensor for layer in self._layers.values() for tensor in layer.tensors]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def marks(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Return bool [B]: which of the new tokens int64 [B] are in the second branch of their block."""
        if self.attention.selector == Selector.last_token:
            return lengths % self.attention.block_tokens == 0
        return self.table.is_punctuation[tokens]

    def read_prompt(
        self, layer_number: int, row: int, keys: Tensor, values: Tensor, weights: Tensor, marks: Tensor
    ) -> None:
        """Fill one sequence's caches of a layer from its prompt, as tokens appended one by one would.

        Args:
            layer_number: from 1.
            row: of the batch.
            keys: [n, Hkv, D] after RoPE.
            values: [n, Hkv, D].
            weights: fp32 [n], pooling weights.
            marks: bool [n], tokens in the second branch.
        """
        layer, m = self._layers[layer_number], self.attention.block_tokens
        n = len(keys)
        layer.keys[row, :n], layer.values[row, :n] = keys, values
        whole = n // m * m
        if whole:
            bounds = torch.tensor([0, whole], dtype=torch.int32).to(keys.device, non_blocking=True)
            layer.pooled[row, : whole // m] = pool(
                keys[:whole], weights[:whole], bounds, block_tokens=m, impl=self.attention.impl.value
            )[:, :, 0]
        tail, flags = keys[whole:].to(layer.open_sums.dtype), marks[whole:]
        layer.open_sums[row, :, 0] = tail.sum(0)
        layer.open_sums[row, :, 1] = (tail * flags[:, None, None]).sum(0)
        layer.open_marks[row] = flags.sum()

    def attend(
        self,
        layer_number: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        step: DecodeStep,
        *,
        is_dense: bool,
        softmax_scale: float | None,
    ) -> Tensor:
        """Append the new tokens' keys and values [B, Hkv, D]; return their queries' output [B, Hq, D]."""
        layer, settings = self._layers[layer_number], self.attention
        shared: dict[str, Any] = {"block_tokens": settings.block_tokens, "impl": settings.impl.value}
        append_keys(
            key,
            value,
            step.marks,
            step.lengths,
            *layer.tensors,
            mean_weight_frac=settings.mean_weight_frac,
            **shared,
        )
        selects = not is_dense and settings.selector not in WITHOUT_SELECTION
        return decode_attention(
            query,
            layer.keys,
            layer.values,
            layer.pooled,
            step.lengths,
            topk=self.topk if selects else 0,
            init_tokens=settings.init_tokens,
            local_tokens=settings.local_tokens,
            group_score=settings.group_score.value,
            dense_len_tokens=self.capacity_tokens if is_dense else settings.dense_len_tokens,
            softmax_scale=softmax_scale,
            **shared,
        ).out


@dataclass(frozen=True)
class PromptCache:
    """Where the layers' keys of a micro-batch of prompts go: row i of it is row `first_row + i` of the cache.

    lengths: tokens of each prompt; what follows in its row is padding and a document of its own.
    """

    cache: KeyValueCache
    first_row: int
    lengths: Sequence[int]

    def keep(self, layer_number: int, keys: Tensor, values: Tensor, side_info: SideInfo) -> None:
        """Take a layer's keys and values [T, Hkv, D] of the micro-batch, row after row."""
        marks = side_info.once("branch_flags", lambda: _branch_flags(side_info)).flatten()
        weights, row_tokens = side_info.pool_weights.flatten(), len(marks) // len(self.lengths)
        for i, length in enumerate(self.lengths):
            tokens = slice(i * row_tokens, i * row_tokens + length)
            self.cache.read_prompt(
                layer_number,
                self.first_row + i,
                keys[tokens],
                values[tokens],
                weights[tokens],
                marks[tokens],
            )


def _branch_flags(side_info: SideInfo) -> Tensor:
    return branch_flags(
        side_info.is_punctuation, side_info.token_ids, side_info.cu_seqlens, side_info.attention
    )


@dataclass(eq=False, kw_only=True)
class DecodeStep(PackedSeqParams):  # type: ignore[misc]
    """What every layer has to know about one new token of each sequence; stands where a SideInfo stands."""

    qkv_format: str = "sbhd"
    cache: KeyValueCache
    """Of all layers; they append to it."""
    lengths: Tensor
    """int32 [B]: tokens of each sequence with the new one; 0 for a sequence that is finished."""
    marks: Tensor
    """bool [B]: whether the new token is in the second branch of its block."""


def why_not_cached(attention: AttentionConfig) -> str | None:
    """Return why pooled blocks cannot be kept up to date token by token, and whose can; None if they can."""
    if attention.kind == AttentionKind.dense or attention.selector in CACHED_SELECTORS:
        return None
    served = ", ".join(selector.value for selector in CACHED_SELECTORS)
    return (
        f"attention.selector={attention.selector.value}: generation with a cache keeps two running sums of a "
        f"block, enough for {served} and attention.kind=dense"
    )


def check_selector(attention: AttentionConfig) -> None:
    """Refuse a selector whose pooled block cannot be kept up to date token by token.

    Raises:
        ConfigError: it names those that can.
    """
    why = why_not_cached(attention)
    if why is not None:
        raise ConfigError(
            f"{why}; use one of these, or the samples that training writes (run.sample_prompts), which read "
            "the whole text again for every token"
        )
