from __future__ import annotations

import pytest
import torch

from phsa_megatron.training.faults import VARIABLE, Faults
from phsa_megatron.training.state import TrainState
from phsa_megatron.training.step import NonFiniteStepError, micro_batch_starts
from tests.training.bench import same


def test_accumulation_equals_one_large_micro_batch(bench):
    """Also with documents of unequal length: the mean is over tokens, not over micro-batches."""
    one = bench(**{"optim.micro_batch_sequences": 4})
    whole = [one.step() for _ in range(4)]
    weights = [p.detach().clone() for _, p in one.parts.named_parameters()]
    many = bench(**{"optim.micro_batch_sequences": 1})
    assert len({int(b.loss_mask.sum()) for b in many.batches()}) > 1
    cut = [many.step() for _ in range(4)]
    for a, b in zip(whole, cut, strict=True):
        assert b.loss_nats == pytest.approx(a.loss_nats, rel=1e-6)
        assert b.grad_norm == pytest.approx(a.grad_norm, rel=1e-5)
        assert b.num_tokens == a.num_tokens
    for a, (_, b) in zip(weights, many.parts.named_parameters(), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5)


def test_the_loss_is_the_mean_over_the_tokens_of_the_batch(bench):
    made = bench()
    batches = made.batches()
    model = made.parts.modules[0]
    from phsa_megatron.attention.side_info import SideInfo

    total, count = 0.0, 0.0
    with torch.no_grad():
        for batch in batches:
            side_info = SideInfo.build(batch.tokens, batch.cu_seqlens, made.table, made.config.attention, 1)
            losses = model(
                batch.tokens, batch.position_ids, None, labels=batch.labels, packed_seq_params=side_info
            )
            total += (losses.double() * batch.loss_mask).sum().item()
            count += batch.loss_mask.sum().item()
    result = made.step()
    assert result.num_tokens == count
    assert result.loss_nats == pytest.approx(total / count, rel=1e-9)


def test_clipping_scales_the_gradient_and_not_its_report(bench):
    free = bench(**{"optim.clip_grad_norm": 0.0})
    unclipped = free.step()
    gradient = [p.main_grad.clone() for _, p in free.parts.named_parameters()]
    bound = unclipped.grad_norm / 10
    tight = bench(**{"optim.clip_grad_norm": bound})
    clipped = tight.step()
    assert clipped.grad_norm == unclipped.grad_norm
    for a, (_, b) in zip(gradient, tight.parts.named_parameters(), strict=True):
        torch.testing.assert_close(b.main_grad, a / 10, rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize("fault", ["nan_loss", "nan_grad"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("distributed", [True, False])
def test_a_step_that_is_not_finite_changes_no_bit(bench, monkeypatch, fault, dtype, distributed):
    made = bench(**{"run.dtype": dtype, "parallel.distributed_optimizer": distributed})
    made.step()
    made.step()
    before, state = made.snapshot(), TrainState(**vars(made.state))
    monkeypatch.setenv(VARIABLE, f"{fault}@step=3")
    with pytest.raises(NonFiniteStepError) as caught:
        made.step(Faults.from_environment(rank=0))
    assert same(made.snapshot(), before)
    assert made.state == state
    assert caught.value.step == 3
    assert caught.value.parameters[0]
    assert caught.value.sequences == ([8, 9, 10, 11] if fault == "nan_loss" else [])
    made.step()  # the fault is over: the same step works, and the comparison above can fail
    assert not same(made.snapshot(), before)


def test_the_error_names_the_parameter_with_the_bad_gradient(bench, monkeypatch):
    made = bench()
    names = [name for name, _ in made.parts.named_parameters()]
    monkeypatch.setenv(VARIABLE, "nan_grad@step=1")
    with pytest.raises(NonFiniteStepError, match="step 1 stopped before the weights changed") as caught:
        made.step(Faults.from_environment(rank=0))
    assert caught.value.parameters == {0: [names[len(names) // 2]]}
    assert names[len(names) // 2] in str(caught.value)


@pytest.mark.parametrize("overrides", [{"run.dtype": "bf16"}, {"parallel.distributed_optimizer": False}])
def test_other_precisions_and_optimizers_train_alike(bench, overrides):
    reference = bench()
    expected = [reference.step() for _ in range(6)]
    other = bench(**overrides)
    found = [other.step() for _ in range(6)]
    tolerance = 3e-2 if "run.dtype" in overrides else 1e-6
    for a, b in zip(expected, found, strict=True):
        assert b.loss_nats == pytest.approx(a.loss_nats, rel=tolerance)
    assert found[-1].loss_nats < 0.9 * found[0].loss_nats


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_changes_no_bit(bench, recompute):
    plain = bench()
    expected = [plain.step() for _ in range(3)]
    other = bench(**{"parallel.recompute": recompute})
    assert [other.step() for _ in range(3)] == expected


def test_micro_batches_go_round_the_data_parallel_processes(tiny_config):
    import dataclasses

    from phsa_megatron.parallel.groups import Groups

    config = tiny_config(**{"optim.global_batch_sequences": 8, "optim.micro_batch_sequences": 2})
    fields = {f.name: None for f in dataclasses.fields(Groups)}
    alone = Groups(**fields | {"data_rank": 0, "data_size": 1})
    assert micro_batch_starts(config, alone, 80) == [80, 82, 84, 86]
    two = [
        micro_batch_starts(config, Groups(**fields | {"data_rank": r, "data_size": 2}), 80) for r in (0, 1)
    ]
    assert two == [[80, 84], [82, 86]]
