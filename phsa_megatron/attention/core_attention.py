"""The core attentions that a megatron layer is built with: PHSA, and dense attention as its baseline.

Both stand where megatron's DotProductAttention stands: they receive queries and keys after RoPE, and read
document boundaries from the SideInfo on `packed_seq_params`. Neither has parameters, so that a checkpoint
is the same for both. Letters: S tokens of a row, b rows, T = b * S, Hq/Hkv heads of this tensor-parallel
process, D head dim.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from phsa_kernels.api import phsa_attention
from phsa_megatron.attention.side_info import SideInfo
from phsa_megatron.config.errors import ConfigError, DeviceError
from phsa_megatron.config.schema import AttentionConfig
from phsa_megatron.parallel.mcore import HARMLESS_ATTENTION_ARGUMENTS


class _DocumentAttention(MegatronModule):  # type: ignore[misc]
    """What both core attentions share: what they refuse, and the way from [S, b, H, D] to tokens and back."""

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
        *,
        attention: AttentionConfig,
        mtp_depth: int = 0,
        **newer: Any,
    ) -> None:
        """Take what megatron passes to a core attention, and from the layer spec `attention` and `mtp_depth`.

        Raises:
            ConfigError: dropout, context parallelism, or attention other than causal self-attention is
                asked for.
            DeviceError: this megatron-core passes an argument whose meaning is unknown here.
        """
        super().__init__(config=config)
        unknown = {k: v for k, v in newer.items() if v is not None and k not in HARMLESS_ATTENTION_ARGUMENTS}
        if unknown:
            raise DeviceError(
                f"this megatron-core passes {unknown} to its core attention, which {type(self).__name__} "
                "does not know: use a supported version (phsa-train doctor)"
            )
        if attn_mask_type != AttnMaskType.causal or attention_type != "self":
            raise ConfigError(
                f"{type(self).__name__} computes causal self-attention, not {attention_type!r} with "
                f"{attn_mask_type}"
            )
        dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        if dropout:
            raise ConfigError(f"attention dropout is {dropout}; {type(self).__name__} has none: set it to 0")
        if config.context_parallel_size > 1:
            raise ConfigError(
                f"parallel.context_size={config.context_parallel_size}: {type(self).__name__} sees whole "
                "sequences only; use context_size=1"
            )
        self.layer_number = layer_number
        self.attention = attention
        self.mtp_depth = mtp_depth
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: SideInfo | None = None,
    ) -> Tensor:
        """Return the attention output [S, b, Hq * D].

        Args:
            query: [S, b, Hq, D] after RoPE.
            key: [S, b, Hkv, D] after RoPE.
            value: [S, b, Hkv, D].
            attention_mask: must be None: documents and causality come from the side information.
            attn_mask_type: None or causal.
            attention_bias: must be None.
            packed_seq_params: the SideInfo of this micro-batch.

        Raises:
            TypeError: there is no SideInfo.
            ValueError: its shape is not that of the queries, or a mask or bias is given.
        """
        side_info = self._checked(query, attention_mask, attn_mask_type, attention_bias, packed_seq_params)
        side_info = side_info.at_mtp_depth(self.mtp_depth)
        out = self._attend(_flat(query), _flat(key), _flat(value), side_info)
        seq_len_tokens, num_rows = query.shape[:2]
        return out.reshape(num_rows, seq_len_tokens, -1).transpose(0, 1).contiguous()

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, side_info: SideInfo) -> Tensor:
        """Return [T, Hq, D] for query [T, Hq, D], key and value [T, Hkv, D], row after row."""
        raise NotImplementedError

    def _checked(
        self,
        query: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None,
        attention_bias: Tensor | None,
        side_info: SideInfo | None,
    ) -> SideInfo:
        if not isinstance(side_info, SideInfo):
            raise TypeError(
                f"layer {self.layer_number} got {type(side_info).__name__} instead of a SideInfo: pass "
                "packed_seq_params=SideInfo.build(...) to the model's forward"
            )
        if query.dim() != 4 or tuple(side_info.token_ids.shape) != (query.shape[1], query.shape[0]):
            raise ValueError(
                f"layer {self.layer_number}: queries are {tuple(query.shape)}, expected [S, b, heads, D] "
                f"with the side information's [b, S] = {tuple(side_info.token_ids.shape)}"
            )
        if attention_mask is not None or attention_bias is not None:
            raise ValueError(
                f"layer {self.layer_number}: attention_mask and attention_bias must be None, "
                f"{type(self).__name__} takes documents and causality from the side information"
            )
        if attn_mask_type not in (None, AttnMaskType.causal):
            raise ValueError(
                f"layer {self.layer_number}: attn_mask_type must be causal, got {attn_mask_type}"
            )
        return side_info


class PHSACoreAttention(_DocumentAttention):
    """Punctuation-aware hybrid sparse attention (method, sections 2 and 3)."""

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, side_info: SideInfo) -> Tensor:
        settings = self.attention
        q_pos, q_doc = side_info.positions()
        out, lse, ids = phsa_attention(
            query,
            key,
            value,
            side_info.pool_weights.reshape(-1),
            side_info.cu_seqlens,
            topk=side_info.topk,
            init_tokens=settings.init_tokens,
            local_tokens=settings.local_tokens,
            block_tokens=settings.block_tokens,
            group_score=settings.group_score.value,
            dense_len_tokens=settings.dense_len_tokens,
            softmax_scale=self.softmax_scale,
            q_pos=q_pos,
            q_doc=q_doc,
            impl=settings.impl.value,
        )
        if side_info.recorder is not None:
            side_info.recorder.record(self.layer_number, query, key, value, ids, lse, side_info)
        return out


class DenseCoreAttention(_DocumentAttention):
    """Full causal attention inside every document, by torch's scaled_dot_product_attention.

    Documents are attended one by one, so that work is the sum of their squared lengths and no mask of S x S
    exists. megatron's own local attention builds that mask and knows no documents.
    """

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, side_info: SideInfo) -> Tensor:
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (query, key, value))  # [1, H, T, D]
        documents = [
            scaled_dot_product_attention(
                q[:, :, start:end],
                k[:, :, start:end],
                v[:, :, start:end],
                is_causal=True,
                scale=self.softmax_scale,
                enable_gqa=query.shape[1] > key.shape[1],
            )
            for start, end in side_info.document_bounds()
        ]
        return torch.cat(documents, dim=2).squeeze(0).transpose(0, 1).reshape(query.shape)


def _flat(x: Tensor) -> Tensor:
    """Return [S, b, H, D] as [T, H, D], row after row."""
    return x.transpose(0, 1).reshape(-1, *x.shape[2:])
