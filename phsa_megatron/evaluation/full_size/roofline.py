"""The least that the parts of a training step can take on one GPU, by the same names as the profile's."""

from __future__ import annotations

from phsa_megatron.config.activations import element_bytes
from phsa_megatron.config.derive import derive
from phsa_megatron.config.flops import dense_layer_train_flops, layer_train_flops, linear_flops
from phsa_megatron.config.schema import AttentionKind, TrainConfig
from phsa_megatron.evaluation.full_size.rows import PEAK_TFLOPS

BYTES_PER_S = 3.35e12
"""An H100's memory."""
_OPTIMIZER_BYTES = 34
"""Of a parameter: gradient read 4, weight and two moments read and written 24, bf16 weight written 2, and the
gradient read once more for its norm, 4."""


def least_ms(config: TrainConfig) -> dict[str, float]:
    """Return milliseconds of a step by kind: FLOPs at peak speed, or bytes that must be moved, at full speed.

    One document a sequence, no recomputation. Forward and backward: a norm reads and writes its input, and
    reads it and a gradient to write one; RoPE reads and writes queries and keys in both; SwiGLU reads two
    inner widths and writes one, and reads those two and a gradient to write two; the loss reads logits twice
    and writes their gradient. What a kernel next to it could do on the way (copies, sums) needs nothing.
    """
    model, attention = config.model, config.attention
    derived, e = derive(config), element_bytes(config)
    tokens, length = derived.tokens_per_step, config.data.seq_len_tokens
    flop_per_ms, bytes_per_ms = PEAK_TFLOPS * 1e9, BYTES_PER_S / 1e3
    heads = (model.num_query_heads + model.num_kv_heads) * model.head_dim
    layers, sequences = model.num_layers, tokens // length
    if attention.kind == AttentionKind.dense:
        of_layer = dense_layer_train_flops(length, model)
    else:
        of_layer = layer_train_flops(length, model, attention, attention.train_topk)
    channels = {
        "norms": layers * 5 * (2 * model.hidden_size + (heads if model.qk_norm else 0))
        + 5 * model.hidden_size,
        "RoPE": layers * 4 * heads,
        "SwiGLU": layers * 8 * model.ffn_hidden_size,
        "cross-entropy": 3 * model.vocab_size,
    }
    return {
        "linear layers": 3 * linear_flops(tokens, derived.parameters) / flop_per_ms,
        "attention": sequences * layers * of_layer / flop_per_ms,
        **{kind: tokens * number * e / bytes_per_ms for kind, number in channels.items()},
        "optimizer": derived.parameters.total * _OPTIMIZER_BYTES / bytes_per_ms,
    }
