"""Rows of a micro-batch are joined inside the layers: the same numbers, and what layers are given.

That a model's logits and gradients are those of its documents alone, with two rows, is shown in
`test_documents.py`; across pipeline stages by the layout matrix.
"""

import gc
import weakref

import pytest
import torch
from torch.nn import functional

from phsa_megatron.attention import dense_attention
from phsa_megatron.config.activations import joins_rows
from phsa_megatron.config.schema import AttentionKind, Recompute
from phsa_megatron.model.factory import build_model

BOUNDS = [0, 20, 64, 128, 150, 192]


def run(model, config, batch):
    losses = model(
        batch.tokens,
        batch.positions,
        None,
        labels=batch.tokens.roll(-1, 1),
        packed_seq_params=batch.side_info(config),
    )
    model.zero_grad()
    losses.sum().backward()
    return [losses.detach(), *(p.grad.clone() for p in model.parameters())]


def without_hooks(model):
    model.decoder._forward_pre_hooks.clear()
    model.decoder._forward_hooks.clear()


@pytest.mark.parametrize("recompute", [Recompute.none, Recompute.full])
@pytest.mark.parametrize("kind", list(AttentionKind))
def test_losses_and_gradients_are_those_of_rows_apart(
    tiny_config, single_process_groups, micro_batch, kind, recompute
):
    config = tiny_config(attention__kind=kind, parallel__recompute=recompute)
    (model,) = build_model(config, single_process_groups)
    model.double()
    model.rotary_pos_emb.inv_freq = model.rotary_pos_emb.inv_freq.double()
    batch = micro_batch(BOUNDS, rows=3)
    shapes = []
    model.decoder.layers[0].register_forward_pre_hook(
        lambda _, args, given: shapes.append(given.get("hidden_states", args[0] if args else None).shape),
        with_kwargs=True,
    )
    joined = run(model, config, batch)
    without_hooks(model)
    apart = run(model, config, batch)
    hidden = config.model.hidden_size
    half = len(shapes) // 2
    assert shapes == half * [(192, 1, hidden)] + half * [(64, 3, hidden)]
    for mine, theirs in zip(joined, apart, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12 * theirs.abs().max().item())
    # Negative control: another document boundary gives other losses.
    batch.cu_seqlens = torch.tensor([0, 21, 64, 128, 150, 192], dtype=torch.int32)
    assert (run(model, config, batch)[0] - apart[0]).abs().max() > 1e-6


def test_a_stage_that_gets_its_input_from_another_joins_that(tiny_config, single_process_groups, micro_batch):
    config = tiny_config()
    (model,) = build_model(config, single_process_groups)
    batch = micro_batch(BOUNDS, rows=3)
    hidden = torch.randn(64, 3, config.model.hidden_size, generator=torch.Generator().manual_seed(2))
    given = {
        "attention_mask": None,
        "rotary_pos_emb": model.rotary_pos_emb(64),
        "packed_seq_params": batch.side_info(config),
    }
    first = model.decoder(hidden_states=hidden, **given)
    assert first.shape == hidden.shape and first.is_contiguous() and first._base is None
    model.decoder.pre_process = False
    model.decoder.set_input_tensor(hidden)
    assert torch.equal(model.decoder(hidden_states=None, **given), first)


def test_side_information_lives_no_longer_than_its_user(tiny_config, single_process_groups, micro_batch):
    """A cache of prompts rides on it: what waits for the collector may be most of a GPU."""
    config = tiny_config()
    (model,) = build_model(config, single_process_groups)
    batch = micro_batch(BOUNDS, rows=3)
    info = batch.side_info(config)
    gc.collect()
    gc.disable()
    try:
        with torch.no_grad():
            model(batch.tokens, batch.positions, None, packed_seq_params=info)
        assert info.joined() is info.joined()
        living = [weakref.ref(info), weakref.ref(info.joined())]
        assert info._memo  # shared by both, and what the layers have computed is in it
        del info
        assert [ref() for ref in living] == [None, None]
    finally:
        gc.enable()


def test_rows_that_are_documents_are_one_call_of_dense_attention(
    tiny_config, single_process_groups, micro_batch, monkeypatch
):
    calls = []

    def spied(q, *args, **kwargs):
        calls.append(tuple(q.shape[::2]))
        return functional.scaled_dot_product_attention(q, *args, **kwargs)

    monkeypatch.setattr(dense_attention, "scaled_dot_product_attention", spied)
    config = tiny_config(attention__kind=AttentionKind.dense)
    (model,) = build_model(config, single_process_groups)
    run(model, config, micro_batch([0, 64, 128, 192], rows=3))
    assert calls == config.model.num_layers * [(3, 64)]


def test_parts_of_rows_are_not_joined(tiny_config):
    assert joins_rows(tiny_config(parallel__tensor_size=2))
    assert not joins_rows(tiny_config(parallel__tensor_size=2, parallel__sequence_parallel=True))
    assert not joins_rows(tiny_config(parallel__context_size=2))
