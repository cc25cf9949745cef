"""Selectors as the attention of a probe model: blocks chosen as in training, attended to through a mask.

A test holds the output to the kernels' `attend`, which is slower for a few queries.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from phsa_megatron.attention.block_choice import choose_blocks
from phsa_megatron.attention.information_loss import block_flags
from phsa_megatron.attention.punctuation import PunctuationTable
from phsa_megatron.attention.side_info import SideInfo
from phsa_megatron.config.compose import compose
from phsa_megatron.config.schema import AttentionConfig
from phsa_megatron.config.selector_kinds import WITHOUT_SELECTION

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


@cache
def settings_of(
    name: str, init_tokens: int, local_tokens: int, language: str = "en", match: str = "exact"
) -> AttentionConfig:
    """Return a recipe's attention with these windows and this punctuation, equal for all selectors."""
    overrides = [f"attention={name}", f"attention.init_tokens={init_tokens}"]
    overrides += [f"attention.local_tokens={local_tokens}"]
    if name != "separators":  # a set of its own
        overrides += [f"attention.punctuation_language={language}", f"attention.punctuation_match={match}"]
    return compose(["recipe=phsa_demo_cpu", *overrides]).config.attention


@dataclass(frozen=True)
class Probe:
    """One document's side information under one selector.

    Attributes:
        attention: the selector.
        side_info: of the whole document, one row.
    """

    attention: AttentionConfig
    side_info: SideInfo

    @classmethod
    def of(cls, tokens: Tensor, attention: AttentionConfig, table: PunctuationTable) -> Probe:
        """Return the probe of a document int64 [T]; `table` is `table_of` the settings."""
        cu_seqlens = torch.tensor([0, len(tokens)], dtype=torch.int32)
        return cls(attention, SideInfo.build(tokens[None], cu_seqlens, table, attention, 1))

    def choose(self, query: Tensor, keys: Tensor, rows: Tensor, topk: int) -> Tensor:
        """Return the blocks int32 [n, Hkv or Hq, k] of queries [n, Hq, D] at positions `rows` int64 [n]."""
        q_pos, q_doc = rows.to(torch.int32), torch.zeros(len(rows), dtype=torch.int32)
        return choose_blocks(query, keys, q_pos, q_doc, self.side_info, self.attention, topk, None)

    def attend(self, topk: int, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Return the sparse attention [n, Hq, D] of the document's last n queries.

        The document may have been read up to here only: what follows has no keys yet. `choose` then sees a
        shorter document, as at inference.
        """
        if len(keys) != self.side_info.token_ids.numel():
            raise ValueError(f"{len(keys)} keys for a document of {self.side_info.token_ids.numel()} tokens")
        n, total, m = len(query), len(keys), self.attention.block_tokens
        rows = torch.arange(total - n, total)
        ids = self.choose(query, keys, rows, topk)
        block, current = torch.arange(-(-total // m)), (rows // m)[:, None]
        in_window = (block < self.attention.init_tokens // m) | (
            block > current - self.attention.local_tokens // m
        )
        blocks = in_window[:, None] | block_flags(ids, len(block))  # [n, Hsel, blocks]
        seen = blocks.repeat_interleave(m, -1)[..., :total] & (torch.arange(total) <= rows[:, None])[:, None]
        seen = seen.repeat_interleave(query.shape[1] // ids.shape[1], 1).transpose(0, 1)  # [Hq, n, total]
        q, k, v = (x.transpose(0, 1)[None] for x in (query, keys, values))
        grouped = query.shape[1] > keys.shape[1]
        out = scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=grouped)
        return out[0].transpose(0, 1)


def selects(name: str, attention: AttentionConfig) -> bool:
    """Return whether k means anything to a selector of the study."""
    return attention.selector not in WITHOUT_SELECTION
