"""The fused rotation against megatron's own, in fp64."""

from __future__ import annotations

import pytest
import torch
from megatron.core.models.common.embeddings import rope_utils

from phsa_megatron.config.schema import Elementwise, Recompute
from phsa_megatron.model.factory import build_model
from phsa_megatron.model.fused_rotary import rotate_compiled


def angles(num_tokens, dim):
    inverse = 1e6 ** (-torch.arange(0, dim, 2) / dim)
    half = torch.arange(num_tokens)[:, None] * inverse
    return torch.cat((half, half), dim=-1)[:, None, None, :]


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-7), (torch.bfloat16, 4e-3)])
def test_it_turns_and_turns_back_as_megatron_does(dtype, bound):
    freqs = angles(48, 16)
    given = torch.randn(48, 2, 3, 16).to(dtype).requires_grad_()
    true = given.detach().double().requires_grad_()
    expected = rope_utils._apply_rotary_pos_emb_bshd(true, freqs.double(), rotary_interleaved=False)
    grad = torch.randn_like(given)
    expected.backward(grad.double())
    found = rotate_compiled(given, freqs)
    found.backward(grad)
    for x, y in ((found, expected), (given.grad, true.grad)):
        assert x.dtype == dtype
        assert (x.double() - y).norm() / y.norm() < bound
    assert not torch.allclose(rotate_compiled(given, freqs.flip(0)).double(), expected, rtol=0.1)


def test_pairs_that_it_does_not_turn_are_refused():
    with pytest.raises(ValueError, match="interleaved=True"):
        rotate_compiled(torch.zeros(4, 1, 1, 8), angles(4, 8), interleaved=True)
    with pytest.raises(ValueError, match="4 channels"):
        rotate_compiled(torch.zeros(4, 1, 1, 8), angles(4, 4))


@pytest.mark.parametrize("recompute", [Recompute.none, Recompute.full])
def test_a_model_gives_the_same_losses_and_gradients(
    tiny_config, single_process_groups, micro_batch, monkeypatch, recompute
):
    monkeypatch.setattr(rope_utils, "fused_apply_rotary_pos_emb", None)
    batch, found = micro_batch([0, 20, 64]), {}
    for elementwise in Elementwise:
        config = tiny_config(compute__elementwise=elementwise, parallel__recompute=recompute)
        torch.manual_seed(1)
        (model,) = build_model(config, single_process_groups)
        losses = model(
            batch.tokens,
            batch.positions,
            None,
            labels=batch.tokens.roll(-1, 1),
            packed_seq_params=batch.side_info(config),
        )
        losses.sum().backward()
        found[elementwise] = [losses.detach(), *(p.grad for p in model.parameters())]
    assert rope_utils.fused_apply_rotary_pos_emb is rotate_compiled
    for unfused, compiled in zip(*found.values(), strict=True):
        assert ((compiled - unfused).norm() / unfused.norm()) < 1e-5
