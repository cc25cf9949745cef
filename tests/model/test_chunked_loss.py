"""The chunked loss against fp64 and against the loss from whole logits, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from phsa_megatron.config.schema import Dtype, Loss
from phsa_megatron.model import chunked_loss
from phsa_megatron.model.chunked_loss import ChunkedLossGPT, linear_cross_entropy
from phsa_megatron.model.factory import build_model
from phsa_megatron.training.forward_step import ForwardStep

TOKENS, HIDDEN, VOCABULARY = 37, 24, 90


def inputs(dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator).to(dtype)
    weight = (torch.randn(VOCABULARY, HIDDEN, generator=generator) / 4).to(dtype)
    labels = torch.randint(0, VOCABULARY, (TOKENS,), generator=generator)
    mask = (torch.rand(TOKENS, generator=generator) > 0.3).float()
    return hidden.requires_grad_(), weight.requires_grad_(), labels, mask


def truth(hidden, weight, labels, mask, scale):
    """Losses, and gradients of scale * sum(mask * losses), in fp64."""
    hidden, weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    losses = torch.nn.functional.cross_entropy(hidden @ weight.t(), labels, reduction="none")
    (losses * mask * scale).sum().backward()
    return losses.detach(), hidden.grad, weight.grad


def worst(found, expected):
    return ((found.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("chunk", [1, 8, 37, 64])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 4e-7), (torch.bfloat16, 6e-3)])
def test_losses_and_gradients_are_those_of_fp64(chunk, dtype, bound):
    """fp32: sums of 24 and 90 terms of 2^-24 each; bf16: logits and their gradients are rounded to 2^-9."""
    hidden, weight, labels, mask = inputs(dtype)
    losses = linear_cross_entropy(hidden, weight, labels, mask, chunk)
    (losses * mask * 3.0).sum().backward()
    expected = truth(hidden, weight, labels, mask, 3.0)
    for found, true in zip((losses, hidden.grad, weight.grad), expected, strict=True):
        assert worst(found, true) < bound
    assert hidden.grad.dtype == weight.grad.dtype == dtype
    shifted = truth(hidden, weight, labels.roll(1), mask, 3.0)  # the control: other labels are another answer
    assert worst(losses, shifted[0]) > 10 * bound and worst(weight.grad, shifted[2]) > 10 * bound


def test_the_size_of_a_chunk_changes_no_loss():
    hidden, weight, labels, mask = inputs(torch.float32)
    whole = linear_cross_entropy(hidden, weight, labels, mask, TOKENS)
    assert torch.allclose(whole, linear_cross_entropy(hidden, weight, labels, mask, 5), rtol=1e-6, atol=0)


def test_a_masked_token_moves_nothing_even_where_its_loss_is_infinite():
    hidden, weight, labels, mask = inputs(torch.float32)
    mask[3] = 0
    linear_cross_entropy(hidden, weight, labels, mask, 8)[mask > 0].sum().backward()
    assert (hidden.grad[mask == 0] == 0).all() and (hidden.grad[mask > 0] != 0).any()


def test_a_gradient_that_is_not_the_masks_is_refused():
    hidden, weight, labels, mask = inputs(torch.float32)
    losses = linear_cross_entropy(hidden, weight, labels, mask, 8)
    with pytest.raises(ValueError, match="not proportional to the loss mask"):
        losses.sum().backward()


def test_a_poisoned_loss_gives_gradients_that_are_not_finite():
    hidden, weight, labels, mask = inputs(torch.float32)
    (linear_cross_entropy(hidden, weight, labels, mask, 8) * torch.nan).sum().backward()
    assert hidden.grad.isnan().any() and weight.grad.isnan().any()


def test_a_scale_that_bf16_cannot_hold_is_not_rounded():
    """Rounding errors of elements cancel in the projection on the truth; those of one scale do not."""
    hidden, weight, labels, mask = inputs(torch.bfloat16)
    scale = 1.3  # 1.296875 in bf16: so rounded, all of the gradient would be 2.4e-3 too small
    (linear_cross_entropy(hidden, weight, labels, mask, 8) * mask * scale).sum().backward()
    _, hidden_true, weight_true = truth(hidden, weight, labels, mask, scale)
    for found, true in ((hidden.grad, hidden_true), (weight.grad, weight_true)):
        gain = (found.double() * true).sum() / true.square().sum()
        assert abs(gain - 1) < 1.2e-3


def test_nothing_is_made_for_a_backward_pass_that_will_not_come(monkeypatch):
    hidden, weight, labels, mask = inputs(torch.float32)

    def unwanted(*_):
        raise AssertionError("a gradient is made that nobody asked for")

    monkeypatch.setattr(chunked_loss, "logits_gradient", unwanted)
    with torch.no_grad():
        losses = linear_cross_entropy(hidden, weight, labels, mask, 8)
    assert losses.grad_fn is None and worst(losses, truth(hidden, weight, labels, mask, 1.0)[0]) < 4e-7


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", list(Dtype))
def test_a_model_trains_with_the_same_gradients(tiny_config, single_process_groups, micro_batch, tied, dtype):
    batch = micro_batch([0, 20, 64, 128], rows=2)
    mask = torch.ones(2, 64)
    mask[0, 19] = mask[1, 63] = 0
    found = {}
    for loss in Loss:
        config = tiny_config(
            run__dtype=dtype, compute__loss=loss, compute__loss_chunk_tokens=24, model__tie_embeddings=tied
        )
        torch.manual_seed(1)
        (model,) = build_model(config, single_process_groups)
        assert (type(getattr(model, "module", model)) is ChunkedLossGPT) is (loss == Loss.chunked)
        losses = model(
            batch.tokens,
            batch.positions,
            None,
            labels=batch.tokens.roll(-1, 1),
            loss_mask=mask,
            packed_seq_params=batch.side_info(config),
        )
        total, _, _ = ForwardStep.loss(_Plain(), mask, losses)
        total.backward()
        found[loss] = [losses.detach(), *(p.grad for p in model.parameters())]
    bound = 1e-5 if dtype == Dtype.fp32 else 2e-2  # bf16 gradients are rounded in each layer
    for whole, chunked in zip(found[Loss.whole], found[Loss.chunked], strict=True):
        assert whole.shape == chunked.shape
        assert worst(chunked, whole.double()) < bound


class _Plain:
    poisoned = False


def test_without_labels_a_model_returns_logits(tiny_config, single_process_groups, micro_batch):
    config = tiny_config(compute__loss=Loss.chunked)
    (model,) = build_model(config, single_process_groups)
    batch = micro_batch([0, 64])
    logits = model(batch.tokens, batch.positions, None, packed_seq_params=batch.side_info(config))
    assert logits.shape == (1, 64, 112)
