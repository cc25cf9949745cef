"""A rough estimate of one device's memory in training: enough to see early that a run cannot fit."""

from __future__ import annotations

from dataclasses import dataclass

from phsa_megatron.config.flops import ParameterCount, expert_weights, is_dense
from phsa_megatron.config.schema import Dtype, KernelImpl, Recompute, TrainConfig

_GIB = 1 << 30


@dataclass(frozen=True)
class MemoryEstimate:
    """Memory of the fullest device, in GiB.

    Attributes:
        weights_gib: weights in the run's dtype.
        grads_gib: fp32 gradient sums.
        optimizer_gib: Adam's two moments, and fp32 master weights for bf16.
        activations_gib: what the backward pass needs, without the logits, with the keys and values that
            context parallelism gathers. Rough.
        logits_gib: logits of one micro-batch in fp32 with their gradient.
        total_gib: the sum; allocator overhead and communication buffers come on top.
    """

    weights_gib: float
    grads_gib: float
    optimizer_gib: float
    activations_gib: float
    logits_gib: float
    total_gib: float


def estimate_memory(
    config: TrainConfig,
    parameters: ParameterCount,
    padded_vocab: int,
    data_parallel: int,
    micro_batches: int,
) -> MemoryEstimate:
    """Return the estimate for the fullest pipeline stage, the one that holds embedding or output layer."""
    parallel, model = config.parallel, config.model
    element = 2 if config.run.dtype == Dtype.bf16 else 4
    layers_here = -(-model.num_layers // parallel.pipeline_size)
    parameters_here = layers_here * parameters.per_layer + parameters.embedding + parameters.mtp
    if parallel.pipeline_size == 1:
        parameters_here += parameters.output_layer
    # Experts are shared by other processes than the tensor-parallel ones, each whole.
    experts = layers_here * model.num_experts * expert_weights(model)
    here = (parameters_here - experts) / parallel.tensor_size + experts / parallel.expert_size
    # fp32 training updates the weights themselves; bf16 training keeps fp32 masters beside the two moments.
    optimizer_bytes = (12 if config.run.dtype == Dtype.bf16 else 8) * here
    if parallel.distributed_optimizer:
        optimizer_bytes /= data_parallel * parallel.context_size
    tokens = config.optim.micro_batch_sequences * config.data.seq_len_tokens // parallel.context_size
    in_flight = min(parallel.pipeline_size, micro_batches)
    activations = _activation_bytes(config, tokens, layers_here, element) * in_flight
    logits = tokens * padded_vocab / parallel.tensor_size * (element + 2 * 4)
    weights, grads = element * here, 4 * here
    return MemoryEstimate(
        weights_gib=weights / _GIB,
        grads_gib=grads / _GIB,
        optimizer_gib=optimizer_bytes / _GIB,
        activations_gib=activations / _GIB,
        logits_gib=logits / _GIB,
        total_gib=(weights + grads + optimizer_bytes + activations + logits) / _GIB,
    )


def _activation_bytes(config: TrainConfig, tokens: int, layers: int, element: int) -> float:
    """Return the bytes kept for the backward pass of one micro-batch on one device."""
    model, tensor_size = config.model, config.parallel.tensor_size
    q_width = model.num_query_heads * model.head_dim
    kv_width = model.num_kv_heads * model.head_dim
    # Inputs of both norms and of the matrices after them, then q, k (before norm, before and after RoPE), v,
    # the attention output, and gate, up and their product.
    residual = 4 * model.hidden_size / (tensor_size if config.parallel.sequence_parallel else 1)
    inside = (3 * (q_width + kv_width) + kv_width + q_width + 3 * model.ffn_hidden_size) / tensor_size
    # Context parallelism keeps all processes' keys and values, gathered.
    context_size = config.parallel.context_size
    gathered = 2 * kv_width / tensor_size * context_size if context_size > 1 else 0
    per_layer = tokens * element * (residual + inside + gathered)
    core = _core_attention_bytes(config, tokens) / tensor_size
    match config.parallel.recompute:
        case Recompute.none:
            return layers * (per_layer + core)
        case Recompute.selective:
            return layers * per_layer + core
        case Recompute.full:
            return layers * tokens * element * model.hidden_size + per_layer + core


def _core_attention_bytes(config: TrainConfig, tokens: int) -> float:
    """Return what the core attention keeps: fp32 scores and probabilities in the reference, else little."""
    length = config.data.seq_len_tokens
    if config.attention.impl != KernelImpl.reference or is_dense(length, config.attention):
        return 0.0
    return 2 * 4 * config.model.num_query_heads * tokens * (length + 1) / 2
