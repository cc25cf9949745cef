"""Selectors as the attention of a probe model: blocks chosen as in training, attended to through a mask.

Many queries on a GPU go to the kernels' `attend`, which is slower for a few; a test holds both to each other.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from phsa_kernels.api import attend
from phsa_megatron.attention.block_choice import choose_blocks_by_weights
from phsa_megatron.attention.information_loss import block_flags
from phsa_megatron.attention.punctuation import PunctuationTable
from phsa_megatron.attention.side_info import SideInfo
from phsa_megatron.config.compose import compose
from phsa_megatron.config.schema import AttentionConfig
from phsa_megatron.config.selector_kinds import WITHOUT_SELECTION
from phsa_megatron.evaluation.probe_model import attend_masked

SELECTORS = (
    "phsa",
    "mean_pool",
    "random_tokens",
    "last_token",
    "max_norm",
    "shuffled",
    "separators",
    "infllm_v2",
    "moba",
    "halves",
    "halves_phsa",
    "cumulant",
    "cumulant_phsa",
    "minmax",
    "minmax_phsa",
    "window",
)
"""Recipes of the group `attention` that the study compares; `window` selects nothing."""
OTHER_LAMBDAS = tuple(f"{name}@{lam}" for name in ("phsa", "random_tokens") for lam in ("0", "0.25", "0.75"))
"""The same with another weight of the plain mean, NAME@LAMBDA: measured when they are asked for."""

_MASK_ENTRIES = 1 << 28
"""Of a mask that is made at once."""
_KERNEL_QUERIES = 256
"""From this many queries of a document on, a GPU attends by the kernels."""


@cache
def settings_of(
    name: str, init_tokens: int, local_tokens: int, language: str = "en", match: str = "exact"
) -> AttentionConfig:
    """Return a recipe's attention with these windows and this punctuation, equal for all selectors.

    `name` is a recipe, or NAME@LAMBDA: the recipe with another `mean_weight_frac`.
    """
    recipe, _, mean_weight_frac = name.partition("@")
    overrides = [f"attention={recipe}", f"attention.init_tokens={init_tokens}"]
    if mean_weight_frac:
        overrides.append(f"attention.mean_weight_frac={mean_weight_frac}")
    overrides += [f"attention.local_tokens={local_tokens}"]
    if name != "separators":  # a set of its own
        overrides += [f"attention.punctuation_language={language}", f"attention.punctuation_match={match}"]
    return compose(["recipe=phsa_demo_cpu", *overrides]).config.attention


@dataclass(frozen=True)
class Probe:
    """Side information under one selector of b documents of one length.

    Attributes:
        attention: the selector.
        pool_weights: fp32 [b, T].
        is_punctuation: bool [b, T].
    """

    attention: AttentionConfig
    pool_weights: Tensor
    is_punctuation: Tensor

    @classmethod
    def of(cls, tokens: Tensor, attention: AttentionConfig, table: PunctuationTable) -> Probe:
        """Return the probe of documents int64 [b, T]; `table` is `table_of` the settings, on their device."""
        bounds = torch.arange(len(tokens) + 1, dtype=torch.int32) * tokens.shape[1]
        side_info = SideInfo.build(tokens, bounds.to(tokens.device), table, attention, 1)
        return cls(attention, side_info.pool_weights, side_info.is_punctuation)

    def choose(self, query: Tensor, keys: Tensor, rows: Tensor, topk: int) -> Tensor:
        """Return the blocks int32 [b, n, Hkv or Hq, k] of queries [b, n, Hq, D] at `rows` int64 [n].

        Heads are chosen for by themselves, so the documents stand side by side as the heads of one: one
        product for all, and the same result as document by document.
        """
        b, total, num_kv_heads, _ = keys.shape
        ids = choose_blocks_by_weights(
            query.transpose(0, 1).flatten(1, 2),
            keys.transpose(0, 1).flatten(1, 2),
            rows.to(torch.int32),
            torch.zeros(len(rows), dtype=torch.int32, device=rows.device),
            torch.tensor([0, total], dtype=torch.int32, device=rows.device),
            self.pool_weights.T.repeat_interleave(num_kv_heads, 1),
            self.is_punctuation.T.repeat_interleave(num_kv_heads, 1),
            self.attention,
            topk,
            None,
        )
        return ids.view(len(rows), b, ids.shape[1] // b, ids.shape[2]).transpose(0, 1)

    def attend(self, topk: int, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Return the sparse attention [b, n, Hq, D] of the documents' last n queries.

        The documents may have been read up to here only: what follows has no keys yet. `choose` then sees
        shorter documents, as at inference.
        """
        (b, total, num_kv_heads, _), n = keys.shape, query.shape[1]
        if total != self.pool_weights.shape[1]:
            raise ValueError(f"{total} keys for documents of {self.pool_weights.shape[1]} tokens")
        rows = torch.arange(total - n, total, device=query.device)
        ids = self.choose(query, keys, rows, topk)
        if query.is_cuda and n >= _KERNEL_QUERIES:
            return self.attend_chosen(ids, query, keys, values, "triton")
        size = max(1, _MASK_ENTRIES // (b * ids.shape[2] * total))
        outs = []
        for part in range(0, n, size):
            some = slice(part, part + size)
            end = int(total - n + min(part + size, n))  # later keys are not seen
            seen = self._seen(ids[:, some], rows[some], end, num_kv_heads)
            outs.append(attend_masked(query[:, some], keys[:, :end], values[:, :end], seen))
        return torch.cat(outs, dim=1)

    def attend_chosen(self, ids: Tensor, query: Tensor, keys: Tensor, values: Tensor, impl: str) -> Tensor:
        """Return what `attend` does for chosen blocks, by an implementation of the kernels' `attend`."""
        (b, total, *_), n, device = keys.shape, query.shape[1], query.device
        document = torch.arange(b, dtype=torch.int32, device=device).repeat_interleave(n)
        position = torch.arange(total - n, total, dtype=torch.int32, device=device).repeat(b)
        out, _ = attend(
            query.flatten(0, 1),
            keys.flatten(0, 1),
            values.flatten(0, 1),
            ids.flatten(0, 1).contiguous(),
            position,
            document,
            torch.arange(b + 1, dtype=torch.int32, device=device) * total,
            init_tokens=self.attention.init_tokens,
            local_tokens=self.attention.local_tokens,
            block_tokens=self.attention.block_tokens,
            impl=impl,
        )
        return out.view(query.shape)

    def _seen(self, ids: Tensor, rows: Tensor, num_keys: int, num_kv_heads: int) -> Tensor:
        """Return bool [b * Hkv, 1 or Hq / Hkv, n, keys] of chosen blocks [b, n, Hsel, k]."""
        m, (b, n, num_selections, _) = self.attention.block_tokens, ids.shape
        block = torch.arange(-(-num_keys // m), device=ids.device)
        current = (rows // m)[:, None]
        in_window = (block < self.attention.init_tokens // m) | (
            block > current - self.attention.local_tokens // m
        )
        chosen = block_flags(ids.transpose(1, 2).flatten(0, 1), len(block))  # [b * Hsel, n, blocks]
        seen = (chosen | in_window).repeat_interleave(m, -1)[..., :num_keys]
        seen &= torch.arange(num_keys, device=ids.device) <= rows[:, None]
        return seen.view(b * num_kv_heads, num_selections // num_kv_heads, n, num_keys)


def selects(name: str, attention: AttentionConfig) -> bool:
    """Return whether k means anything to a selector of the study."""
    return attention.selector not in WITHOUT_SELECTION
