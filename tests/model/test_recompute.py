"""The side information reaches every layer, when it first runs and when it is recomputed."""

import pytest
import torch
from megatron.core.pipeline_parallel import get_forward_backward_func

from phsa_megatron.attention.core_attention import PHSACoreAttention
from phsa_megatron.attention.side_info import SideInfo
from phsa_megatron.config.schema import Recompute
from phsa_megatron.model.factory import build_model

BOUNDS = [[0, 20, 64], [0, 64, 64], [0, 3, 40, 64]]


def _step(config, groups, micro_batch):
    """Runs three micro-batches through megatron's schedule; returns the loss and all gradients."""
    torch.manual_seed(0)
    (model,) = build_model(config, groups)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)
    batches = iter([micro_batch(bounds, seed) for seed, bounds in enumerate(BOUNDS)])
    losses = []

    def forward_step(iterator, chunk):
        batch = next(iterator)
        out = chunk(
            batch.tokens,
            batch.positions,
            None,
            labels=batch.tokens.roll(-1, 1),
            loss_mask=torch.ones(1, 64),
            packed_seq_params=batch.side_info(config),
        )

        def loss(output):
            losses.append(output.sum().item())
            return output.sum(), torch.tensor(64, dtype=torch.int32), {}

        return out, loss

    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=batches,
        model=model,
        num_microbatches=3,
        seq_length=64,
        micro_batch_size=1,
        forward_only=False,
    )
    return losses, {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("mtp", [0, 2])
@pytest.mark.parametrize("recompute", [Recompute.selective, Recompute.full])
def test_gradients_equal_those_without_recomputation(
    tiny_config, single_process_groups, micro_batch, recompute, mtp
):
    plain = _step(tiny_config(model__mtp_num_layers=mtp), single_process_groups, micro_batch)
    again = _step(
        tiny_config(model__mtp_num_layers=mtp, parallel__recompute=recompute),
        single_process_groups,
        micro_batch,
    )
    assert plain[0] == again[0]
    for name, gradient in plain[1].items():
        # The same operations; only the order in which two uses of a tensor are summed may differ.
        scale = gradient.abs().max().item()
        torch.testing.assert_close(again[1][name], gradient, rtol=0, atol=1e-5 * scale, msg=name)


@pytest.mark.parametrize("recompute", [Recompute.none, Recompute.selective, Recompute.full])
def test_every_layer_sees_the_micro_batch_it_belongs_to(
    tiny_config, single_process_groups, micro_batch, monkeypatch, recompute
):
    seen = []
    original = PHSACoreAttention._attend

    def spy(self, query, key, value, side_info):
        seen.append((self.layer_number, side_info.cu_seqlens.tolist()))
        return original(self, query, key, value, side_info)

    monkeypatch.setattr(PHSACoreAttention, "_attend", spy)
    _step(tiny_config(parallel__recompute=recompute), single_process_groups, micro_batch)
    runs = 1 if recompute == Recompute.none else 2
    expected = [(layer, bounds) for bounds in BOUNDS for layer in (1, 2) for _ in range(runs)]
    assert sorted(seen) == sorted(expected)


def test_stale_side_information_would_leave_the_loss_and_change_the_gradients(
    tiny_config, single_process_groups, micro_batch, monkeypatch
):
    """Negative control: what recomputation does with state that is not captured by the call."""
    config = tiny_config(parallel__recompute=Recompute.full)
    good = _step(config, single_process_groups, micro_batch)
    stale = micro_batch([0, 33, 64], seed=9).side_info(config)
    original = PHSACoreAttention._attend

    def recomputes_with_another(self, query, key, value, side_info):
        # Without recomputation the first run of a checkpointed layer records no graph.
        in_backward = torch.is_grad_enabled()
        return original(self, query, key, value, stale if in_backward else side_info)

    monkeypatch.setattr(PHSACoreAttention, "_attend", recomputes_with_another)
    bad = _step(config, single_process_groups, micro_batch)
    assert bad[0] == good[0]
    differences = [(bad[1][name] - grad).abs().max() / grad.abs().max() for name, grad in good[1].items()]
    assert max(differences) > 1e-2


def test_side_information_of_one_pass_is_not_changed_by_it(tiny_config, single_process_groups, micro_batch):
    config = tiny_config(model__mtp_num_layers=1)
    (model,) = build_model(config, single_process_groups)
    batch = micro_batch([0, 20, 64])
    info = batch.side_info(config)
    model(
        batch.tokens,
        batch.positions,
        None,
        labels=batch.tokens,
        loss_mask=torch.ones(1, 64),
        packed_seq_params=info,
    )
    fresh = batch.side_info(config)
    assert isinstance(info, SideInfo)
    for name in ("token_ids", "is_punctuation", "pool_weights", "cu_seqlens", "cu_seqlens_q"):
        assert torch.equal(getattr(info, name), getattr(fresh, name)), name
