"""Multi-token prediction: trains, has its own side information, and never looks into another document."""

import pytest
import torch

from phsa_megatron.attention.core_attention import PHSACoreAttention
from phsa_megatron.model.factory import build_model


def _loss(model, config, batch, loss_mask=None):
    loss_mask = torch.ones(batch.tokens.shape) if loss_mask is None else loss_mask
    info = batch.side_info(config)
    return model(
        batch.tokens,
        batch.positions,
        None,
        labels=batch.tokens.roll(-1, 1),
        loss_mask=info.mtp_loss_mask(loss_mask, config.model.mtp_num_layers),
        packed_seq_params=info,
    )


@pytest.mark.parametrize("tied", [True, False])
def test_one_depth_learns_a_repeating_text(tiny_config, single_process_groups, micro_batch, tied):
    config = tiny_config(model__mtp_num_layers=1, model__tie_embeddings=tied)
    (model,) = build_model(config, single_process_groups)
    batch = micro_batch([0, 64])
    batch.tokens = (torch.arange(64) % 10).unsqueeze(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    before = [p.detach().clone() for p in model.mtp.parameters()]
    for _ in range(30):
        optimizer.zero_grad()
        loss = _loss(model, config, batch).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    assert all(not torch.equal(old, new) for old, new in zip(before, model.mtp.parameters(), strict=True))


def test_each_depth_gets_its_own_side_information(
    tiny_config, single_process_groups, micro_batch, monkeypatch
):
    config = tiny_config(model__mtp_num_layers=2)
    (model,) = build_model(config, single_process_groups)
    batch = micro_batch([0, 20, 64])
    seen = []
    original = PHSACoreAttention._attend

    def spy(self, query, key, value, side_info):
        seen.append((self.mtp_depth, side_info.is_punctuation.clone()))
        return original(self, query, key, value, side_info)

    monkeypatch.setattr(PHSACoreAttention, "_attend", spy)
    _loss(model, config, batch)
    info = batch.side_info(config)
    assert [depth for depth, _ in seen] == [0, 0, 1, 2]
    for depth, flags in seen:
        assert torch.equal(flags, info.at_mtp_depth(depth).is_punctuation)


def test_prediction_gradients_of_packed_documents_equal_separate_ones(
    tiny_config, single_process_groups, micro_batch
):
    """The prediction block alone: gradients of its own weights, which the main loss does not touch."""
    config = tiny_config(model__mtp_num_layers=1)
    (model,) = build_model(config, single_process_groups)
    bounds = [0, 20, 64]

    def mask_of(length):
        mask = torch.ones(length)
        mask[-1] = 0.0  # a document's last token has no next one
        return mask

    def gradients(use_mask):
        total = None
        for start, end in [(0, 20), (20, 64)]:
            alone = micro_batch([0, end - start])
            alone.tokens = packed.tokens[:, start:end]
            mask = mask_of(end - start).unsqueeze(0)
            model.zero_grad()
            _loss(model, config, alone, mask).sum().backward()
            part = [p.grad.clone() for p in model.mtp.parameters()]
            total = part if total is None else [a + b for a, b in zip(total, part, strict=True)]
        model.zero_grad()
        info = packed.side_info(config)
        mask = torch.cat([mask_of(20), mask_of(44)]).unsqueeze(0)
        model(
            packed.tokens,
            packed.positions,
            None,
            labels=packed.tokens.roll(-1, 1),
            loss_mask=info.mtp_loss_mask(mask, 1) if use_mask else mask,
            packed_seq_params=info,
        ).sum().backward()
        return total, [p.grad for p in model.mtp.parameters()]

    packed = micro_batch(bounds)
    apart, together = gradients(use_mask=True)
    for one, other in zip(together, apart, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4 * other.abs().max().item())
    # Negative control: with the plain mask one target lies in the next document.
    _, wrong = gradients(use_mask=False)
    worst = max((a - b).abs().max() / b.abs().max() for a, b in zip(wrong, apart, strict=True))
    assert worst > 1e-3
