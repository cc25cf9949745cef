"""A block indexer as a core attention: it chooses the blocks, and learns to from dense attention alone.

The choice has no gradient, and the indexer's inputs have none either: its weights follow from its own loss,
the rest of the model from the cross-entropy, as in DeepSeek-V3.2 (arXiv 2512.02556). Different from there:
blocks instead of tokens; an indexer for each key-value head, which sees its queries and keys, instead of one
for all heads that sees the layer's input; a target over all candidate blocks in every step, not over the
selected ones after a warm-up with frozen weights. `attention.topk_dense_steps` makes a dense warm-up, in
which the model goes on learning.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from phsa_kernels.indexer import IndexWeights, distillation_loss, select_indexed
from phsa_megatron.attention.added_losses import INDEX
from phsa_megatron.attention.core_attention import PHSACoreAttention
from phsa_megatron.attention.head_weights import HeadWeights
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
        settings, d = self.attention, config.kv_channels
        group_width = config.num_attention_heads // config.num_query_groups * d
        shapes: dict[str, tuple[int, ...]] = {
            "query": (group_width, settings.indexer_heads * settings.indexer_dim),
            "key": (d, settings.indexer_dim),
            "head": (group_width, settings.indexer_heads),
        }
        place = f"{seed}/indexer/{self.mtp_depth}/{layer_number}"
        self.heads = HeadWeights(config, kwargs["pg_collection"].tp, place, shapes, zeros=set())

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, side_info: SideInfo) -> Tensor:
        out = super()._attend(query, key, value, side_info)
        losses = side_info.losses
        if losses is None or not losses.wants(INDEX):
            return out
        settings = self.attention
        total = distillation_loss(
            query,
            key,
            self._weights(),
            *side_info.positions(),
            side_info.cu_seqlens,
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
        return select_indexed(
            query,
            keys,
            self._weights(),
            q_pos,
            q_doc,
            side_info.cu_seqlens,
            topk=side_info.topk_of(self.layer_number),
            init_tokens=settings.init_tokens,
            local_tokens=settings.local_tokens,
            block_tokens=settings.block_tokens,
            impl=settings.impl.value,
        )

    def _weights(self) -> IndexWeights:
        return IndexWeights(self.heads.query, self.heads.key, self.heads.head)
