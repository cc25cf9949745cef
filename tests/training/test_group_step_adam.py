from __future__ import annotations

import copy
import math
import sys
import types

import megatron.core.optimizer as megatron_optimizer
import pytest
import torch
from megatron.core.optimizer import clip_grads

from phsa_megatron.config.errors import DeviceError
from phsa_megatron.config.schema import Adam
from phsa_megatron.training import group_step_adam
from phsa_megatron.training.group_step_adam import GroupStepAdam
from phsa_megatron.training.optimizer import build_parts


def _weights(seed: int) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(n, 3, generator=generator)) for n in (4, 1, 7)]


def _train(optimizer: torch.optim.Optimizer, weights: list[torch.nn.Parameter], steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for weight in weights:
            weight.grad = torch.randn(weight.shape, generator=generator)
        optimizer.step()


SETTINGS = {"lr": 3e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def test_equal_to_torch_adamw_to_the_last_bit():
    ours, theirs = _weights(0), _weights(0)
    _train(GroupStepAdam(ours, **SETTINGS), ours, range(20))
    _train(torch.optim.AdamW(theirs, **SETTINGS), theirs, range(20))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert not torch.equal(ours[0], _weights(0)[0])  # something was trained at all


def test_the_step_counter_is_in_the_group_and_survives_a_state_dict():
    weights = _weights(0)
    optimizer = GroupStepAdam(
        [{"params": weights[:2]}, {"params": weights[2:], "weight_decay": 0.0}], **SETTINGS
    )
    _train(optimizer, weights, range(5))
    assert [group["step"] for group in optimizer.param_groups] == [5, 5]
    assert all(set(state) == {"exp_avg", "exp_avg_sq"} for state in optimizer.state.values())

    restored = [torch.nn.Parameter(w.detach().clone()) for w in weights]
    second = GroupStepAdam([{"params": restored[:2]}, {"params": restored[2:]}], **SETTINGS)
    second.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    _train(optimizer, weights, range(5, 9))
    _train(second, restored, range(5, 9))
    assert all(torch.equal(a, b) for a, b in zip(weights, restored, strict=True))


def test_without_the_counter_the_resumed_weights_would_differ():
    weights = _weights(0)
    optimizer = GroupStepAdam(weights, **SETTINGS)
    _train(optimizer, weights, range(5))
    restored = [torch.nn.Parameter(w.detach().clone()) for w in weights]
    second = GroupStepAdam(restored, **SETTINGS)
    second.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    del second.param_groups[0]["step"]
    _train(optimizer, weights, range(5, 6))
    _train(second, restored, range(5, 6))
    assert not torch.equal(weights[0], restored[0])


def test_a_parameter_without_gradient_stays():
    weights = _weights(0)
    before = weights[1].detach().clone()
    optimizer = GroupStepAdam(weights, **SETTINGS)
    weights[0].grad = torch.ones_like(weights[0])
    optimizer.step()
    assert torch.equal(weights[1], before)


@pytest.mark.parametrize("unsupported", [{"adam_w_mode": False}, {"capturable": True}])
def test_what_it_cannot_do_is_refused(unsupported):
    with pytest.raises(ValueError, match=next(iter(unsupported))):
        GroupStepAdam(_weights(0), **unsupported)


def test_norm_and_clipping_of_all_tensors_at_once_are_those_of_torch():
    tensors = [torch.randn(5, 3), torch.randn(7)]
    truth = torch.cat([t.double().flatten() for t in tensors])
    norm, _ = group_step_adam._l2_norm(65536, torch.zeros(1), [tensors], False)
    assert norm.shape == (1,) and norm.item() == pytest.approx(truth.norm().item(), rel=1e-6)
    group_step_adam._scale(65536, torch.zeros(1), [tensors, tensors], 0.5)
    assert torch.equal(torch.cat([t.flatten() for t in tensors]), (truth / 2).float())
    with pytest.raises(ValueError, match="in place"):
        group_step_adam._scale(65536, torch.zeros(1), [tensors, [t.clone() for t in tensors]], 0.5)


@pytest.mark.parametrize("num_shards", [1, 2, 4])
def test_the_norm_of_a_large_gradient_is_exact_however_it_is_sharded(tiny_config, open_groups, num_shards):
    """A million equal squares: one fp32 sum a vector lane stops short of them, and shards by less."""
    config = tiny_config()
    groups = open_groups(config)
    build_parts(config, groups)  # installs the norm
    gradient = torch.full((2**20,), 1e-3)
    truth = gradient[0].double().item() * 2**10
    world = groups.collection.dp_cp
    shards = [clip_grads.get_grad_norm_fp32([s], 2, world) for s in gradient.chunk(num_shards)]
    # Each shard's norm and its square are rounded to fp32 once: 2^-24 of the norm, and half of that again.
    assert math.hypot(*shards) == pytest.approx(truth, rel=2.0**-23)
    assert gradient.norm().item() != pytest.approx(truth, rel=1e-6)  # torch's own, which megatron takes


class FusedAdam(GroupStepAdam):
    """Stands for a library's."""


@pytest.fixture
def megatrons_choice():
    """Puts back what `install` changed for later tests."""
    yield
    group_step_adam.install()


@pytest.mark.parametrize(("adam", "name"), [(a, n) for a, n in group_step_adam._LIBRARY.items()])
def test_a_library_that_is_asked_for_is_used_or_refused(monkeypatch, megatrons_choice, adam, name):
    monkeypatch.setitem(sys.modules, name, None)  # absent, whatever is installed
    with pytest.raises(DeviceError, match=f"compute.adam={adam} asks for {name}.FusedAdam") as refusal:
        group_step_adam.install(adam)
    assert "Or set compute.adam=torch" in str(refusal.value)

    library = types.ModuleType(name)
    monkeypatch.setitem(sys.modules, name, library)
    parent, _, last = name.rpartition(".")
    for package in (parent, parent.split(".")[0]):
        monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
    setattr(sys.modules[parent], last, library)
    with pytest.raises(DeviceError, match="no attribute 'FusedAdam'"):  # such as the index's package `apex`
        group_step_adam.install(adam)
    library.FusedAdam = FusedAdam
    assert group_step_adam.install(adam) is FusedAdam is megatron_optimizer.Adam
    assert group_step_adam.install(Adam.torch) is GroupStepAdam is megatron_optimizer.Adam


def test_a_run_uses_the_adam_that_it_asks_for(monkeypatch, megatrons_choice, tiny_config, open_groups):
    library = types.ModuleType("apex.optimizers")
    library.FusedAdam = FusedAdam
    monkeypatch.setitem(sys.modules, "apex", types.ModuleType("apex"))
    monkeypatch.setitem(sys.modules, "apex.optimizers", library)
    config = tiny_config()
    config.compute.adam = Adam.apex
    (chained,) = build_parts(config, open_groups(config)).optimizer.chained_optimizers
    assert type(chained.optimizer) is FusedAdam
