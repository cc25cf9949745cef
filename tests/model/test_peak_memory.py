"""The fullest moment of a forward and a backward pass against the estimate, with all temporaries."""

from __future__ import annotations

import importlib
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from phsa_megatron.config.derive import derive
from phsa_megatron.config.schema import Dtype, KernelImpl, Recompute
from phsa_megatron.model.factory import build_model
from phsa_megatron.training.optimizer import build_parts

_GIB = 1 << 30
_SEQ_LEN_TOKENS = 512


class LiveBytes(TorchDispatchMode):
    """Follows every storage from the operation that makes it to its end.

    Attributes:
        peak_bytes: the most that lived at once, weights left out.
    """

    def __init__(self, known):
        super().__init__()
        self.peak_bytes, self._now = 0, 0
        self._known = {p.untyped_storage()._cdata for p in known}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._follow(tensor.untyped_storage())
        self.peak_bytes = max(self.peak_bytes, self._now)
        return result

    def _follow(self, storage):
        key, num_bytes = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self._now += num_bytes

        def gone():
            self._known.discard(key)
            self._now -= num_bytes

        weakref.finalize(storage, gone)


SHAPES = {
    "wide MLP": {"model__ffn_hidden_size": 768, "model__vocab_size": 128},
    "many heads": {"model__ffn_hidden_size": 32, "model__vocab_size": 128},
    "large vocabulary": {"model__ffn_hidden_size": 768, "model__vocab_size": 8192},
}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("recompute", list(Recompute))
@pytest.mark.parametrize("shape", SHAPES)
def test_the_fullest_moment_is_as_full_as_estimated(
    tiny_config, single_process_groups, micro_batch, as_on_a_gpu, shape, recompute, tied
):
    config = tiny_config(
        run__dtype=Dtype.bf16,
        attention__impl=KernelImpl.triton,
        parallel__recompute=recompute,
        model__tie_embeddings=tied,
        model__num_layers=4,
        model__hidden_size=256,
        model__num_query_heads=16,
        model__num_kv_heads=4,
        model__head_dim=32,
        data__seq_len_tokens=_SEQ_LEN_TOKENS,
        optim__micro_batch_sequences=1,
        # Of eight copies, so that the optimizer's step is small beside what is measured here.
        cluster__processes_per_node=8,
        optim__global_batch_sequences=8,
        run__train_steps=1,
        optim__lr=1e-3,
        **SHAPES[shape],
    )
    (model,) = build_model(config, single_process_groups)
    for parameter in model.parameters():  # as megatron's hook does after adding it to the sums
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    batch = micro_batch([0, _SEQ_LEN_TOKENS])
    with LiveBytes(model.parameters()) as live:
        losses = model(
            batch.tokens,
            batch.positions,
            None,
            labels=batch.tokens,
            loss_mask=torch.ones(1, _SEQ_LEN_TOKENS),
            packed_seq_params=batch.side_info(config),
        )
        losses.sum().backward()
    memory = derive(config).memory
    assert memory.moment != "optimizer"
    estimated = (memory.activations_gib + memory.working_gib) * _GIB
    # RoPE's table and token ids are not counted, and the workspace of the kernels is counted but not there:
    # a few hundred KiB in both directions, of 6 to 54 MiB.
    assert live.peak_bytes == pytest.approx(estimated, rel=0.03)
    assert memory.moment == ("loss" if shape == "large vocabulary" else "layer")


def test_an_optimizer_step_takes_what_is_estimated(tiny_config, single_process_groups, monkeypatch):
    """With torch's multi-tensor Adam, which a GPU runs and a CPU would not choose by itself."""
    config = tiny_config(
        run__dtype=Dtype.bf16,
        model__hidden_size=256,
        model__ffn_hidden_size=768,
        optim__micro_batch_sequences=1,
        optim__global_batch_sequences=1,
        run__train_steps=1,
        optim__lr=1e-3,
    )
    parts = build_parts(config, single_process_groups)
    for _, parameter in parts.named_parameters():
        parameter.main_grad.fill_(1e-3)
    parts.optimizer.step()  # allocates the moments
    adam = importlib.import_module("torch.optim.adam")
    monkeypatch.setattr(adam, "_default_to_fused_or_foreach", lambda *_, **__: (False, True))
    masters = [p for group in parts.optimizer.param_groups for p in group["params"]]
    (chained,) = parts.optimizer.chained_optimizers
    moments = [value for state in chained.optimizer.state.values() for value in state.values()]
    sums = [p.main_grad for _, p in parts.named_parameters()]
    with LiveBytes([*masters, *moments, *sums, *(p for _, p in parts.named_parameters())]) as live:
        parts.optimizer.step()
    assert live.peak_bytes == pytest.approx(derive(config).memory.optimizer_step_gib * _GIB, rel=0.01)
