"""One device's memory in training, by what takes it and by the moment of the step when it is fullest.

Three moments compete on top of weights, gradients and optimizer state: the loss (all activations and the
logits), the backward pass of a layer (activations, what is recomputed, gradients and kernel workspace), and
the optimizer's step (its temporaries). Workspace of the attention kernels is fitted to measured rows, and a
test holds it to them. Allocator overhead, the CUDA context and NCCL's buffers come on top.
"""

from __future__ import annotations

from dataclasses import dataclass

from phsa_megatron.config.activations import (
    element_bytes,
    head_widths,
    layer_activations,
    own_tokens,
    residual_width,
    rows_apart,
)
from phsa_megatron.config.context_copies import copied_frac
from phsa_megatron.config.flops import ParameterCount, expert_weights, layer_product_weights
from phsa_megatron.config.learned_weights import learned_weights
from phsa_megatron.config.schema import (
    AttentionKind,
    ContextExchange,
    Device,
    Dtype,
    KernelImpl,
    Loss,
    Recompute,
    TrainConfig,
)

_GIB = 1 << 30


@dataclass(frozen=True)
class MemoryEstimate:
    """Memory of the fullest device at its fullest moment, in GiB.

    `total_gib` is the sum of the first six; what follows it says what they are made of.

    Attributes:
        weights_gib: weights in the run's dtype.
        grads_gib: fp32 gradient sums.
        optimizer_gib: Adam's two moments, and fp32 master weights for bf16; sharded over data- and
            context-parallel processes by the distributed optimizer.
        activations_gib: what stays from forward to backward of all micro-batches in flight.
        gathered_kv_gib: of these, keys and values that context parallelism gathered.
        working_gib: the most that is needed besides, at `moment`.
        total_gib: the sum.
        logits_gib: of the loss: logits of one micro-batch and their fp32 softmax.
        recomputed_gib: of a layer's backward pass: what recomputation makes again.
        pooled_keys_gib: of a layer's forward pass: pooled keys of all blocks, with the copies of a gather.
        kernel_workspace_gib: of a layer's backward pass: workspace of the attention kernels.
        optimizer_step_gib: temporaries of the optimizer's step.
        moment: loss, layer or optimizer.
        pipeline_stage: the fullest stage.
    """

    weights_gib: float
    grads_gib: float
    optimizer_gib: float
    activations_gib: float
    gathered_kv_gib: float
    working_gib: float
    total_gib: float
    logits_gib: float
    recomputed_gib: float
    pooled_keys_gib: float
    kernel_workspace_gib: float
    optimizer_step_gib: float
    moment: str
    pipeline_stage: int


def estimate_memory(
    config: TrainConfig,
    parameters: ParameterCount,
    padded_vocab: int,
    data_parallel: int,
    micro_batches: int,
) -> MemoryEstimate:
    """Return the memory of the fullest pipeline stage."""
    # In the middle, stages hold no embedding and no loss, and fewer micro-batches than the one before.
    stages = sorted({0, min(1, config.parallel.pipeline_size - 1), config.parallel.pipeline_size - 1})
    estimates = [
        stage_memory(config, parameters, padded_vocab, data_parallel, micro_batches, stage)
        for stage in stages
    ]
    return max(estimates, key=lambda estimate: estimate.total_gib)


def stage_parameters(config: TrainConfig, parameters: ParameterCount, padded_vocab: int, stage: int) -> float:
    """Return the parameters that one process of a pipeline stage holds.

    Matrices are cut over tensor-parallel processes and norms are not. With several stages the last has a
    copy of a tied embedding, and of any embedding for multi-token prediction.
    """
    model, parallel = config.model, config.parallel
    # An expert is whole in one process; the others of its expert-parallel group hold other experts.
    experts = model.num_experts * expert_weights(model)
    # A selector's weights are cut by key-value head.
    products = layer_product_weights(model) + learned_weights(model, config.attention)
    if model.num_experts:
        products -= model.expert_topk * expert_weights(model)
    whole = parameters.per_layer - products - experts
    layer = products / parallel.tensor_size + experts / parallel.expert_size + whole
    local = model.num_layers / parallel.pipeline_size * layer
    embedding = padded_vocab * model.hidden_size / parallel.tensor_size
    last = parallel.pipeline_size - 1
    if stage == 0:
        local += embedding
    if stage == last:
        depth_products = model.mtp_num_layers * (products + 2 * model.hidden_size**2)
        local += model.hidden_size + depth_products / parallel.tensor_size + parameters.mtp - depth_products
        local -= model.mtp_num_layers * (experts - experts / parallel.expert_size)
        local += 0 if model.tie_embeddings else embedding
        if last > 0 and (model.tie_embeddings or model.mtp_num_layers):
            local += embedding
    return local


def optimizer_bytes_per_parameter(config: TrainConfig) -> int:
    """Return the bytes of Adam's state: two fp32 moments, and fp32 masters unless the weights are fp32."""
    return 12 if config.run.dtype == Dtype.bf16 else 8


def chunks_in_flight(config: TrainConfig, micro_batches: int, stage: int) -> int:
    """Return how many (micro-batch, model chunk) pairs a stage holds at most between forward and backward.

    megatron's schedules: one forward, one backward after a warm-up; interleaved with virtual stages.
    """
    size, virtual = config.parallel.pipeline_size, config.parallel.virtual_pipeline_size
    if virtual is None:
        return min(size - stage, micro_batches)
    warm_up = 2 * (size - stage - 1) + (virtual - 1) * size
    return min(warm_up + 1, micro_batches * virtual)


def _chunks_with_received_rows(config: TrainConfig, micro_batches: int, stage: int) -> int:
    """Return for how many of `chunks_in_flight` rows from the stage before stay beside their joined copy."""
    if rows_apart(config) == config.optim.micro_batch_sequences:
        return 0
    chunks = chunks_in_flight(config, micro_batches, stage)
    if stage > 0:
        return chunks
    # The first chunk makes its input itself; a warm-up goes through as many micro-batches as there are stages
    # chunk by chunk, and then begins with the first chunk again.
    size, virtual = config.parallel.pipeline_size, config.parallel.virtual_pipeline_size or 1
    return min(chunks, (virtual - 1) * min(size, micro_batches))


def stage_memory(
    config: TrainConfig,
    parameters: ParameterCount,
    padded_vocab: int,
    data_parallel: int,
    micro_batches: int,
    stage: int,
) -> MemoryEstimate:
    """Return the memory of one pipeline stage; see `estimate_memory`."""
    parallel, model, optim, e = config.parallel, config.model, config.optim, element_bytes(config)
    here = stage_parameters(config, parameters, padded_vocab, stage)
    shards = data_parallel * parallel.context_size if parallel.distributed_optimizer else 1
    layer = layer_activations(config)
    last = stage == parallel.pipeline_size - 1
    chunk_layers = model.num_layers / (parallel.pipeline_size * (parallel.virtual_pipeline_size or 1))
    layers = chunks_in_flight(config, micro_batches, stage) * chunk_layers
    again = None if parallel.recompute_layers is None else layers / chunk_layers * parallel.recompute_layers
    kept, gathered, final = layer.kept_by(layers, parallel.recompute, again), 0.0, 0.0
    if parallel.recompute in (Recompute.none, Recompute.mlp):
        gathered = layers * layer.gathered_kv
    logits = tied_gradient = 0.0
    if not last:
        # What a stage sends stays until its gradient arrives.
        kept += layers / chunk_layers * layer.layer_input
    kept += _chunks_with_received_rows(config, micro_batches, stage) * layer.layer_input
    if last:
        # The final norm: its input, one fp32 a row, and its output, unless that went into the loss.
        copies = 1 if config.compute.loss == Loss.chunked else 2
        final = own_tokens(config) * residual_width(config) * (copies * e + 4 / model.hidden_size)
        kept += final
        # A depth keeps its layer, its embedding, both joined, and its own final norm and softmax.
        rows_of_depth = layer_activations(config, optim.micro_batch_sequences)
        depth = rows_of_depth.kept(parallel.recompute) + own_tokens(config) * 5 * residual_width(config) * e
        softmax = 4 * own_tokens(config) * padded_vocab / parallel.tensor_size
        kept += model.mtp_num_layers * (depth + softmax)
        logits = softmax + own_tokens(config) * padded_vocab / parallel.tensor_size * e
        if config.compute.loss == Loss.chunked:
            logits = chunked_loss_bytes(config, padded_vocab)
    pooled, workspace = _pooled_keys_bytes(config), kernel_workspace_bytes(config)
    recomputed = layer.recomputed(parallel.recompute)
    loss = max(logits, logits / (4 + e) * e + _output_gradient_bytes(config, padded_vocab)) if last else 0.0
    if last and config.compute.loss == Loss.chunked:
        loss = logits
    if last and stage == 0 and model.tie_embeddings:
        # The output layer's part of the gradient waits for that of the embedding.
        tied_gradient = e * padded_vocab * model.hidden_size / parallel.tensor_size
    in_layer = recomputed + max(_mlp_backward_bytes(config), _attention_bytes(config, pooled, workspace))
    in_layer = max(0.0, in_layer + tied_gradient - final)
    # torch's multi-tensor Adam has the square roots of the second moments all at once; fused ones have none.
    optimizer_step = 0.0 if config.cluster.device == Device.cuda else 4 * here / shards
    moments = {"loss": loss, "layer": in_layer, "optimizer": max(0.0, optimizer_step - kept - gathered)}
    moment = max(moments, key=lambda name: moments[name])
    fixed = (e * here, 4 * here, optimizer_bytes_per_parameter(config) * here / shards)
    return MemoryEstimate(
        weights_gib=fixed[0] / _GIB,
        grads_gib=fixed[1] / _GIB,
        optimizer_gib=fixed[2] / _GIB,
        activations_gib=kept / _GIB,
        gathered_kv_gib=gathered / _GIB,
        working_gib=moments[moment] / _GIB,
        total_gib=(sum(fixed) + kept + gathered + moments[moment]) / _GIB,
        logits_gib=logits / _GIB,
        recomputed_gib=recomputed / _GIB,
        pooled_keys_gib=pooled / _GIB,
        kernel_workspace_gib=workspace / _GIB,
        optimizer_step_gib=optimizer_step / _GIB,
        moment=moment,
        pipeline_stage=stage,
    )


def chunked_loss_bytes(config: TrainConfig, padded_vocab: int) -> float:
    """Return what a loss in chunks takes.

    That is the fp32 gradient of the output weight, the gradient of the hidden states, and the larger of the
    hidden states with a chunk's logits and their gradients, and of both gradients as they are handed on.
    """
    model, e, tokens = config.model, element_bytes(config), own_tokens(config)
    rows = padded_vocab / config.parallel.tensor_size
    hidden = e * tokens * model.hidden_size
    chunk = min(config.compute.loss_chunk_tokens, tokens) * rows * 2 * e
    handed_on = e * rows * model.hidden_size
    return 4 * rows * model.hidden_size + 2 * hidden + max(chunk, handed_on)


def kernel_workspace_bytes(config: TrainConfig) -> float:
    """Return what the backward pass of the attention kernels takes beyond its results.

    Fitted to the committed rows of an H100 (bf16, D = 128), where it is proportional to tokens and heads: a
    test holds it to them. The CPU reference works in chunks and is left out.
    """
    model, attention = config.model, config.attention
    tokens, group = own_tokens(config), model.num_query_heads / model.num_kv_heads
    kv_heads = model.num_kv_heads / config.parallel.tensor_size
    if attention.kind == AttentionKind.dense:
        # cuDNN: fp32 gradients of queries, and gradients of keys and values for every query head.
        return tokens * kv_heads * group * (8 * model.head_dim + 4)
    if attention.impl == KernelImpl.reference:
        return 0.0
    # Sums of init gradients are free again when the queries of each chosen block are put into their order.
    chunks = _init_sum_chunks(tokens, kv_heads, attention.init_tokens)
    windows = chunks * kv_heads * attention.init_tokens * 8 * model.head_dim
    windows += tokens * kv_heads * (6 + 20 * attention.train_topk)
    chosen = tokens * kv_heads * (24 + 28 * attention.train_topk)
    return tokens * kv_heads * 8 * group + max(windows, chosen)


def _init_sum_chunks(tokens: float, kv_heads: float, init_tokens: int) -> int:
    """Return into how many chunks the kernels cut the rows that they sum the gradients of init keys over."""
    chunk, programs = 2048, kv_heads * -(-init_tokens // 64)
    while chunk > 256 and -(-tokens // chunk) * programs < 256:
        chunk //= 2
    return int(-(-tokens // chunk))


def _pooled_keys_bytes(config: TrainConfig) -> float:
    """Return the pooled keys of all blocks of a micro-batch; gathering makes one copy more."""
    if config.attention.kind == AttentionKind.dense:
        return 0.0
    blocks = config.optim.micro_batch_sequences * config.data.seq_len_tokens // config.attention.block_tokens
    copies = 2 if config.parallel.context_size > 1 else 1
    return blocks * head_widths(config)[1] * element_bytes(config) * copies


def _mlp_backward_bytes(config: TrainConfig) -> float:
    """Return what the backward pass of an MLP needs at most beyond what its layer keeps.

    That is the gradient of the residual stream, and the largest of: gradients of the down projection, of the
    two factors of SwiGLU, and of the up projections when half of what the MLP kept is already free.
    """
    model, parallel, e, t = config.model, config.parallel, element_bytes(config), own_tokens(config)
    inner = t * e * model.ffn_hidden_size / parallel.tensor_size
    weight = e * model.hidden_size * model.ffn_hidden_size / parallel.tensor_size
    whole = t * e * model.hidden_size if parallel.sequence_parallel else 0.0  # gathered
    down = inner + weight + whole
    up = 2 * weight + whole + t * e * model.hidden_size - 3 * inner
    return t * e * residual_width(config) + max(down, 2 * inner, up)


def _attention_bytes(config: TrainConfig, pooled: float, workspace: float) -> float:
    """Return what attention needs at most beyond what its layer keeps, when the MLP holds nothing.

    In backward these are gradients and workspace, in forward pooled keys and what is being gathered.
    """
    model, parallel = config.model, config.parallel
    q, kv = head_widths(config)
    t, e, size = own_tokens(config), element_bytes(config), parallel.context_size
    # What does not travel to its place exists twice, in the order of processes and in that of tokens; so do
    # its gradients before they are scattered. Needed blocks exist as received and in slots, their gradients
    # once more as they are joined.
    all_kv = e * t * size * 2 * kv
    sparse = size > 1 and parallel.context_exchange != ContextExchange.all_gather
    again_forward, again_backward = (1.0, 2.0) if sparse else (copied_frac(config),) * 2
    residual = t * e * residual_width(config)
    backward = residual + e * t * 2 * q + all_kv * (1 + again_backward) + workspace
    forward = pooled + again_forward * all_kv
    of_mlp = t * e * 5 * model.ffn_hidden_size / parallel.tensor_size + 2 * residual
    return max(backward, forward) - of_mlp


def _output_gradient_bytes(config: TrainConfig, padded_vocab: int) -> float:
    """Return the gradient of the output weight before it is added to its fp32 sum, and of its input."""
    hidden = config.model.hidden_size
    weight = padded_vocab * hidden / config.parallel.tensor_size
    return element_bytes(config) * (weight + own_tokens(config) * hidden)
