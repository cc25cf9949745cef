"""The attention of the last tokens of several rows over all keys of their rows: what a key cache holds.

For models outside of megatron, whose caches are padded rows. Rows may be padded on both sides; a row's text
is one document, and its padding belongs to documents that nobody in the text sees. Blocks begin where the
text begins, as in training. Needs no megatron. Letters: b rows, T keys of a row, Q queries of a row (its last
tokens), Hq/Hkv heads, D head dim, m block_tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from phsa_kernels.api import attend, block_boundaries, token_positions
from phsa_megatron.attention.block_choice import choose_blocks
from phsa_megatron.attention.controls import branch_flags
from phsa_megatron.attention.pool_weights import pool_weights
from phsa_megatron.attention.punctuation import PunctuationTable
from phsa_megatron.config.errors import ConfigError
from phsa_megatron.config.schema import AttentionConfig, Selector
from phsa_megatron.config.selector_kinds import inference_topk


@dataclass(frozen=True, eq=False)
class CachedRows:
    """What all layers have to know about the keys and queries of one forward pass."""

    is_punctuation: Tensor
    """bool [b, T]."""
    pool_weights: Tensor
    """fp32 [b, T]: weight of each key in its block's pooled key."""
    cu_seqlens: Tensor
    """int32 [3 b + 1]: three documents a row over the b * T flattened keys: padding, text, padding."""
    key_pos: Tensor
    """int32 [b * T]: position of each key in its document."""
    key_doc: Tensor
    """int32 [b * T]: its document."""
    num_queries: int
    """Q."""
    attention: AttentionConfig
    """The settings; `infer_topk` is k."""

    @classmethod
    def build(
        cls,
        token_ids: Tensor,
        text_start: Tensor,
        text_end: Tensor,
        num_queries: int,
        table: PunctuationTable,
        attention: AttentionConfig,
    ) -> CachedRows:
        """Return what follows from token ids.

        Args:
            token_ids: int64 [b, T], those of cached tokens first.
            text_start: int64 [b], first token of each row that is no padding.
            text_end: int64 [b], past the last one.
            num_queries: Q, tokens of each row that are new in this pass.
            table: punctuation flags on the device of `token_ids`.
            attention: the settings.

        Raises:
            ConfigError: the selector keeps a window by tokens, which only megatron's layers have.
        """
        if attention.selector == Selector.dense_window:
            raise ConfigError(
                "attention.selector=dense_window is not served outside of megatron; use window, the same "
                "windows in whole blocks"
            )
        num_rows, length = token_ids.shape
        first = torch.arange(num_rows, device=token_ids.device) * length
        starts = torch.stack((first, first + text_start, first + text_end), dim=1).flatten()
        boundaries = torch.nn.functional.pad(starts, (0, 1), value=num_rows * length).to(torch.int32)
        flags = table.is_punctuation[token_ids]
        weights = pool_weights(
            branch_flags(flags, token_ids, boundaries, attention),
            boundaries,
            block_tokens=attention.block_tokens,
            mean_weight_frac=attention.mean_weight_frac,
        )
        key_pos, key_doc = token_positions(boundaries, token_ids.numel())
        return cls(flags, weights, boundaries, key_pos, key_doc, num_queries, attention)

    def positions(self) -> tuple[Tensor, Tensor]:
        """Return (position in its document, document index) of each key, both int32 [b * T]."""
        return self.key_pos, self.key_doc

    def block_rows(self, block_tokens: int) -> Tensor:
        """Return int32 [3 b + 1]: the first pooled row of each document."""
        return block_boundaries(self.cu_seqlens, block_tokens)

    def of_queries(self) -> tuple[Tensor, Tensor]:
        """Return the same of each query, both int32 [b * Q]."""
        rows = len(self.is_punctuation)
        pos, doc = (x.view(rows, -1)[:, -self.num_queries :].reshape(-1) for x in self.positions())
        return pos, doc


def attend_rows(
    query: Tensor, keys: Tensor, values: Tensor, rows: CachedRows, layer_number: int, scale: float | None
) -> Tensor:
    """Return the attention output [b, Q, Hq, D], in the dtype of the queries.

    Args:
        query: [b, Q, Hq, D] after RoPE.
        keys: [b, T, Hkv, D] after RoPE.
        values: [b, T, Hkv, D].
        rows: of this pass.
        layer_number: from 1; layers in `attention.dense_layers` see all keys of the text.
        scale: of the dot products; None is D ** -0.5.

    Raises:
        ValueError: shapes are not those of `rows`.
        NotImplementedError: `attention.impl` does not serve the device, the dtype or the shape.

    Source: method page, section 3; a query sees exactly what it sees when the whole text is computed at once.
    """
    expected = (len(rows.is_punctuation), rows.is_punctuation.shape[1])
    if tuple(keys.shape[:2]) != expected or tuple(query.shape[:2]) != (expected[0], rows.num_queries):
        raise ValueError(
            f"keys are {tuple(keys.shape)} and queries {tuple(query.shape)}, but this pass has [b, T] = "
            f"{expected} token ids and Q = {rows.num_queries}: the cache holds other tokens"
        )
    settings = rows.attention
    q, k, v = query.flatten(0, 1), keys.flatten(0, 1), values.flatten(0, 1)
    q_pos, q_doc = rows.of_queries()
    if layer_number in settings.dense_layers:
        ids = torch.empty(len(q), k.shape[1], 0, dtype=torch.int32, device=q.device)
        dense_len_tokens = expected[1]
    else:
        topk = inference_topk(settings)
        ids = choose_blocks(q.detach(), k.detach(), q_pos, q_doc, rows, settings, topk, scale)
        dense_len_tokens = settings.dense_len_tokens
    out, _ = attend(
        q,
        k,
        v,
        ids,
        q_pos,
        q_doc,
        rows.cu_seqlens,
        init_tokens=settings.init_tokens,
        local_tokens=settings.local_tokens,
        block_tokens=settings.block_tokens,
        dense_len_tokens=dense_len_tokens,
        softmax_scale=scale,
        impl=settings.impl.value,
    )
    return out.view(query.shape)
