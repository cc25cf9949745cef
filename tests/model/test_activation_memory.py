"""The memory formulas against a built model: parameters, and what autograd keeps in each recompute mode."""

from __future__ import annotations

import pytest

from phsa_megatron.config.activations import element_bytes, own_tokens
from phsa_megatron.config.derive import derive
from phsa_megatron.config.memory import stage_parameters
from phsa_megatron.config.schema import AttentionKind, Dtype, Elementwise, KernelImpl, Loss, Recompute
from phsa_megatron.model.factory import build_model

_GIB = 1 << 30


@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("recompute", list(Recompute))
@pytest.mark.parametrize("kind", list(AttentionKind))
@pytest.mark.parametrize("dtype", list(Dtype))
def test_activations_are_what_autograd_keeps(
    tiny_config, single_process_groups, micro_batch, forward, dtype, kind, recompute, rows, qk_norm
):
    config = tiny_config(
        run__dtype=dtype,
        attention__kind=kind,
        attention__impl=KernelImpl.triton,
        parallel__recompute=recompute,
        model__qk_norm=qk_norm,
        optim__micro_batch_sequences=rows,
        optim__global_batch_sequences=rows,
        run__train_steps=1,
        optim__lr=1e-3,
    )
    (model,) = build_model(config, single_process_groups)
    kept = forward(model, micro_batch([64 * i for i in range(rows + 1)], rows=rows), config).kept_bytes
    memory, tokens = derive(config).memory, own_tokens(config)
    softmax = memory.logits_gib * 4 / (4 + element_bytes(config))
    # Token ids, labels and their mask; with full recomputation the RoPE table, with selective its random
    # state.
    indices = 17 * tokens
    extra = {
        Recompute.none: 0,
        Recompute.selective: 2 * 4,
        Recompute.mlp: 0,
        Recompute.full: tokens * 8 * 4,
    }[recompute]
    assert kept == pytest.approx((memory.activations_gib + softmax) * _GIB + indices + extra, rel=1e-9)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("layers", [None, 1])
@pytest.mark.parametrize("kind", list(AttentionKind))
def test_activations_of_a_compiled_layer_and_a_chunked_loss(
    tiny_config, single_process_groups, micro_batch, forward, kind, layers, rows
):
    """What is compiled on a GPU runs as it is here, and keeps the same."""
    config = tiny_config(
        run__dtype=Dtype.bf16,
        attention__kind=kind,
        attention__impl=KernelImpl.triton,
        compute__loss=Loss.chunked,
        compute__loss_chunk_tokens=16,
        compute__elementwise=Elementwise.compiled,
        parallel__recompute=Recompute.none if layers is None else Recompute.full,
        parallel__recompute_layers=layers,
        optim__micro_batch_sequences=rows,
        optim__global_batch_sequences=rows,
        run__train_steps=1,
        optim__lr=1e-3,
    )
    (model,) = build_model(config, single_process_groups)
    kept = forward(model, micro_batch([64 * i for i in range(rows + 1)], rows=rows), config).kept_bytes
    memory, tokens, hidden = derive(config).memory, own_tokens(config), config.model.hidden_size
    gradients = 4 * 112 * hidden + 2 * tokens * hidden
    # Cosines and sines once for all layers, and the angles that the recomputed layer starts from.
    table = tokens * (8 // 2) * 4 * 2 + (0 if layers is None else tokens * 8 * 4)
    # The mask in the order of the hidden states, and token ids.
    indices = (4 + 8) * tokens
    assert kept == pytest.approx(memory.activations_gib * _GIB + gradients + table + indices, rel=1e-9)


@pytest.mark.parametrize("kind", list(AttentionKind))
def test_rows_of_a_prediction_depth_are_not_joined(
    tiny_config, single_process_groups, micro_batch, forward, kind
):
    def more_of_two_rows(**changes):
        """What two rows keep beyond twice what one does: counted, and kept."""
        counted, kept = [], []
        for rows in (1, 2):
            config = tiny_config(
                attention__kind=kind,
                attention__impl=KernelImpl.triton,
                optim__micro_batch_sequences=rows,
                optim__global_batch_sequences=rows,
                run__train_steps=1,
                optim__lr=1e-3,
                **changes,
            )
            (model,) = build_model(config, single_process_groups)
            batch = micro_batch([64 * i for i in range(rows + 1)], rows=rows)
            kept.append(forward(model, batch, config).kept_bytes)
            counted.append(derive(config).memory.activations_gib * _GIB)
        return counted[1] - 2 * counted[0], kept[1] - 2 * kept[0]

    assert more_of_two_rows() == pytest.approx((0, 0), abs=1e-3)
    counted, kept = more_of_two_rows(model__mtp_num_layers=1)
    assert counted == pytest.approx(kept, rel=0.05) and counted > 0


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("mtp", [0, 2])
def test_parameters_are_those_of_the_built_model(tiny_config, single_process_groups, tied, mtp):
    config = tiny_config(
        model__tie_embeddings=tied,
        model__mtp_num_layers=mtp,
        optim__micro_batch_sequences=1,
        optim__global_batch_sequences=1,
        run__train_steps=1,
        optim__lr=1e-3,
    )
    (model,) = build_model(config, single_process_groups)
    built = sum(parameter.numel() for parameter in model.parameters())
    derived = derive(config)
    assert derived.parameters.total == built
    assert stage_parameters(config, derived.parameters, derived.padded_vocab_size, 0) == built
    memory = derived.memory
    assert memory.weights_gib * _GIB == memory.grads_gib * _GIB == 4 * built
