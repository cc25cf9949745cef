"""What a layer keeps for its backward pass, in bytes on one device, tensor by tensor.

Counted for megatron's local layers without fused kernels (`model/transformer_config.py`); a test compares the
sums with the tensors that autograd really saves. Letters: t tokens of a micro-batch on this process, h hidden
size, f SwiGLU width, q and kv the widths of all query and key-value heads on this tensor-parallel process, e
bytes an element, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass

from phsa_megatron.config.flops import is_dense
from phsa_megatron.config.schema import AttentionKind, Dtype, Elementwise, KernelImpl, Recompute, TrainConfig


@dataclass(frozen=True)
class LayerActivations:
    """Bytes that one layer and micro-batch keep without recomputation, and what each mode keeps of them.

    Attributes:
        outside: norms, projections, RoPE tables and the MLP: recomputed with the whole layer only.
        core_inputs: queries, keys and values of the core attention after RoPE.
        core: what the core attention alone keeps: output, log-sum-exp, chosen blocks and their unions.
        mlp: of `outside`, what the MLP keeps beyond its input.
        gathered_kv: keys and values of all context-parallel processes; 0 without context parallelism.
        layer_input: the residual stream that enters the layer.
    """

    outside: float
    core_inputs: float
    core: float
    mlp: float
    gathered_kv: float
    layer_input: float

    @property
    def everything(self) -> float:
        """Return what a layer keeps if nothing is recomputed, without the gathered keys and values."""
        return self.outside + self.core_inputs + self.core

    def kept(self, recompute: Recompute) -> float:
        """Return what stays from forward to backward, without the gathered keys and values."""
        match recompute:
            case Recompute.none:
                return self.everything
            case Recompute.selective:
                return self.outside + self.core_inputs
            case Recompute.mlp:
                return self.everything - self.mlp
            case Recompute.full:
                return self.layer_input

    def kept_by(self, layers: float, recompute: Recompute, recompute_layers: float | None) -> float:
        """Return what so many layers keep, the first `recompute_layers` being recomputed; None is all."""
        if recompute_layers is None:
            return layers * self.kept(recompute)
        again = min(layers, recompute_layers)
        return again * self.kept(recompute) + (layers - again) * self.everything

    def recomputed(self, recompute: Recompute) -> float:
        """Return what the backward pass of one layer makes again before it starts."""
        match recompute:
            case Recompute.none:
                return 0.0
            case Recompute.selective:
                return self.core + self.gathered_kv
            case Recompute.mlp:
                return self.mlp
            case Recompute.full:
                return self.everything + self.gathered_kv


def element_bytes(config: TrainConfig) -> int:
    """Return the bytes of a weight or an activation."""
    return 2 if config.run.dtype == Dtype.bf16 else 4


def own_tokens(config: TrainConfig) -> int:
    """Return the tokens of a micro-batch that one process holds (t)."""
    return config.optim.micro_batch_sequences * config.data.seq_len_tokens // config.parallel.context_size


def joins_rows(config: TrainConfig) -> bool:
    """Return whether all rows of a micro-batch are one row inside the layers (`model/joined_rows.py`).

    A process then has whole rows between layers: with CP, and with SP, it has parts of all of them.
    """
    return config.parallel.context_size == 1 and not config.parallel.sequence_parallel


def rows_apart(config: TrainConfig) -> int:
    """Return the rows that a layer sees of a micro-batch."""
    return 1 if joins_rows(config) else config.optim.micro_batch_sequences


def head_widths(config: TrainConfig) -> tuple[float, float]:
    """Return (q, kv): the channels of all query and of all key heads on one tensor-parallel process."""
    model, tensor_size = config.model, config.parallel.tensor_size
    return (
        model.num_query_heads * model.head_dim / tensor_size,
        model.num_kv_heads * model.head_dim / tensor_size,
    )


def residual_width(config: TrainConfig) -> float:
    """Return the channels of the residual stream on one process: h, or its part with sequence parallelism."""
    parallel = config.parallel
    return config.model.hidden_size / (parallel.tensor_size if parallel.sequence_parallel else 1)


def layer_activations(config: TrainConfig, rows: int | None = None) -> LayerActivations:
    """Return what one layer of this run keeps for one micro-batch.

    `rows` is how many it sees of it: all in the layer of a prediction depth, where none are joined; None is
    `rows_apart`, what a layer of the main stack sees.
    """
    model, parallel = config.model, config.parallel
    e, t = element_bytes(config), own_tokens(config)
    q, kv = head_widths(config)
    heads = (model.num_query_heads + model.num_kv_heads) / parallel.tensor_size
    residual = residual_width(config)
    rows = rows_apart(config) if rows is None else rows
    many_rows = rows > 1
    context = parallel.context_size > 1
    # Inputs of both norms and of the two products after them; a norm keeps one fp32 a row besides.
    outside = t * (4 * residual * e + 2 * 4 * residual / model.hidden_size)
    # The product's output holds queries, keys and values; a view of it (values, or the input of the norm of
    # keys) keeps it whole.
    selective = parallel.recompute == Recompute.selective
    values_are_views = selective or not (many_rows or context)
    if model.qk_norm or values_are_views:
        outside += t * e * (q + 2 * kv)
    if model.qk_norm:
        # The queries before their norm are a copy, unless they lie in one piece.
        one_piece = model.num_kv_heads == parallel.tensor_size or model.num_query_heads == model.num_kv_heads
        outside += t * ((0 if one_piece else q * e) + 4 * heads)
    compiled = config.compute.elementwise == Elementwise.compiled
    if not compiled:  # a compiled RoPE keeps cosines and sines that all layers share
        outside += t / rows * 4 * model.head_dim * e  # of q and of k
    outside += t * e * q  # the input of the output projection
    # Gate and up, and their product; unfused also silu of the gate, and up once more.
    mlp = t * e * (3 if compiled else 5) * model.ffn_hidden_size / parallel.tensor_size
    outside += mlp
    # Under context parallelism the core attention reads the gathered keys and values. Selective
    # recomputation keeps its inputs, which are then the process's own.
    own_keys = kv if selective or not context else 0
    own_values = kv if many_rows and not selective and not context else 0
    inputs = t * e * (q + own_keys + own_values)
    gathered = t * parallel.context_size * e * 2 * kv if context else 0.0
    core = _core_bytes(config, t, q, e, rows)
    return LayerActivations(outside, inputs, core, mlp, gathered, t * residual * e)


def _core_bytes(config: TrainConfig, t: int, q: float, e: int, rows: int) -> float:
    model, attention, tensor_size = config.model, config.attention, config.parallel.tensor_size
    length = config.data.seq_len_tokens
    lse = 4 * model.num_query_heads / tensor_size
    if attention.kind == AttentionKind.dense:
        # The output of one row is a view of what the projection reads; of several, and of the pieces that
        # context parallelism makes, it is put together anew.
        pieces = rows > 1 or config.parallel.context_size > 1
        return t * ((q * e if pieces else 0) + lse)
    if attention.impl == KernelImpl.reference:
        # fp32 scores and probabilities of what is attended to or masked: rough, and too much for long texts.
        pairs = 0.0 if is_dense(length, attention) else (length + 1) / 2
        return 2 * 4 * model.num_query_heads / tensor_size * t * pairs
    # With one row the output is itself the input of the projection. Chosen blocks take 4 bytes each, and the
    # union of a tile's choices its first token and one or two words of bits; rows are six int32.
    out = q * e if rows > 1 else 0
    words = 2 if model.num_query_heads == model.num_kv_heads else 1
    choices = model.num_kv_heads / tensor_size * 4 * attention.train_topk * (2 + words)
    return t * (out + lse + choices + 6 * 4)
