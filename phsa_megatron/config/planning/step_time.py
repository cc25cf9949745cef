"""The time of a training step: what computes, what waits for the network, and what the pipeline leaves idle.

All stages are taken to be as slow as the slowest, which holds the output layer. What hides what is in
`_exposed`; everything else runs one after the other.
"""

from __future__ import annotations

from dataclasses import dataclass

from phsa_megatron.config.activations import element_bytes, head_widths, own_tokens, residual_width
from phsa_megatron.config.derive import data_parallel_size, micro_batches_per_step
from phsa_megatron.config.flops import ParameterCount, expert_weights, layer_product_weights
from phsa_megatron.config.memory import stage_parameters
from phsa_megatron.config.planning.attention_time import AttentionTime, table
from phsa_megatron.config.planning.communication import (
    Communication,
    Traffic,
    communication,
    recomputes_attention,
)
from phsa_megatron.config.planning.context_time import process_attention
from phsa_megatron.config.planning.machine import Machine
from phsa_megatron.config.schema import (
    AttentionKind,
    ContextExchange,
    Elementwise,
    Loss,
    Recompute,
    TrainConfig,
)


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step by what takes them; they add up to `step_s`.

    Attributes:
        products_s: matrix products outside of attention.
        attention_s: pooling, selection and attention, and copies of keys under context parallelism.
        elementwise_s: norms, RoPE, SwiGLU, residuals, softmax of the loss.
        recompute_s: what is computed a second time.
        host_s: waiting for Python where a layer is smaller than its launches.
        tensor_s: exposed communication between tensor-parallel processes.
        context_s: exposed communication between context-parallel processes.
        pipeline_s: sends between stages.
        data_s: exposed gradients and weights between model copies.
        bubble_s: stages that wait for their first or after their last micro-batch.
        optimizer_s: the optimizer's step.
        step_s: the sum.
    """

    products_s: float
    attention_s: float
    elementwise_s: float
    recompute_s: float
    host_s: float
    tensor_s: float
    context_s: float
    pipeline_s: float
    data_s: float
    bubble_s: float
    optimizer_s: float
    step_s: float

    def shares(self) -> dict[str, float]:
        """Return the part of the step that each takes, the largest first."""
        parts = {name.removesuffix("_s"): value for name, value in vars(self).items() if name != "step_s"}
        ordered = sorted(parts.items(), key=lambda item: -item[1])
        return {name: value / self.step_s for name, value in ordered}


@dataclass(frozen=True)
class _Pass:
    """Seconds of one direction of one layer and micro-batch."""

    products: float
    attention: float
    elementwise: float
    host: float

    @property
    def total(self) -> float:
        return max(self.products + self.attention + self.elementwise, self.host)

    @property
    def waiting(self) -> float:
        return max(0.0, self.host - self.products - self.attention - self.elementwise)


def step_time(
    config: TrainConfig,
    machine: Machine,
    parameters: ParameterCount,
    padded_vocab: int,
    document_tokens: float | None = None,
) -> StepTime:
    """Return the predicted time of a step of this run; `document_tokens` as in `attention_time`."""
    parallel, micro_batches = config.parallel, micro_batches_per_step(config)
    attention = process_attention(config, machine, document_tokens=document_tokens)
    sent = communication(config, parameters, padded_vocab)
    forward, backward = (
        _layer(config, machine, attention, backward=False),
        _layer(config, machine, attention, backward=True),
    )
    layers = config.model.num_layers / parallel.pipeline_size + config.model.mtp_num_layers
    again = _recomputed(config, machine, forward, attention)
    ends_products, ends_elementwise = _loss(config, machine, padded_vocab)
    # Gradients of weights are added to their fp32 sums after each backward pass.
    here = _fullest_stage(config, parameters, padded_vocab)
    ends_elementwise += machine.copy_s((8 + element_bytes(config)) * here)
    exposed = _exposed(config, machine, sent, attention, layers, forward.total, backward.total)
    per_micro_batch = {
        "products_s": layers * (forward.products + backward.products) + ends_products,
        "attention_s": layers * (forward.attention + backward.attention),
        "elementwise_s": layers * (forward.elementwise + backward.elementwise) + ends_elementwise,
        "recompute_s": layers * again,
        "host_s": layers * (forward.waiting + backward.waiting),
        "tensor_s": exposed["tensor_s"] / micro_batches,
        "context_s": exposed["context_s"] / micro_batches,
        "pipeline_s": exposed["pipeline_s"] / micro_batches,
    }
    idle = (parallel.pipeline_size - 1) / (parallel.virtual_pipeline_size or 1)
    parts = {name: micro_batches * value for name, value in per_micro_batch.items()}
    parts["data_s"] = exposed["data_s"]
    parts["bubble_s"] = idle * sum(per_micro_batch.values())
    parts["optimizer_s"] = _optimizer(config, machine, parameters, padded_vocab)
    return StepTime(**parts, step_s=sum(parts.values()))


def _layer(config: TrainConfig, machine: Machine, attention: AttentionTime, *, backward: bool) -> _Pass:
    model, parallel, e, t = config.model, config.parallel, element_bytes(config), own_tokens(config)
    products = 2 * layer_product_weights(model) / parallel.tensor_size * t / machine.flop_per_s
    q, kv = head_widths(config)
    # Passes over channels, reads and writes: two norms and two residual sums; the copy of queries, norms of
    # heads, and RoPE, in its unfused parts or in one; SwiGLU likewise.
    rope = 2 if config.compute.elementwise == Elementwise.compiled else 9
    channels = 10 * residual_width(config) + 2 * q + (2 + rope) * (q + kv)
    channels += _swiglu_passes(config) * model.ffn_hidden_size / parallel.tensor_size
    elementwise = machine.copy_s(t * e * channels)
    dense = config.attention.kind == AttentionKind.dense
    eager = {"fwd": 0.0, "fwd_bwd": 0.0} if dense else table().eager_ms
    if not backward:
        host = (eager["fwd"] + machine.host_layer_ms.value) / 1e3
        return _Pass(products, attention.forward_ms / 1e3, elementwise, host)
    host = (eager["fwd_bwd"] - eager["fwd"] + 2 * machine.host_layer_ms.value) / 1e3
    return _Pass(2 * products, attention.backward_ms / 1e3, 2 * elementwise, host)


def _mlp_forward(config: TrainConfig, machine: Machine) -> float:
    model, tensor_size, t = config.model, config.parallel.tensor_size, own_tokens(config)
    experts = model.expert_topk if model.num_experts else 1
    products = 2 * experts * expert_weights(model) / tensor_size * t / machine.flop_per_s
    channels = _swiglu_passes(config) * model.ffn_hidden_size / tensor_size
    return products + machine.copy_s(t * element_bytes(config) * channels)


def _swiglu_passes(config: TrainConfig) -> int:
    """Return reads and writes of SwiGLU's inner width: gate and up, and their product."""
    return 3 if config.compute.elementwise == Elementwise.compiled else 7


def _recomputed(config: TrainConfig, machine: Machine, forward: _Pass, attention: AttentionTime) -> float:
    """Return the seconds of a layer and micro-batch that are computed a second time."""
    parallel = config.parallel
    match parallel.recompute:
        case Recompute.none:
            return 0.0
        case Recompute.selective:
            return attention.forward_ms / 1e3
        case Recompute.mlp:
            return _mlp_forward(config, machine)
        case Recompute.full:
            share = 1.0
            if parallel.recompute_layers is not None:
                chunks = parallel.pipeline_size * (parallel.virtual_pipeline_size or 1)
                share = parallel.recompute_layers * chunks / config.model.num_layers
            return share * forward.total


def _loss(config: TrainConfig, machine: Machine, padded_vocab: int) -> tuple[float, float]:
    """Return the seconds of a micro-batch's output layer and softmax, forward and backward."""
    outputs = own_tokens(config) * padded_vocab / config.parallel.tensor_size
    outputs *= 1 + config.model.mtp_num_layers
    products = 3 * 2 * outputs * config.model.hidden_size / machine.flop_per_s
    if config.compute.loss == Loss.chunked:
        # Two reads for the softmax, a read and a write for its gradient; each chunk adds to the fp32 sum.
        chunks = -(-own_tokens(config) // config.compute.loss_chunk_tokens)
        sums = chunks * 8 * padded_vocab / config.parallel.tensor_size * config.model.hidden_size
        return products, machine.copy_s(outputs * 4 * element_bytes(config) + sums)
    # Reads and writes of a logit in the unfused softmax: to fp32, largest, difference, exponential, sum,
    # quotient, and backward the scaling and the way back to the run's dtype.
    return products, machine.copy_s(outputs * (44 + 4 * element_bytes(config)))


def _optimizer(config: TrainConfig, machine: Machine, parameters: ParameterCount, padded_vocab: int) -> float:
    """Return the seconds of clearing gradients, their norm and clipping, and Adam on the fp32 shard.

    Bytes an element: norm 4, clipping 8, Adam reads weight, gradient and moments and writes all but the
    gradient in one pass, 28, and the copy to the run's dtype takes 6.
    """
    here = _fullest_stage(config, parameters, padded_vocab)
    sharded = config.parallel.distributed_optimizer
    shards = data_parallel_size(config) * config.parallel.context_size if sharded else 1
    return machine.copy_s(4 * here + 46 * here / shards)


def _fullest_stage(config: TrainConfig, parameters: ParameterCount, padded_vocab: int) -> float:
    """Return the parameters of the process that holds most."""
    stages = (0, config.parallel.pipeline_size - 1)
    return max(stage_parameters(config, parameters, padded_vocab, stage) for stage in stages)


def _seconds(machine: Machine, traffic: Traffic) -> float:
    if traffic.size == 1 or not traffic.step_bytes:
        return 0.0
    sending = traffic.step_bytes / machine.bytes_per_s(traffic.size, traffic.stride)
    return sending + traffic.messages * machine.latency_s(traffic.size, traffic.stride)


def _exposed(
    config: TrainConfig,
    machine: Machine,
    sent: Communication,
    attention: AttentionTime,
    layers: float,
    layer_forward_s: float,
    layer_backward_s: float,
) -> dict[str, float]:
    """Return the seconds of a step in which a GPU waits for the network.

    Tensor-parallel communication and everything that selection or a product needs at once is exposed. Keys
    and values arrive while the selection computes, if all are gathered. With overlap, gradients leave during
    the last backward pass and weights arrive during the first forward pass, but for one layer's. Virtual
    stages hide what is sent between stages, not the start of each send.
    """
    parallel = config.parallel
    runs = layers * micro_batches_per_step(config) * (2 if recomputes_attention(config) else 1)
    # Blocks that are needed are known, and sent, after selection.
    hides = parallel.context_exchange == ContextExchange.all_gather
    hidden_s = runs * attention.select_ms / 1e3 if hides else 0.0
    keys_and_values = max(0.0, _seconds(machine, sent.context_kv) - hidden_s)
    gradients, weights = _seconds(machine, sent.gradients), _seconds(machine, sent.weights)
    if parallel.overlap_grad_reduce:
        gradients = max(gradients / layers, gradients - layers * layer_backward_s)
    if parallel.overlap_param_gather:
        weights = max(weights / layers, weights - layers * layer_forward_s)
    pipeline = _seconds(machine, sent.pipeline)
    if parallel.virtual_pipeline_size is not None:
        pipeline = sent.pipeline.messages * machine.latency_s(sent.pipeline.size, sent.pipeline.stride)
    return {
        "tensor_s": _seconds(machine, sent.tensor),
        "context_s": _seconds(machine, sent.context_keys)
        + keys_and_values
        + _seconds(machine, sent.context_gradients),
        "pipeline_s": pipeline,
        "data_s": gradients + weights + _seconds(machine, sent.embedding),
    }
