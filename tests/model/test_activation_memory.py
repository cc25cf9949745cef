"""The memory formulas against a built model: parameters, and what autograd keeps in each recompute mode."""

from __future__ import annotations

import pytest
import torch

from phsa_megatron.attention import core_attention
from phsa_megatron.config.activations import element_bytes, own_tokens
from phsa_megatron.config.derive import derive
from phsa_megatron.config.memory import stage_parameters
from phsa_megatron.config.schema import AttentionKind, Dtype, KernelImpl, Recompute
from phsa_megatron.model.factory import build_model
from phsa_megatron.model.norm import RMSNorm

_GIB = 1 << 30


class _KeepsItsInput(torch.autograd.Function):
    """Keeps what torch's RMSNorm keeps on a GPU: its input and one fp32 a row. On a CPU it is a chain of
    operations, which keep more."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x, torch.ones(x.shape[:-1]))
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad


class _KeepsWhatTheKernelsKeep(torch.autograd.Function):
    """Keeps tensors of the shapes that `phsa_kernels.ops._save` keeps (`attend/launch.py:saved_shapes`)."""

    @staticmethod
    def forward(ctx, q, k, v, topk):
        num_tokens, num_kv_heads = len(q), k.shape[1]
        out, lse = torch.zeros_like(q), torch.zeros(num_tokens, q.shape[1])
        ids = torch.zeros(num_tokens, num_kv_heads, topk, dtype=torch.int32)
        rows = torch.zeros(6, num_tokens, dtype=torch.int32)
        union = torch.zeros(num_tokens * num_kv_heads * topk * 2, dtype=torch.int32)
        ctx.save_for_backward(q, k, v, ids, out, lse, rows, union)
        return out

    @staticmethod
    def backward(ctx, grad):
        return grad, None, None, None


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(RMSNorm, "forward", lambda self, x: _KeepsItsInput.apply(x))

    def attention(q, k, v, *_, topk, **__):
        return _KeepsWhatTheKernelsKeep.apply(q, k, v, topk), None, None

    monkeypatch.setattr(core_attention, "phsa_attention", attention)


def saved_bytes(model, batch, config) -> int:
    """Bytes of all storages that the forward pass keeps for the backward pass, weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor):
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(
            batch.tokens,
            batch.positions,
            None,
            labels=batch.tokens,
            loss_mask=torch.ones(batch.tokens.shape),
            packed_seq_params=batch.side_info(config),
        )
    return sum(t.untyped_storage().nbytes() for p, t in kept.items() if p not in weights)


@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("recompute", list(Recompute))
@pytest.mark.parametrize("kind", list(AttentionKind))
@pytest.mark.parametrize("dtype", list(Dtype))
def test_activations_are_what_autograd_keeps(
    tiny_config, single_process_groups, micro_batch, as_on_a_gpu, dtype, kind, recompute, rows, qk_norm
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
    kept = saved_bytes(model, micro_batch([64 * i for i in range(rows + 1)], rows=rows), config)
    memory, tokens = derive(config).memory, own_tokens(config)
    softmax = memory.logits_gib * 4 / (4 + element_bytes(config))
    # Token ids, labels and their mask; with full recomputation the RoPE table, with selective its random
    # state.
    indices = 17 * tokens
    extra = {Recompute.none: 0, Recompute.selective: 2 * 4, Recompute.full: 64 * 8 * 4}[recompute]
    assert kept == pytest.approx((memory.activations_gib + softmax) * _GIB + indices + extra, rel=1e-9)


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
