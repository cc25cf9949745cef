"""Weights of selectors that have some, and the FLOPs of what they compute, per layer of the whole model.

Letters as in `flops.py`; l = 32 tokens of NSA's compressed windows, whose MLP has a hidden layer of D.
"""

from __future__ import annotations

from phsa_megatron.config.schema import AttentionConfig, ModelConfig, Selector
from phsa_megatron.config.selector_kinds import learned_selector

_WINDOW_TOKENS, _STRIDE_TOKENS = 32, 16


def learned_product_weights(model: ModelConfig, attention: AttentionConfig | None) -> int:
    """Return the weights that multiply each token once.

    NSA: gates, and keys and values of two branches. Indexer: index queries, index keys and weights of heads.
    """
    learned = None if attention is None else learned_selector(attention)
    if attention is None or learned is None:
        return 0
    d, kv_heads = model.head_dim, model.num_kv_heads
    if learned == Selector.nsa:
        return model.hidden_size * (3 * model.num_query_heads + 4 * kv_heads * d)
    heads = attention.indexer_heads
    return model.hidden_size * kv_heads * (heads * d + d + heads)


def learned_weights(model: ModelConfig, attention: AttentionConfig | None) -> int:
    """Return all weights that a selector adds to one layer; 0 for selectors without any."""
    products = learned_product_weights(model, attention)
    if attention is None or learned_selector(attention) != Selector.nsa:
        return products
    d = model.head_dim
    window = _WINDOW_TOKENS * d  # the position encoding of a window, and the inputs of its MLP
    gains = 2 * d if model.qk_norm else 0
    return products + model.num_kv_heads * (2 * (window + window * d + d * d) + gains)


def compression_flops(num_tokens: int, model: ModelConfig) -> int:
    """Return the forward FLOPs of NSA's compression of one document's keys and values in one layer."""
    windows = max(0, (num_tokens - _WINDOW_TOKENS) // _STRIDE_TOKENS + 1)
    d = model.head_dim
    return 2 * windows * 2 * model.num_kv_heads * (_WINDOW_TOKENS * d * d + d * d)


def index_flops(scored: int, model: ModelConfig, attention: AttentionConfig) -> int:
    """Return the forward FLOPs of index scores in one layer, of as many (query, block) pairs as `scored`."""
    return 2 * model.num_kv_heads * attention.indexer_heads * (model.head_dim + 1) * scored
