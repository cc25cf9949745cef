"""The bytes that one GPU sends in a step, by kind, for the GPU that sends most.

As in `config/context_volume.py`, what counts is what has to reach other GPUs: a gather of n members sends a
part of 1/n to n - 1 others, a reduce-scatter sends n - 1 parts, an all-reduce does both.
"""

from __future__ import annotations

from dataclasses import dataclass

from phsa_megatron.config.activations import element_bytes, own_tokens
from phsa_megatron.config.context_volume import context_volume
from phsa_megatron.config.derive import data_parallel_size, micro_batches_per_step
from phsa_megatron.config.flops import ParameterCount
from phsa_megatron.config.memory import stage_parameters
from phsa_megatron.config.schema import Loss, Recompute, TrainConfig


@dataclass(frozen=True)
class Traffic:
    """One kind of communication of one GPU.

    Attributes:
        name: what is sent.
        step_bytes: bytes sent in a step.
        messages: collectives or sends of a step.
        size: members of the group.
        stride: distance of their ranks.
    """

    name: str
    step_bytes: float
    messages: float
    size: int
    stride: int


@dataclass(frozen=True)
class Communication:
    """All kinds; zero bytes where the layout needs none.

    Attributes:
        tensor: activations between tensor-parallel processes, with sequence parallelism or without.
        context_keys: chunk starts and pooled keys, which the selection waits for.
        context_kv: keys and values, sent beside the selection.
        context_gradients: gradients of keys and values.
        pipeline: activations and their gradients between stages.
        gradients: gradient sums between model copies (data- and context-parallel processes).
        weights: updated weights from their shards.
        embedding: gradients of an embedding that first and last stage share.
    """

    tensor: Traffic
    context_keys: Traffic
    context_kv: Traffic
    context_gradients: Traffic
    pipeline: Traffic
    gradients: Traffic
    weights: Traffic
    embedding: Traffic

    def all(self) -> list[Traffic]:
        """Return every kind."""
        return list(vars(self).values())

    @property
    def step_bytes(self) -> float:
        """Return the bytes of all kinds."""
        return sum(traffic.step_bytes for traffic in self.all())


def communication(config: TrainConfig, parameters: ParameterCount, padded_vocab: int) -> Communication:
    """Return what one GPU of this run sends in a step."""
    parallel = config.parallel
    tensor, context, data = parallel.tensor_size, parallel.context_size, data_parallel_size(config)
    stages, micro_batches, e = parallel.pipeline_size, micro_batches_per_step(config), element_bytes(config)
    layers = (config.model.num_layers / stages + config.model.mtp_num_layers) * micro_batches
    recomputes = recomputes_attention(config)
    volume = context_volume(config)
    in_context = (context, tensor)
    keys = volume.forward_bytes - volume.keys_and_values_bytes
    runs = layers * (1 + recomputes)
    copies = data * context
    # The last stage is the fullest but for an embedding at the first: count what both may hold.
    here = max(stage_parameters(config, parameters, padded_vocab, stage) for stage in (0, stages - 1))
    part = (copies - 1) / copies
    sharded = parallel.distributed_optimizer
    across = (copies, tensor)
    shared = stages > 1 and config.model.tie_embeddings
    embedding = padded_vocab * config.model.hidden_size / tensor
    return Communication(
        tensor=_tensor(config, layers, micro_batches),
        context_keys=Traffic("pooled keys", runs * keys, runs * 2 * bool(keys), *in_context),
        context_kv=Traffic(
            "keys and values", runs * volume.keys_and_values_bytes, runs * (context > 1), *in_context
        ),
        context_gradients=Traffic(
            "gradients of keys and values",
            layers * volume.gradient_bytes,
            layers * (context > 1),
            *in_context,
        ),
        pipeline=_pipeline(config, micro_batches, tensor * context * data),
        gradients=Traffic("gradients", (1 if sharded else 2) * 4 * here * part, float(copies > 1), *across),
        weights=Traffic(
            "weights", e * here * part if sharded else 0.0, float(sharded and copies > 1), *across
        ),
        embedding=Traffic(
            "shared embedding", 4.0 * embedding * shared, float(shared), 2, tensor * context * data
        ),
    )


def recomputes_attention(config: TrainConfig) -> bool:
    """Return whether the backward pass computes attention again, and sends again what it needs for that."""
    return config.parallel.recompute in (Recompute.selective, Recompute.full)


def residual_bytes(config: TrainConfig) -> int:
    """Return the bytes of a micro-batch's residual stream on one context-parallel process."""
    return own_tokens(config) * config.model.hidden_size * element_bytes(config)


def tensor_units(config: TrainConfig) -> tuple[int, int]:
    """Return (forward, backward): gathers and reduce-scatters of the residual stream in a layer.

    With sequence parallelism a layer gathers before its two column-parallel products and reduce-scatters
    after its two row-parallel ones; backward undoes the four and gathers the inputs of the former two once
    more. Without it, each of the two all-reduces forward and backward counts as one of each.
    """
    return (4, 6) if config.parallel.sequence_parallel else (4, 4)


def _tensor(config: TrainConfig, layers: float, micro_batches: int) -> Traffic:
    size = config.parallel.tensor_size
    forward, backward = tensor_units(config)
    if size == 1:
        return Traffic("activations (tensor)", 0.0, 0.0, 1, 1)
    # Recomputing the MLP alone repeats half of what a layer sends forward.
    again = {Recompute.full: 1.0, Recompute.mlp: 0.5}.get(config.parallel.recompute, 0.0)
    passes = forward * (1 + again) + backward
    sharded = config.parallel.sequence_parallel
    # The output layer's stage sends more than the embedding's; one stage has both.
    chunked = config.compute.loss == Loss.chunked  # makes the weight's gradient in the forward pass
    output, embedding = (3 if sharded and not chunked else 2, 2)
    ends = (output + (embedding if config.parallel.pipeline_size == 1 else 0)) * micro_batches
    units = layers * passes + ends
    # The softmax of the loss sums three fp32 numbers a token.
    losses = 3 * micro_batches * (1 + config.model.mtp_num_layers)
    num_bytes = units * residual_bytes(config) + losses * 2 * 4 * own_tokens(config)
    if chunked:  # the largest logit, then both sums at once, of every chunk
        chunks = -(-own_tokens(config) // config.compute.loss_chunk_tokens)
        messages = units / (1 if sharded else 2) + 2 * chunks * micro_batches
    else:
        messages = units / (1 if sharded else 2) + losses
    return Traffic("activations (tensor)", num_bytes * (size - 1) / size, messages, size, 1)


def _pipeline(config: TrainConfig, micro_batches: int, stride: int) -> Traffic:
    """Return a middle stage's sends: its output forward and its input's gradient backward, of every chunk."""
    parallel = config.parallel
    if parallel.pipeline_size == 1:
        return Traffic("activations (pipeline)", 0.0, 0.0, 1, stride)
    sends = 2 * micro_batches * (parallel.virtual_pipeline_size or 1)
    parts = parallel.tensor_size if parallel.sequence_parallel else 1
    return Traffic("activations (pipeline)", sends * residual_bytes(config) / parts, sends, 2, stride)
