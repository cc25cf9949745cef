"""A block indexer as a core attention: it chooses the blocks, and learns to from dense attention alone.

The choice has no gradient, and the indexer's inputs have none either: its weights follow from its own loss,
the rest of the model from the cross-entropy, as in DeepSeek-V3.2 (arXiv 2512.02556). As there, index queries,
index keys and the weights of the index heads are linear in the layer's input, and RoPE turns the first two.
Different from there: blocks instead of tokens (a block's index key is the mean of its tokens', turned at its
first token); an indexer for each key-value head instead of one for all; all channels are turned; a target
over all candidate blocks in every step, not over the selected ones after a warm-up with frozen weights.
`attention.topk_dense_steps` makes a dense warm-up, in which the model goes on learning.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear
from torch import Tensor

from phsa_kernels.api import block_boundaries, pool
from phsa_kernels.indexer import Index, distillation_loss, select_indexed
from phsa_kernels.nsa import turn
from phsa_megatron.attention.added_losses import INDEX
from phsa_megatron.attention.core_attention import PHSACoreAttention
from phsa_megatron.attention.head_weights import drawn_apart
from phsa_megatron.attention.layer_input import LayerInput
from phsa_megatron.attention.side_info import SideInfo
from phsa_megatron.config.errors import ConfigError
from phsa_megatron.config.schema import Selector


class IndexerCoreAttention(PHSACoreAttention):
    """PHSA's attention over the blocks that a learned indexer chooses."""

    def __init__(self, config: Any, layer_number: int, *args: Any, seed: int = 0, **kwargs: Any) -> None:
        """Take what `PHSACoreAttention` takes, and the seed of the run.

        Raises:
            ConfigError: context parallelism is on.
        """
        super().__init__(config, layer_number, *args, **kwargs)
        if self.context_groups is not None:
            raise ConfigError(
                "attention.selector=indexer has no context parallelism: set parallel.context_size=1"
            )
        self.head_dim, num_heads = config.kv_channels, self.attention.indexer_heads
        # Rows by key-value head, so that a tensor-parallel process has those of its heads.
        widths = {"query": num_heads * self.head_dim, "key": self.head_dim, "weight": num_heads}
        place = f"{seed}/indexer/{self.mtp_depth}/{layer_number}"
        for name, width in widths.items():
            linear = ColumnParallelLinear(
                config.hidden_size,
                config.num_query_groups * width,
                config=config,
                init_method=drawn_apart(f"{place}/{name}", config.init_method_std),
                bias=False,
                gather_output=False,
                tp_group=kwargs["pg_collection"].tp,
            )
            self.add_module(f"linear_{name}", linear)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, side_info: SideInfo) -> Tensor:
        out = super()._attend(query, key, value, side_info)
        losses = side_info.losses
        if losses is None or not losses.wants(INDEX):
            return out
        settings, bounds = self.attention, side_info.cu_seqlens
        total = distillation_loss(
            self._index(side_info),
            query,
            key,
            *side_info.positions(),
            bounds,
            side_info.block_rows(settings.block_tokens),
            init_tokens=settings.init_tokens,
            local_tokens=settings.local_tokens,
            block_tokens=settings.block_tokens,
            softmax_scale=self.softmax_scale,
        )
        return losses.add(out, INDEX, total)

    def _choose(
        self, query: Tensor, keys: Tensor, q_pos: Tensor, q_doc: Tensor, side_info: SideInfo
    ) -> Tensor:
        settings = self.attention
        if settings.selector != Selector.indexer:  # information loss measures others on the same layers
            return super()._choose(query, keys, q_pos, q_doc, side_info)
        with torch.no_grad():
            index = self._index(side_info)
        return select_indexed(
            index,
            q_pos,
            q_doc,
            side_info.block_rows(settings.block_tokens),
            topk=side_info.topk_of(self.layer_number),
            init_tokens=settings.init_tokens,
            local_tokens=settings.local_tokens,
            block_tokens=settings.block_tokens,
            impl=settings.impl.value,
        )

    def _index(self, side_info: SideInfo) -> Index:
        """Return index queries [T, Hkv, J, D], weights [T, Hkv, J] and block keys [NB, Hkv, D]."""
        given = side_info.layer_input
        if not isinstance(given, LayerInput):
            raise TypeError(
                f"layer {self.layer_number} got no input: the indexer needs SelfAttentionWithInput"
            )
        hidden, angles = given.hidden.detach(), given.token_angles()
        query, key, weight = (
            linear(hidden)[0].transpose(0, 1).flatten(0, 1)
            for linear in (self.linear_query, self.linear_key, self.linear_weight)
        )  # [T, Hkv * width]
        num_tokens, d, num_heads = len(query), self.head_dim, self.attention.indexer_heads
        query = turn(query.view(num_tokens, -1, d), angles).view(num_tokens, -1, num_heads, d)
        m, bounds = self.attention.block_tokens, side_info.cu_seqlens
        means = pool(key.view(num_tokens, -1, d), None, bounds, block_tokens=m)[:, :, 0]
        # Past the last block there are rows of zeros, which stay zeros whatever turns them.
        block_key = turn(means, angles[_first_tokens(bounds, len(means), m)])
        return Index(query, weight.view(num_tokens, -1, num_heads), block_key)


def _first_tokens(cu_seqlens: Tensor, num_rows: int, block_tokens: int) -> Tensor:
    """Return int64 [num_rows]: the first token of the block of each pooled row, 0 for rows past the last."""
    cu_blocks = block_boundaries(cu_seqlens, block_tokens)
    row = torch.arange(num_rows, device=cu_seqlens.device, dtype=torch.int32)
    doc = (torch.searchsorted(cu_blocks, row, right=True) - 1).clamp(max=len(cu_seqlens) - 2)
    first = cu_seqlens[doc] + (row - cu_blocks[doc]) * block_tokens
    return torch.where(row < cu_blocks[-1], first, 0).long()
