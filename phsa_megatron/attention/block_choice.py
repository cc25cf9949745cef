"""The blocks that a selector chooses, from queries and all keys of a micro-batch.

The selectors of one pooled key a block go through `pool` and `select`, as PHSA does, with other weights; the
rest through `phsa_kernels.selectors`, which is eager. Letters as in `core_attention.py`.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from phsa_kernels.api import block_boundaries, pool, select, token_positions
from phsa_kernels.selectors import max_norm_flags, select_blocks
from phsa_megatron.attention.controls import weights_of_flags
from phsa_megatron.config.schema import AttentionConfig, Selector
from phsa_megatron.config.selector_kinds import WITH_KERNELS, WITHOUT_SELECTION


class KeyInfo(Protocol):
    """What the choice of blocks has to know about keys: a SideInfo, or `cached_rows.CachedRows`."""

    @property
    def is_punctuation(self) -> Tensor:
        """Return bool [b, T]."""
        ...

    @property
    def pool_weights(self) -> Tensor:
        """Return fp32 [b, T]."""
        ...

    @property
    def cu_seqlens(self) -> Tensor:
        """Return int32 [N + 1]: document boundaries over the b * T flattened keys."""
        ...

    def block_rows(self, block_tokens: int) -> Tensor:
        """Return int32 [N + 1]: the first pooled row of each document."""
        ...


@torch.no_grad()
def choose_blocks(
    query: Tensor,
    keys: Tensor,
    q_pos: Tensor,
    q_doc: Tensor,
    side_info: KeyInfo,
    attention: AttentionConfig,
    topk: int,
    softmax_scale: float | None,
) -> Tensor:
    """Return the chosen blocks, int32 [Tq, Hkv (moba: Hq), k], as `phsa_kernels.api.select` does.

    Args:
        query: [Tq, Hq, D] after RoPE.
        keys: [T, Hkv, D] after RoPE: all tokens of the micro-batch, in natural order.
        q_pos: int32 [Tq], position of each query in its document.
        q_doc: int32 [Tq], its document.
        side_info: of the micro-batch.
        attention: the selector's settings; those of `side_info` made its weights.
        topk: k.
        softmax_scale: None is D ** -0.5.
    """
    return choose_blocks_by_weights(
        query,
        keys,
        q_pos,
        q_doc,
        side_info.cu_seqlens,
        side_info.pool_weights.reshape(-1),
        side_info.is_punctuation.reshape(-1),
        attention,
        topk,
        softmax_scale,
        side_info.block_rows(attention.block_tokens),
    )


@torch.no_grad()
def choose_blocks_by_weights(
    query: Tensor,
    keys: Tensor,
    q_pos: Tensor,
    q_doc: Tensor,
    cu_seqlens: Tensor,
    pool_weights: Tensor,
    is_punctuation: Tensor,
    attention: AttentionConfig,
    topk: int,
    softmax_scale: float | None,
    block_rows: Tensor | None = None,
) -> Tensor:
    """Return the chosen blocks, as `choose_blocks`, from what it reads of the side information.

    Weights and flags may differ by key-value head, so that documents of one length can stand side by side
    as heads of one.

    Args:
        query: as in `choose_blocks`, and so are `keys`, `q_pos`, `q_doc`, `attention`, `topk` and
            `softmax_scale`.
        keys: see there.
        q_pos: see there.
        q_doc: see there.
        cu_seqlens: int32 [N + 1], document boundaries.
        pool_weights: fp32 [T] or [T, Hkv].
        is_punctuation: bool [T] or [T, Hkv].
        attention: see there.
        topk: see there.
        softmax_scale: see there.
        block_rows: int32 [N + 1], first pooled row of each document, where it is known.
    """
    selector = attention.selector
    if selector in WITHOUT_SELECTION:
        return torch.empty(len(query), keys.shape[1], 0, dtype=torch.int32, device=query.device)
    group_score = attention.group_score.value
    if selector in WITH_KERNELS:
        halves = selector == Selector.halves
        pooled = pool(
            keys,
            _weights(keys, pool_weights, cu_seqlens, attention),
            cu_seqlens,
            block_tokens=attention.block_tokens,
            kind="halves" if halves else "mean",
            impl=attention.impl.value,
        )
        return select(
            query,
            pooled,
            q_pos,
            q_doc,
            block_boundaries(cu_seqlens, attention.block_tokens) if block_rows is None else block_rows,
            topk=topk,
            init_tokens=attention.init_tokens,
            local_tokens=attention.local_tokens,
            block_tokens=attention.block_tokens,
            group_score=group_score,
            score="max_of_two" if halves else "dot",
            softmax_scale=softmax_scale,
            impl=attention.impl.value,
        )
    joined = attention.mean_weight_frac < 1  # with the punctuation branch
    return select_blocks(
        query,
        keys,
        q_pos,
        q_doc,
        cu_seqlens,
        kind=selector.value,
        topk=topk,
        init_tokens=attention.init_tokens,
        local_tokens=attention.local_tokens,
        block_tokens=attention.block_tokens,
        group_score=group_score,
        weights=pool_weights if joined else None,
        marks=is_punctuation if joined else None,
        mean_weight_frac=attention.mean_weight_frac,
        coarse_lse=attention.coarse_lse,
        softmax_scale=softmax_scale,
        impl=(attention.select_impl or attention.impl).value,
    )


def _weights(keys: Tensor, pool_weights: Tensor, cu_seqlens: Tensor, attention: AttentionConfig) -> Tensor:
    """Return fp32 [T], or [T, Hkv] where the second branch depends on keys."""
    if attention.selector != Selector.max_norm:
        return pool_weights
    position, _ = token_positions(cu_seqlens, len(keys))
    flags = max_norm_flags(keys, position, cu_seqlens, attention.block_tokens)
    return weights_of_flags(flags, attention.block_tokens, attention.mean_weight_frac)
