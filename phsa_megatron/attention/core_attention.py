"""The core attentions of a megatron layer: over selected blocks, and dense attention as its baseline.

Both stand where megatron's DotProductAttention stands: they receive queries and keys after RoPE, and read
document boundaries from the SideInfo on `packed_seq_params`. Neither has parameters, so that a checkpoint
is the same for both; selectors that have some are classes of their own (`nsa.py`, `indexer.py`). With context
parallelism they receive this process's part of each row and fetch the other processes' keys and values
(`context_parallel.py`). Letters: S tokens of a row, CP context-parallel processes, b rows, T = b * S,
Tq = T / CP own queries, Hq/Hkv heads of this tensor-parallel process, D head dim.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from torch import Tensor
from torch.nn.functional import smooth_l1_loss

from phsa_kernels.api import attend, select
from phsa_megatron.attention.added_losses import ALIGN
from phsa_megatron.attention.block_choice import choose_blocks
from phsa_megatron.attention.context_parallel import ContextShard
from phsa_megatron.attention.dense_attention import Window, dense, dense_sharded
from phsa_megatron.attention.kv_cache import DecodeStep
from phsa_megatron.attention.side_info import SideInfo
from phsa_megatron.config.errors import ConfigError, DeviceError
from phsa_megatron.config.schema import AttentionConfig, ParallelConfig, Selector
from phsa_megatron.config.selector_kinds import pools_where_keys_are
from phsa_megatron.parallel.exchange import ContextGroups
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
        parallel: ParallelConfig | None = None,
        mtp_depth: int = 0,
        **newer: Any,
    ) -> None:
        """Take what megatron passes to a core attention, and from the layer spec settings and `mtp_depth`.

        `parallel` says how keys are exchanged with other context-parallel processes; None takes its defaults.

        Raises:
            ConfigError: dropout, hybrid context parallelism, or attention other than causal self-attention is
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
        if getattr(config, "hybrid_context_parallel", False):
            raise ConfigError(
                f"hybrid_context_parallel is on: {type(self).__name__} shards every sequence over one group "
                "of parallel.context_size processes; turn it off"
            )
        self.context_groups = None if config.context_parallel_size == 1 else ContextGroups.of(pg_collection)
        self.layer_number = layer_number
        self.attention = attention
        self.parallel = parallel or ParallelConfig()
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
        packed_seq_params: SideInfo | DecodeStep | None = None,
    ) -> Tensor:
        """Return the attention output [S / CP, b, Hq * D].

        Args:
            query: [S / CP, b, Hq, D] after RoPE.
            key: [S / CP, b, Hkv, D] after RoPE.
            value: [S / CP, b, Hkv, D].
            attention_mask: must be None: documents and causality come from the side information.
            attn_mask_type: None or causal.
            attention_bias: must be None.
            packed_seq_params: the SideInfo of this micro-batch, or the DecodeStep of one new token a row.

        Raises:
            TypeError: there is no SideInfo.
            ValueError: its shape is not that of the queries, or a mask or bias is given.
        """
        if isinstance(packed_seq_params, DecodeStep):
            out = packed_seq_params.cache.attend(
                self.layer_number,
                query[0],
                key[0],
                value[0],
                packed_seq_params,
                is_dense=self._is_dense_layer(),
                softmax_scale=self.softmax_scale,
            )
            return out.flatten(1).unsqueeze(0)
        side_info = self._checked(query, attention_mask, attn_mask_type, attention_bias, packed_seq_params)
        side_info = side_info.at_mtp_depth(self.mtp_depth)
        flat = _flat(query), _flat(key), _flat(value)
        own_tokens, num_rows = query.shape[:2]
        if side_info.prompt_cache is not None:
            side_info.prompt_cache.keep(self.layer_number, flat[1], flat[2], side_info)
        shard = self._shard(num_rows, side_info)
        if side_info.logits is not None:
            side_info.logits.see(self.layer_number, flat[0], flat[1], side_info, self.softmax_scale, shard)
        if shard is None:
            out = self._attend(*flat, side_info)
        else:
            out = self._attend_sharded(*flat, side_info, shard)
        return out.reshape(num_rows, own_tokens, -1).transpose(0, 1).contiguous()

    def _shard(self, num_rows: int, side_info: SideInfo) -> ContextShard | None:
        """Return which part of the rows this process holds, None if it holds all."""
        if self.context_groups is None:
            return None
        return ContextShard(
            self.context_groups,
            num_rows,
            side_info.token_ids.shape[1],
            self.parallel.context_sharding,
            self.parallel.context_exchange,
        )

    def _is_dense_layer(self) -> bool:
        """Return whether this layer attends to everything, whatever the pass."""
        raise NotImplementedError

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, side_info: SideInfo) -> Tensor:
        """Return [T, Hq, D] for query [T, Hq, D], key and value [T, Hkv, D], row after row."""
        raise NotImplementedError

    def _attend_sharded(
        self, query: Tensor, key: Tensor, value: Tensor, side_info: SideInfo, shard: ContextShard
    ) -> Tensor:
        """Return [Tq, Hq, D] for query [Tq, Hq, D], key and value [Tq, Hkv, D]: this process's tokens."""
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
        size = 1 if self.context_groups is None else self.context_groups.size()
        if query.dim() != 4 or tuple(side_info.token_ids.shape) != (query.shape[1], query.shape[0] * size):
            raise ValueError(
                f"layer {self.layer_number}: queries are {tuple(query.shape)}, expected [S / {size}, b, "
                f"heads, D] with the side information's [b, S] = {tuple(side_info.token_ids.shape)}"
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
    """Attention over init, local and selected blocks (method, sections 2 and 3), whatever selects them.

    A layer of `attention.dense_layers`, and every layer in a pass whose side information says so, computes
    full causal attention instead.
    """

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, side_info: SideInfo) -> Tensor:
        in_list = self._is_dense_layer()
        losses = side_info.losses
        aligns = losses is not None and losses.wants(ALIGN) and not in_list
        if in_list or side_info.is_dense:
            out = dense(query, key, value, side_info, self.softmax_scale)
            # A recorder is shown what would be chosen.
            if side_info.is_dense and (aligns or side_info.recorder is not None):
                sparse = self._selected(query, key, value, side_info)
                if aligns:
                    out = self._aligned(out, out, sparse, side_info)
            return out
        if self.attention.selector == Selector.dense_window:
            return dense(query, key, value, side_info, self.softmax_scale, *self._sliding())
        out = self._selected(query, key, value, side_info)
        if aligns:
            full = dense(query, key, value, side_info, self.softmax_scale)
            out = self._aligned(out, full, out, side_info)
        return out

    @staticmethod
    def _aligned(out: Tensor, full: Tensor, sparse: Tensor, side_info: SideInfo) -> Tensor:
        """Return `out` with SSA's alignment of both outputs [T, Hq, D] (arXiv 2511.20102): each to the other.

        Smooth L1 of their difference, once with the gradient to either side alone.
        """
        losses = side_info.losses
        assert losses is not None
        f, s = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (full, sparse))
        to_sparse = smooth_l1_loss(f, s.detach(), reduction="sum")
        to_full = smooth_l1_loss(s, f.detach(), reduction="sum")
        return losses.add(out, ALIGN, to_sparse + to_full)

    def _selected(self, query: Tensor, key: Tensor, value: Tensor, side_info: SideInfo) -> Tensor:
        q_pos, q_doc = side_info.positions()
        ids = self._choose(query.detach(), key.detach(), q_pos, q_doc, side_info)
        return self._over(query, key, value, ids, q_pos, q_doc, side_info, None)

    def _choose(
        self, query: Tensor, keys: Tensor, q_pos: Tensor, q_doc: Tensor, side_info: SideInfo
    ) -> Tensor:
        """Return the chosen blocks of queries [Tq, Hq, D] among those of all keys [T, Hkv, D]."""
        topk = side_info.topk_of(self.layer_number)
        return choose_blocks(query, keys, q_pos, q_doc, side_info, self.attention, topk, self.softmax_scale)

    def _attend_sharded(
        self, query: Tensor, key: Tensor, value: Tensor, side_info: SideInfo, shard: ContextShard
    ) -> Tensor:
        settings = self.attention
        if self._is_dense_layer() or side_info.is_dense:
            return dense_sharded(query, key, value, side_info, shard, self.softmax_scale)
        if settings.selector == Selector.dense_window:
            return dense_sharded(query, key, value, side_info, shard, self.softmax_scale, *self._sliding())
        tokens = shard.tokens(side_info)
        q_pos, q_doc = side_info.once("context_q", lambda: tuple(x[tokens] for x in side_info.positions()))
        if not pools_where_keys_are(settings.selector):  # this selector reads all keys: it waits for them
            gathering = shard.start_keys_and_values(key, value)
            keys, values, _ = shard.keys_and_values(key, value, gathering, None, side_info)
            ids = self._choose(query.detach(), keys.detach(), q_pos, q_doc, side_info)
            return self._over(query, keys, values, ids, q_pos, q_doc, side_info, tokens)
        pooled = shard.gather_pooled(key.detach(), side_info, settings)
        # Only after the small gather: collectives of one group run one after the other.
        gathering = shard.start_keys_and_values(key, value)
        ids = select(
            query.detach(),
            pooled,
            q_pos,
            q_doc,
            side_info.block_rows(settings.block_tokens),
            topk=side_info.topk_of(self.layer_number),
            group_score=settings.group_score.value,
            **self._windows(),
        )
        keys, values, block_slot = shard.keys_and_values(key, value, gathering, ids, side_info)
        return self._over(query, keys, values, ids, q_pos, q_doc, side_info, tokens, block_slot)

    def _over(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        ids: Tensor,
        q_pos: Tensor,
        q_doc: Tensor,
        side_info: SideInfo,
        tokens: Tensor | None,
        block_slot: Tensor | None = None,
    ) -> Tensor:
        """Return the output over windows and the blocks `ids`, and show them to the recorder."""
        out, lse = attend(
            query,
            keys,
            values,
            ids,
            q_pos,
            q_doc,
            side_info.cu_seqlens,
            block_slot,
            dense_len_tokens=self.attention.dense_len_tokens,
            **self._windows(),
        )
        if side_info.recorder is not None:
            side_info.recorder.record(
                self.layer_number, query, keys, values, ids, lse, side_info, tokens, block_slot
            )
        return out

    def _windows(self) -> dict[str, Any]:
        settings = self.attention
        return {
            "init_tokens": settings.init_tokens,
            "local_tokens": settings.local_tokens,
            "block_tokens": settings.block_tokens,
            "softmax_scale": self.softmax_scale,
            "impl": settings.impl.value,
        }

    def _sliding(self) -> tuple[Window, int]:
        settings = self.attention
        return Window(settings.init_tokens, settings.local_tokens), settings.dense_len_tokens

    def _is_dense_layer(self) -> bool:
        return self.mtp_depth == 0 and self.layer_number in self.attention.dense_layers


class DenseCoreAttention(_DocumentAttention):
    """Full causal attention inside every document (`dense_attention.py`)."""

    def _is_dense_layer(self) -> bool:
        return True

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, side_info: SideInfo) -> Tensor:
        return dense(query, key, value, side_info, self.softmax_scale)

    def _attend_sharded(
        self, query: Tensor, key: Tensor, value: Tensor, side_info: SideInfo, shard: ContextShard
    ) -> Tensor:
        return dense_sharded(query, key, value, side_info, shard, self.softmax_scale)


def _flat(x: Tensor) -> Tensor:
    """Return [S, b, H, D] as [T, H, D], row after row."""
    return x.transpose(0, 1).reshape(-1, *x.shape[2:])
