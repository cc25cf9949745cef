from __future__ import annotations

import math

import pytest
import torch

from phsa_megatron.config.derive import derive
from phsa_megatron.config.memory import optimizer_bytes_per_parameter
from phsa_megatron.config.schema import LrSchedule
from phsa_megatron.training import group_step_adam
from phsa_megatron.training.optimizer import build_parts, set_hyperparameters


def _lr_of_each_step(parts, steps):
    batch = parts.config.optim.global_batch_sequences
    return [set_hyperparameters(parts, (i + 1) * batch) for i in range(steps)]


def test_wsd_warms_up_stays_and_decays_to_the_minimum(tiny_config, open_groups):
    config = tiny_config(
        **{
            "run.train_steps": 10,
            "optim.warmup_steps": 4,
            "optim.decay_steps": 3,
            "optim.lr": 8e-3,
            "optim.min_lr": 2e-3,
        }
    )
    parts = build_parts(config, open_groups(config))
    expected = [2e-3, 4e-3, 6e-3, 8e-3, 8e-3, 8e-3, 8e-3, 6e-3, 4e-3, 2e-3]
    assert _lr_of_each_step(parts, 10) == pytest.approx(expected, rel=1e-12)


def test_cosine_ends_at_the_minimum(tiny_config, open_groups):
    config = tiny_config(
        **{
            "run.train_steps": 6,
            "optim.schedule": LrSchedule.cosine,
            "optim.warmup_steps": 2,
            "optim.decay_steps": 0,
            "optim.lr": 1e-2,
            "optim.min_lr": 1e-3,
        }
    )
    parts = build_parts(config, open_groups(config))
    falling = [1e-3 + 9e-3 * 0.5 * (1 + math.cos(math.pi * i / 4)) for i in range(1, 5)]
    assert _lr_of_each_step(parts, 6) == pytest.approx([5e-3, 1e-2, *falling], rel=1e-12)
    assert falling[-1] == pytest.approx(1e-3)


def test_a_minimum_of_zero_works_without_warmup(tiny_config, open_groups):
    config = tiny_config(**{"optim.min_lr": 0.0, "optim.warmup_steps": 0})
    parts = build_parts(config, open_groups(config))
    assert _lr_of_each_step(parts, 6) == pytest.approx([1e-2, 1e-2, 1e-2, 1e-2, 5e-3, 0.0])


def test_the_learning_rate_depends_on_the_position_and_not_on_what_came_before(tiny_config, open_groups):
    config = tiny_config()
    parts = build_parts(config, open_groups(config))
    first = _lr_of_each_step(parts, 6)
    parts.scheduler.num_steps = 999
    for group in parts.optimizer.param_groups:  # what an older checkpoint could bring along
        group.update(max_lr=1.0, min_lr=0.5, lr=3.0, betas=(0.1, 0.2), eps=1.0, weight_decay=7.0)
    assert _lr_of_each_step(parts, 6) == first
    for group in parts.optimizer.param_groups:
        assert (group["betas"], group["eps"]) == ((0.9, 0.95), 1e-8)
        assert group["weight_decay"] == pytest.approx(0.1 * group["wd_mult"])


@pytest.mark.parametrize("distributed", [True, False])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_norms_have_no_weight_decay_and_everything_else_has(tiny_config, open_groups, dtype, distributed):
    config = tiny_config(
        **{"run.dtype": dtype, "parallel.distributed_optimizer": distributed, "optim.weight_decay": 0.5}
    )
    parts = build_parts(config, open_groups(config))
    set_hyperparameters(parts, 4)
    names = dict(parts.named_parameters())
    norms = {name for name, parameter in names.items() if parameter.dim() == 1}
    assert {"decoder.layers.0.self_attention.q_layernorm.weight", "decoder.final_layernorm.weight"} <= norms
    assert all("norm" in name for name in norms)
    numel_by_decay = {
        group["weight_decay"]: sum(p.numel() for p in group["params"])
        for group in parts.optimizer.param_groups
    }
    assert numel_by_decay == {
        0.0: sum(names[name].numel() for name in norms),
        0.5: sum(p.numel() for name, p in names.items() if name not in norms),
    }


def test_bf16_keeps_fp32_master_weights_and_gradient_sums(tiny_config, open_groups):
    config = tiny_config(**{"run.dtype": "bf16"})
    parts = build_parts(config, open_groups(config))
    assert {p.dtype for _, p in parts.named_parameters()} == {torch.bfloat16}
    assert {p.main_grad.dtype for _, p in parts.named_parameters()} == {torch.float32}
    assert {p.dtype for g in parts.optimizer.param_groups for p in g["params"]} == {torch.float32}


def test_adam_counts_steps_where_the_distributed_optimizer_looks(tiny_config, open_groups):
    config = tiny_config()
    parts = build_parts(config, open_groups(config))
    # Where Transformer Engine or apex is installed, their FusedAdam stays.
    expected = group_step_adam.install().__name__
    (optimizer,) = parts.optimizer.chained_optimizers
    assert type(optimizer.optimizer).__name__ == expected
    optimizer.state_dict()  # megatron-core asserts here on a fresh optimizer that is torch's AdamW


def test_names_are_those_of_the_bare_model(tiny_config, open_groups):
    config = tiny_config()
    parts = build_parts(config, open_groups(config))
    (module,) = parts.modules
    assert [name for name, _ in parts.named_parameters()] == [name for name, _ in module.named_parameters()]
    assert type(module).__name__ == "GPTModel"


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_optimizer_state_takes_the_bytes_that_the_memory_estimate_counts(tiny_config, open_groups, dtype):
    """Two moments and, in bf16, master weights; the masters of fp32 weights are the weights themselves."""
    config = tiny_config(**{"run.dtype": dtype})
    parts = build_parts(config, open_groups(config))
    for _, parameter in parts.named_parameters():
        parameter.main_grad.fill_(1e-3)
    parts.optimizer.step()
    weights = {p.untyped_storage().data_ptr() for _, p in parts.named_parameters()}
    (chained,) = parts.optimizer.chained_optimizers
    masters = [p for group in chained.optimizer.param_groups for p in group["params"]]
    state = [chained.optimizer.state[p][name] for p in masters for name in ("exp_avg", "exp_avg_sq")]
    own = [t for t in (*masters, *state) if t.untyped_storage().data_ptr() not in weights]
    num_bytes = sum(t.numel() * t.element_size() for t in own)
    num_parameters = sum(p.numel() for _, p in parts.named_parameters())
    assert num_bytes == optimizer_bytes_per_parameter(config) * num_parameters
    assert num_bytes / 2**30 == derive(config).memory.optimizer_gib
    buffers = [buffer for chunk in parts.model for buffer in chunk.buffers]
    sums = sum(buffer.grad_data.numel() * buffer.grad_data.element_size() for buffer in buffers)
    # Buffers are padded so that they cut evenly.
    assert 4 * num_parameters <= sums <= 4 * num_parameters * 1.05
