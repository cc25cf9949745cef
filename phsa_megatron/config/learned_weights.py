"""Weights of selectors that have some, and the FLOPs of what they compute, per layer of the whole model.

Letters as in `flops.py`; l = 32 tokens of NSA's compressed windows, whose MLP has a hidden layer of D.
"""

from __future__ import annotations

from phsa_megatron.config.schema import AttentionConfig, ModelConfig, Selector
from phsa_megatron.config.selector_kinds import learned_selector

_WINDOW_TOKENS, _STRIDE_TOKENS = 32, 16


def learned_product_weights(model: ModelConfig, attention: AttentionConfig | None) -> int:
    """Return the weights that multiply each token once: NSA's gates, and keys and values of two branches."""
    if attention is None or learned_selector(attention) != Selector.nsa:
        return 0
    return model.hidden_size * (3 * model.num_query_heads + 4 * model.num_kv_heads * model.head_dim)


def learned_weights(model: ModelConfig, attention: AttentionConfig | None) -> int:
    """Return all weights that a selector adds to one layer; 0 for selectors without any."""
    learned = None if attention is None else learned_selector(attention)
    if attention is None or learned is None:
        return 0
    d, kv_heads = model.head_dim, model.num_kv_heads
    if learned == Selector.nsa:
        window = _WINDOW_TOKENS * d  # the position encoding of a window, and the inputs of its MLP
        gains = 2 * d if model.qk_norm else 0
        return learned_product_weights(model, attention) + kv_heads * (
            2 * (window + window * d + d * d) + gains
        )
    group = model.num_query_heads // kv_heads * d
    heads, channels = attention.indexer_heads, attention.indexer_dim
    return kv_heads * (group * heads * channels + d * channels + group * heads)


def compression_flops(num_tokens: int, model: ModelConfig) -> int:
    """Return the forward FLOPs of NSA's compression of one document's keys and values in one layer."""
    windows = max(0, (num_tokens - _WINDOW_TOKENS) // _STRIDE_TOKENS + 1)
    d = model.head_dim
    return 2 * windows * 2 * model.num_kv_heads * (_WINDOW_TOKENS * d * d + d * d)


def indexer_flops(num_tokens: int, scored: int, model: ModelConfig, attention: AttentionConfig) -> int:
    """Return the forward FLOPs of the indexer of one layer over one document, its pooling left out.

    Args:
        num_tokens: of the document.
        scored: (query, block) pairs that are scored.
        model: the shape.
        attention: the indexer's settings.
    """
    d, kv_heads = model.head_dim, model.num_kv_heads
    group = model.num_query_heads // kv_heads * d
    heads, channels = attention.indexer_heads, attention.indexer_dim
    queries = num_tokens * group * heads * (channels + 1)
    keys = num_tokens // attention.block_tokens * d * channels
    return 2 * kv_heads * (queries + keys + scored * heads * channels)
