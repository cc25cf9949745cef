"""What every layer has to know about the tokens of one micro-batch, besides hidden states.

It rides on `packed_seq_params`, because that is the only argument of megatron's forward passes that reaches
every layer of the main stack and of multi-token prediction unchanged, and that activation recomputation
captures by closure. State kept on modules or in globals would be stale by the time a layer is recomputed:
the loss stays right and the gradients go wrong in silence.

Format: `sbhd`, not `thd`. Batch rows keep their own dimension and megatron treats a row as one sequence;
    the boundaries of the documents inside rows are ours alone (`cu_seqlens`, over the b * S flattened
    tokens). Nobody restarts RoPE positions at a document: rotary scores depend on the distance of two
    tokens only, and attention never leaves a document, so that packed documents equal separate ones up to
    rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from phsa_kernels.api import block_boundaries, token_positions
from phsa_megatron.attention.controls import branch_flags
from phsa_megatron.attention.kv_cache import PromptCache
from phsa_megatron.attention.pool_weights import pool_weights
from phsa_megatron.attention.punctuation import PunctuationTable
from phsa_megatron.config.schema import AttentionConfig

if TYPE_CHECKING:
    from phsa_megatron.attention.added_losses import AddedLosses
    from phsa_megatron.attention.max_logit import MaxLogitRecorder

_T = TypeVar("_T")


class SelectionListener(Protocol):
    """Receives what a layer selected; see `selection_stats.SelectionRecorder`."""

    def record(
        self,
        layer_number: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        ids: Tensor,
        lse: Tensor,
        side_info: SideInfo,
        tokens: Tensor | None = None,
        block_slot: Tensor | None = None,
    ) -> None:
        """Take one layer's selection of one micro-batch, for all its tokens or for the queries `tokens`.

        With `block_slot` keys and values are those of the blocks that the queries attend to, in slots.
        """
        ...


@dataclass(eq=False, kw_only=True)
class SideInfo(PackedSeqParams):  # type: ignore[misc]
    """Token side information of one micro-batch. Layers read it; none of them changes it.

    It is always that of whole sequences in natural order, on every context-parallel process: it costs a few
    bytes a token, and a process selects among the blocks of all.

    b rows of S tokens; N documents at most. The fields inherited from megatron describe a row as one
    sequence: RotaryEmbedding takes its length from `max_seqlen_*`, and multi-token prediction rolls by
    `cu_seqlens_q`.
    """

    token_ids: Tensor
    """int64 [b, S], natural order."""
    is_punctuation: Tensor
    """bool [b, S]: whether the token at a position is in the punctuation set."""
    pool_weights: Tensor
    """fp32 [b, S]: weight of each key in its block's pooled key."""
    cu_seqlens: Tensor
    """int32 [N + 1]: document boundaries over the b * S flattened tokens, padded by repeats."""
    attention: AttentionConfig
    """The settings that the weights were computed with."""
    topk: int
    """Selected blocks per query in this pass."""
    layer_topk: tuple[int, ...] = ()
    """The same for each layer of the main stack, from layer 1 on; empty if all layers select `topk`."""
    is_dense: bool = False
    """Every layer computes full causal attention in this pass."""
    recorder: SelectionListener | None = None
    """Collects selection statistics in evaluation; None in training."""
    losses: AddedLosses | None = None
    """Collects the losses that layers add to the cross-entropy in training; None where there are none."""
    logits: MaxLogitRecorder | None = None
    """Sees queries and keys of every layer in steps that measure the largest logit; else None."""
    layer_input: Any = None
    """A `layer_input.LayerInput`: that of the layer which reads this, where its selector needs it."""
    prompt_cache: PromptCache | None = None
    """Keeps the keys and values of a pass over prompts that are to be continued."""
    num_joined_rows: int = 1
    """How many rows of the micro-batch this one row is made of."""
    _memo: dict[Any, Any] = field(default_factory=dict, repr=False)
    # Not in the memo, which both share: it would hold what holds it, and a cache of prompts with both.
    _joined: SideInfo | None = field(default=None, init=False, repr=False)

    @classmethod
    def build(
        cls,
        token_ids: Tensor,
        cu_seqlens: Tensor,
        table: PunctuationTable,
        attention: AttentionConfig,
        topk: int,
        recorder: SelectionListener | None = None,
        layer_topk: tuple[int, ...] = (),
        is_dense: bool = False,
        losses: AddedLosses | None = None,
        host_cu_seqlens: Tensor | None = None,
        logits: MaxLogitRecorder | None = None,
    ) -> SideInfo:
        """Return the side information of one micro-batch. Every pipeline stage builds its own.

        Args:
            token_ids: int64 [b, S].
            cu_seqlens: int32 [N + 1] over the b * S flattened tokens, every row start among them.
            table: punctuation flags, on the device of `token_ids`.
            attention: the recipe's attention settings.
            topk: `attention.train_topk` in training, `infer_topk` in evaluation and generation.
            recorder: receives every PHSA layer's selection, or None.
            layer_topk: k of each layer of the main stack, if they differ.
            is_dense: full causal attention in every layer.
            losses: collects added losses, or None.
            host_cu_seqlens: the same as `cu_seqlens` on the CPU, so that dense attention need not fetch it.
            logits: sees every layer's queries and keys, or None.

        Raises:
            ValueError: a shape or dtype is wrong.
        """
        if token_ids.dim() != 2 or token_ids.dtype != torch.int64:
            raise ValueError(
                f"token_ids must be int64 [b, S], got {token_ids.dtype} {tuple(token_ids.shape)}"
            )
        if cu_seqlens.dim() != 1 or cu_seqlens.dtype != torch.int32:
            raise ValueError(
                f"cu_seqlens must be int32 [N + 1], got {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}"
            )
        if min(topk, *layer_topk, topk) < 1:
            raise ValueError(f"topk={topk}, layer_topk={layer_topk} must be at least 1")
        if not cu_seqlens.is_cuda:
            # On a GPU this would wait for the device; there the data room's own test has to do.
            _check_boundaries(cu_seqlens, *token_ids.shape)
        is_punctuation = table.is_punctuation[token_ids]
        known = {} if host_cu_seqlens is None else {"host_cu_seqlens": host_cu_seqlens}
        return cls(
            **_row_fields(token_ids.shape[1]),
            token_ids=token_ids,
            is_punctuation=is_punctuation,
            pool_weights=_weights(is_punctuation, token_ids, cu_seqlens, attention),
            cu_seqlens=cu_seqlens,
            attention=attention,
            topk=topk,
            layer_topk=layer_topk,
            is_dense=is_dense,
            recorder=recorder,
            losses=losses,
            logits=logits,
            _memo=known,
        )

    def topk_of(self, layer_number: int) -> int:
        """Return k of a layer, counted from 1; layers past the main stack select `topk`."""
        return self.layer_topk[layer_number - 1] if layer_number <= len(self.layer_topk) else self.topk

    def positions(self) -> tuple[Tensor, Tensor]:
        """Return (position in its document, document index), both int32 [b * S]."""
        return self.once("positions", lambda: token_positions(self.cu_seqlens, self.token_ids.numel()))

    def block_rows(self, block_tokens: int) -> Tensor:
        """Return int32 [N + 1]: the first pooled row of each document, the same for all layers."""
        return self.once(
            ("block_rows", block_tokens), lambda: block_boundaries(self.cu_seqlens, block_tokens)
        )

    def document_bounds(self) -> list[tuple[int, int]]:
        """Return (first, past the last) flattened token of every document that has any, on the host.

        On a GPU the first call of a micro-batch waits for the device, unless `build` was given a copy on the
        host. Dense attention needs it, PHSA does not.
        """

        def read() -> list[tuple[int, int]]:
            bounds = self.once("host_cu_seqlens", lambda: self.cu_seqlens).tolist()
            return [(start, end) for start, end in zip(bounds, bounds[1:], strict=False) if end > start]

        return self.once("document_bounds", read)

    def joined(self) -> SideInfo:
        """Return the same with all rows as one of b * S tokens, in which documents are where they were."""
        if self._joined is None:
            num_rows, length = self.token_ids.shape
            flat = {
                name: getattr(self, name).reshape(1, -1)
                for name in ("token_ids", "is_punctuation", "pool_weights")
            }
            row = _row_fields(num_rows * length)
            self._joined = replace(self, **flat, **row, num_joined_rows=num_rows)
        return self._joined

    def at_mtp_depth(self, depth: int) -> SideInfo:
        """Return the side information for the layer of multi-token-prediction depth `depth`.

        At depth d the layer's input at position i joins the hidden state of token i with the embedding of
        token i + d, the newest token that it has seen. So the key at i is punctuation if token i + d of the
        same document is; the last d positions of a document, which have no such token, are not. Blocks stay
        where they are. Depth 0 is the main stack. Statistics are those of the main stack only.
        """
        if depth == 0:
            return self
        shifted = self.once(("depth", depth), lambda: self._shifted(depth))
        # Shared by all calls, unlike the input of a layer, which belongs to one.
        return shifted if self.layer_input is None else replace(shifted, layer_input=self.layer_input)

    def _shifted(self, depth: int) -> SideInfo:
        position, document = self.positions()
        length = (self.cu_seqlens[1:] - self.cu_seqlens[:-1])[document]
        inside = position + depth < length
        token = torch.arange(len(position), device=position.device)
        source = torch.where(inside, token + depth, token)
        flags = (self.is_punctuation.reshape(-1)[source] & inside).view(self.token_ids.shape)
        # Past the end of the document 0 stands for no token, as in megatron's own roll.
        ids = torch.where(inside, self.token_ids.reshape(-1)[source], 0).view(self.token_ids.shape)
        return replace(
            self,
            token_ids=ids,
            is_punctuation=flags,
            pool_weights=_weights(flags, ids, self.cu_seqlens, self.attention),
            layer_topk=(),
            recorder=None,
            logits=None,
            layer_input=None,
            _memo={},
        )

    def mtp_loss_mask(self, loss_mask: Tensor, num_depths: int) -> Tensor:
        """Return the loss mask [b, S] to hand to a model with multi-token prediction.

        Megatron shifts the mask by d tokens at depth d and knows rows, not documents: near the end of a
        document it would ask for tokens of the next one. Leaving out the first `num_depths` positions of
        every document removes exactly those terms at the last depth (and a few sound ones at the depths
        before). The loss of the main stack is computed with the unchanged mask.
        """
        position, _ = self.positions()
        return loss_mask * (position >= num_depths).view(loss_mask.shape)

    def once(self, name: Any, compute: Callable[[], _T]) -> _T:
        """Return what `compute` gives, computed at the first use of `name` and shared by all layers."""
        if name not in self._memo:
            self._memo[name] = compute()
        value: _T = self._memo[name]
        return value


def _row_fields(seq_len_tokens: int) -> dict[str, Any]:
    # On the CPU on purpose: multi-token prediction uses the entries as slice bounds on the host.
    row = torch.tensor([0, seq_len_tokens], dtype=torch.int32)
    return {
        "qkv_format": "sbhd",
        "cu_seqlens_q": row,
        "cu_seqlens_kv": row,
        "max_seqlen_q": seq_len_tokens,
        "max_seqlen_kv": seq_len_tokens,
    }


def _weights(
    is_punctuation: Tensor, token_ids: Tensor, cu_seqlens: Tensor, attention: AttentionConfig
) -> Tensor:
    return pool_weights(
        branch_flags(is_punctuation, token_ids, cu_seqlens, attention),
        cu_seqlens,
        block_tokens=attention.block_tokens,
        mean_weight_frac=attention.mean_weight_frac,
    )


def _check_boundaries(cu_seqlens: Tensor, num_rows: int, seq_len_tokens: int) -> None:
    num_tokens = num_rows * seq_len_tokens
    if cu_seqlens[0] != 0 or cu_seqlens[-1] != num_tokens or (cu_seqlens.diff() < 0).any():
        raise ValueError(f"cu_seqlens must rise from 0 to b * S = {num_tokens}, got {cu_seqlens.tolist()}")
    row_starts = torch.arange(0, num_tokens, seq_len_tokens, dtype=torch.int32)
    if not torch.isin(row_starts, cu_seqlens).all():
        raise ValueError(
            f"every row starts a document, but a multiple of S={seq_len_tokens} is not in "
            f"cu_seqlens={cu_seqlens.tolist()}"
        )
