"""What each selector is made of: who serves it, what joins it, what it reads."""

from __future__ import annotations

from phsa_megatron.config.schema import AttentionConfig, AttentionKind, Selector

ONE_POOLED_KEY = frozenset(
    {
        Selector.phsa,
        Selector.mean_pool,
        Selector.random_tokens,
        Selector.last_token,
        Selector.shuffled,
        Selector.separators,
        Selector.max_norm,
    }
)
"""Selectors that are PHSA with other pooling weights: one weighted mean a block, scored by its dot."""

WITH_KERNELS = ONE_POOLED_KEY | {Selector.halves}
"""Selectors that every implementation chooses with: the larger of two such scores is one too."""

WITHOUT_SELECTION = frozenset({Selector.window, Selector.dense_window})
"""Selectors that choose no block; k means nothing to them."""

WITH_PARAMETERS = frozenset({Selector.nsa, Selector.indexer})
"""Selectors with weights of their own, in the core attention of every layer."""

EAGER_ONLY = frozenset(Selector) - WITH_KERNELS - WITHOUT_SELECTION
"""Selectors that only impl=reference has."""

WITHOUT_SECOND_BRANCH = (
    WITHOUT_SELECTION | WITH_PARAMETERS | {Selector.mean_pool, Selector.infllm_v2, Selector.moba}
)
"""Selectors that know the plain mean only: lambda must be 1, so that nobody believes in a second branch."""

OWN_GROUP_SCORE = WITHOUT_SELECTION | WITH_PARAMETERS | {Selector.infllm_v2, Selector.moba}
"""Selectors whose method says how heads share a selection."""


def learned_selector(attention: AttentionConfig) -> Selector | None:
    """Return the selector if it has weights of its own."""
    learned = attention.kind == AttentionKind.phsa and attention.selector in WITH_PARAMETERS
    return attention.selector if learned else None


def selects_blocks(attention: AttentionConfig) -> bool:
    """Return whether a query chooses blocks, so that k means something."""
    return attention.kind == AttentionKind.phsa and attention.selector not in WITHOUT_SELECTION


def inference_topk(attention: AttentionConfig) -> int:
    """Return k in evaluation and generation; train_topk, which nothing reads, where no block is chosen."""
    return attention.train_topk if attention.infer_topk is None else attention.infer_topk


def pools_where_keys_are(selector: Selector) -> bool:
    """Return whether a process can pool its own keys without those of others, before blocks are chosen."""
    return selector in ONE_POOLED_KEY and selector != Selector.max_norm
