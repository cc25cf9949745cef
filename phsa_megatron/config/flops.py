"""Counts of parameters, FLOPs and attended tokens: exact integers, each tested against a loop that counts.

Letters: S tokens of a document, Hq and Hkv query and key-value heads, R = Hq / Hkv, D head dim, m block
size, k top-k.

A multiply-add is 2 FLOPs; only matrix products are counted, as is usual for utilization: softmax, norms,
RoPE and sorting are left out. The backward pass of a product costs twice its forward pass. Selection has no
backward pass (method, section 3). Recomputation is not counted: it is not useful work.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from phsa_megatron.config.learned_weights import (
    compression_flops,
    index_flops,
    learned_product_weights,
    learned_weights,
)
from phsa_megatron.config.schema import AttentionConfig, AttentionKind, GroupScore, ModelConfig, Selector
from phsa_megatron.config.selector_kinds import selects_blocks


@dataclass(frozen=True)
class ParameterCount:
    """Trainable parameters of the whole model, over all devices.

    Attributes:
        embedding: rows of the padded vocabulary times width.
        output_layer: the same again, or 0 if it is tied to the embedding.
        per_layer: one transformer layer.
        mtp: all multi-token-prediction depths.
        total: everything.
        non_embedding: everything but embedding and output layer.
        active_in_products: weights that multiply each token once: what linear FLOPs are made of.
    """

    embedding: int
    output_layer: int
    per_layer: int
    mtp: int
    total: int
    non_embedding: int
    active_in_products: int


def padded_vocab_size(model: ModelConfig, tensor_size: int) -> int:
    """Return the rows of the embedding: the vocabulary, rounded up so that it splits evenly."""
    multiple = model.vocab_pad_multiple * tensor_size
    return -(-model.vocab_size // multiple) * multiple


def layer_product_weights(model: ModelConfig) -> int:
    """Return the weights that multiply each token in one layer.

    Those of q, k, v, output projection, SwiGLU in and out; with experts the chosen ones and the router.
    """
    q_width = model.num_query_heads * model.head_dim
    kv_width = model.num_kv_heads * model.head_dim
    experts, router = (model.expert_topk, model.num_experts) if model.num_experts else (1, 0)
    attention = model.hidden_size * (2 * q_width + 2 * kv_width)
    return attention + experts * expert_weights(model) + router * model.hidden_size


def expert_weights(model: ModelConfig) -> int:
    """Return the weights of one expert: SwiGLU in and out."""
    return 3 * model.hidden_size * model.ffn_hidden_size


def count_parameters(
    model: ModelConfig, padded_vocab: int, attention: AttentionConfig | None = None
) -> ParameterCount:
    """Return the exact parameter counts of the Qwen3 shape: RMSNorm weights, no biases.

    Args:
        model: the shape.
        padded_vocab: rows of the embedding.
        attention: whose selector may have weights of its own; None has none.
    """
    hidden = model.hidden_size
    norms = 2 * hidden + (2 * model.head_dim if model.qk_norm else 0)
    idle_experts = max(0, model.num_experts - model.expert_topk)
    per_layer = layer_product_weights(model) + idle_experts * expert_weights(model) + norms
    per_layer += learned_weights(model, attention)
    embedding = padded_vocab * hidden
    output_layer = 0 if model.tie_embeddings else embedding
    # A depth joins embedding and hidden state (2h to h), each under its own norm, and ends in a norm.
    mtp = model.mtp_num_layers * (2 * hidden * hidden + 3 * hidden + per_layer)
    non_embedding = model.num_layers * per_layer + hidden + mtp
    layer_products = layer_product_weights(model) + learned_product_weights(model, attention)
    products = model.num_layers * layer_products + padded_vocab * hidden
    products += model.mtp_num_layers * (2 * hidden * hidden + layer_products + padded_vocab * hidden)
    return ParameterCount(
        embedding=embedding,
        output_layer=output_layer,
        per_layer=per_layer,
        mtp=mtp,
        total=embedding + output_layer + non_embedding,
        non_embedding=non_embedding,
        active_in_products=products,
    )


def causal_pairs(num_tokens: int) -> int:
    """Return the (query, key) pairs of full causal attention over one document."""
    return num_tokens * (num_tokens + 1) // 2


def attended_tokens(position: int, attention: AttentionConfig, topk: int) -> int:
    """Return how many tokens the query at a position attends to, itself included.

    Init and local are whole blocks clipped to the position; each token counts once; with fewer candidates
    than k, all of them are chosen. For NSA these are the tokens of the selected branch and of the sliding
    window together, at most: chosen blocks may lie in the window. Compressed windows are no tokens.
    """
    if attention.selector == Selector.dense_window:
        return min(position + 1, attention.init_tokens + attention.local_tokens)
    if attention.selector == Selector.window:
        topk = 0
    m = attention.block_tokens
    local_start, num_init = _local_start(position, attention), attention.init_tokens // m
    local = position - local_start * m + 1
    init = min(num_init, local_start) * m
    candidates = max(0, local_start - num_init)
    chosen = min(topk, candidates) * m
    near = 0
    if attention.nsa_window_tokens is not None:
        # What the sliding window adds before the local blocks and behind the init tokens.
        near = max(0, local_start * m - max(position + 1 - attention.nsa_window_tokens, init))
    return min(position + 1, init + local + chosen + near)


def selected_pairs(num_tokens: int, attention: AttentionConfig, topk: int) -> int:
    """Return the (query, key) pairs that PHSA attends to over one document of `num_tokens`."""
    if is_dense(num_tokens, attention):
        return causal_pairs(num_tokens)
    if attention.selector == Selector.dense_window:
        inside = min(num_tokens, attention.init_tokens + attention.local_tokens)
        return causal_pairs(inside) + (num_tokens - inside) * inside
    if attention.nsa_window_tokens is not None:
        return sum(attended_tokens(i, attention, topk) for i in range(num_tokens))
    m, total = attention.block_tokens, 0
    for block_start in range(0, num_tokens, m):
        # Inside a block only the local part grows, by one token a query.
        queries = min(m, num_tokens - block_start)
        total += queries * attended_tokens(block_start, attention, topk) + queries * (queries - 1) // 2
    return total


def scored_pairs(num_tokens: int, attention: AttentionConfig) -> int:
    """Return the (query, block) pairs that selection must score over one document.

    softmax_sum scores every block before the current one, windows included, because its normalizer runs over
    them; raw_sum, MoBA and the indexer need only the candidates. InfLLM-V2 and NSA score the windows that
    have ended.
    """
    if is_dense(num_tokens, attention) or not selects_blocks(attention):
        return 0
    if attention.selector in (Selector.infllm_v2, Selector.nsa):
        return sum(
            max(0, (i + 1 - length) // stride + 1)
            for length, stride in _infllm_windows(attention)
            for i in range(length - 1, num_tokens)
        )
    m, total = attention.block_tokens, 0
    num_init = attention.init_tokens // m
    only_candidates = (Selector.moba, Selector.indexer)
    for block_start in range(0, num_tokens, m):
        queries = min(m, num_tokens - block_start)
        if attention.group_score == GroupScore.softmax_sum and attention.selector not in only_candidates:
            blocks = block_start // m
        else:
            blocks = max(0, _local_start(block_start, attention) - num_init)
        total += queries * blocks
    return total


def selection_flops(num_tokens: int, model: ModelConfig, attention: AttentionConfig) -> int:
    """Return the forward FLOPs of pooling and scoring of one layer over one document.

    NSA's scores are those of its compressed branch, and count as attention. The indexer's loss and its
    target, scores of dense attention, are left out.
    """
    if is_dense(num_tokens, attention) or not selects_blocks(attention):
        return 0
    if attention.selector == Selector.nsa:
        return 0
    if attention.selector == Selector.infllm_v2:
        # Windows overlap: a token is in several of them.
        summed = sum(
            max(0, (num_tokens - length) // stride + 1) * length
            for length, stride in _infllm_windows(attention)
        )
    else:
        # Bounds are found by comparing; variances are a second sum.
        sums = {Selector.minmax: 0, Selector.cumulant: 2}.get(attention.selector, 1)
        summed = sums * (num_tokens // attention.block_tokens) * attention.block_tokens
    pooling = 2 * summed * model.num_kv_heads * model.head_dim
    if attention.selector == Selector.indexer:
        return pooling + index_flops(scored_pairs(num_tokens, attention), model, attention)
    vectors = 2 if attention.selector in (Selector.minmax, Selector.cumulant, Selector.halves) else 1
    # raw_sum is linear: the group's queries are summed first and scored once (method, section 3).
    per_pair = (
        model.num_query_heads if attention.group_score == GroupScore.softmax_sum else model.num_kv_heads
    )
    return pooling + 2 * model.head_dim * per_pair * vectors * scored_pairs(num_tokens, attention)


def attention_flops(pairs: int, model: ModelConfig) -> int:
    """Return the forward FLOPs of one layer's scores and weighted sum over (query, key) pairs."""
    return 4 * model.head_dim * model.num_query_heads * pairs


def train_flops_per_sequence(
    num_tokens: int, model: ModelConfig, parameters: ParameterCount, attention: AttentionConfig | None
) -> int:
    """Return forward and backward FLOPs of one sequence that is one document.

    Args:
        num_tokens: tokens of the sequence.
        model: the shape.
        parameters: its counts.
        attention: what the layers compute; None counts full causal attention (the dense equivalent).
    """
    layers = model.num_layers + model.mtp_num_layers
    linear = 3 * linear_flops(num_tokens, parameters)
    if attention is None:
        return linear + layers * dense_layer_train_flops(num_tokens, model)
    num_dense = len(attention.dense_layers)
    sparse = layer_train_flops(num_tokens, model, attention, attention.train_topk)
    return linear + num_dense * dense_layer_train_flops(num_tokens, model) + (layers - num_dense) * sparse


def linear_flops(num_tokens: int, parameters: ParameterCount) -> int:
    """Return the forward FLOPs of all products of tokens with weights."""
    return 2 * parameters.active_in_products * num_tokens


def dense_layer_train_flops(num_tokens: int, model: ModelConfig) -> int:
    """Return forward and backward FLOPs of one layer's full causal attention over one document."""
    return 3 * attention_flops(causal_pairs(num_tokens), model)


def layer_train_flops(num_tokens: int, model: ModelConfig, attention: AttentionConfig, topk: int) -> int:
    """Return forward and backward FLOPs of one layer's own attention, selection included."""
    if attention.selector == Selector.nsa:
        return 3 * _nsa_flops(num_tokens, model, attention, topk)
    pairs = selected_pairs(num_tokens, attention, topk)
    if attention.align_coeff:  # full attention, to align with
        pairs += causal_pairs(num_tokens)
    return 3 * attention_flops(pairs, model) + selection_flops(num_tokens, model, attention)


def _nsa_flops(num_tokens: int, model: ModelConfig, attention: AttentionConfig, topk: int) -> int:
    """Return the forward FLOPs of NSA's three branches in one layer over one document, each by itself."""
    selected = replace(attention, nsa_window_tokens=None)
    window = replace(
        selected, selector=Selector.dense_window, init_tokens=0, local_tokens=attention.nsa_window_tokens or 0
    )
    pairs = selected_pairs(num_tokens, selected, topk)
    pairs += selected_pairs(num_tokens, window, 0) + scored_pairs(num_tokens, attention)
    return attention_flops(pairs, model) + compression_flops(num_tokens, model)


def last_token_sparsity_frac(num_tokens: int, attention: AttentionConfig, topk: int) -> float:
    """Return the share of a document's tokens that its last query leaves out."""
    if is_dense(num_tokens, attention):
        return 0.0
    return 1 - attended_tokens(num_tokens - 1, attention, topk) / num_tokens


def mean_sparsity_frac(num_tokens: int, attention: AttentionConfig, topk: int) -> float:
    """Return the share of the causal (query, key) pairs of a document that is left out."""
    return 1 - selected_pairs(num_tokens, attention, topk) / causal_pairs(num_tokens)


def is_dense(num_tokens: int, attention: AttentionConfig) -> bool:
    """Return whether a document of this length gets full causal attention."""
    return attention.kind == AttentionKind.dense or num_tokens <= attention.dense_len_tokens


def _infllm_windows(attention: AttentionConfig) -> tuple[tuple[int, int], ...]:
    """Return (tokens, stride) of each kind of InfLLM-V2's pooling windows."""
    return ((32, 16), (128, 64)) if attention.coarse_lse else ((32, 16),)


def _local_start(position: int, attention: AttentionConfig) -> int:
    """Return the first block of the local window of the query at a position."""
    m = attention.block_tokens
    return max(0, position // m - attention.local_tokens // m + 1)
