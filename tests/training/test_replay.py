from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch

from phsa_megatron.config.errors import ConfigError, TrainingError
from phsa_megatron.config.run_folder import RunFolder
from phsa_megatron.data.batches import BatchReader
from phsa_megatron.data.tokenizer import Tokenizer
from phsa_megatron.training import replay as replay_module
from phsa_megatron.training.faults import VARIABLE
from phsa_megatron.training.forward_step import ForwardStep
from phsa_megatron.training.optimizer import build_parts
from phsa_megatron.training.run import punctuation_table
from phsa_megatron.training.step import forward_backward


def _files(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_step_that_overflows_by_itself_is_replayed_to_the_same_numbers(tiny_config, run, capsys):
    """No injected fault: a learning rate beyond all measure makes the loss of a later step not finite."""
    config = tiny_config(**{"optim.lr": 1e36, "optim.clip_grad_norm": 0.0, "optim.warmup_steps": 0})
    with pytest.raises(TrainingError, match="stopped before the weights changed"):
        run(config)
    (folder,) = RunFolder.of(config).replay_dir.iterdir()
    evidence = json.loads((folder / "replay.json").read_text())
    before = _files(RunFolder.of(config).path)
    capsys.readouterr()
    assert replay_module.main([str(folder)]) == 3
    report = capsys.readouterr().out
    assert _files(RunFolder.of(config).path) == before
    assert evidence["step"] > 1
    assert (
        f"step {evidence['step']}: loss {evidence['loss_nats']}, gradient norm {evidence['grad_norm']}"
        in report
    )
    assert "in the order of the backward pass: none" not in report


@pytest.mark.parametrize("fault", ["nan_loss", "nan_grad"])
def test_an_injected_fault_is_reproduced_only_if_it_is_injected_again(
    tiny_config, run, open_groups, monkeypatch, fault
):
    finite = run(tiny_config(**{"run.name": "finite"}))
    config = tiny_config(**{"run.name": "poisoned"})
    monkeypatch.setenv(VARIABLE, f"{fault}@step=4")
    with pytest.raises(TrainingError):
        run(config)
    folder = RunFolder(RunFolder.of(config).replay_dir / "step_00000004")
    again = replay_module.replay(folder, config, open_groups(config))
    assert again.step == 4
    assert not math.isfinite(again.grad_norm)
    assert math.isfinite(again.loss_nats) == (fault == "nan_grad")
    assert again.first_bad_output is None  # the fault is behind the last module
    assert again.first_bad_gradient is not None

    monkeypatch.delenv(VARIABLE)
    healthy = replay_module.replay(folder, config, open_groups(config))
    # Bit-equal with the step of a run that had no fault: the kept state is the state before the step.
    assert (healthy.loss_nats, healthy.grad_norm) == finite.curve()[3][:2]
    assert healthy.first_bad_gradient is None
    total = math.sqrt(sum(norm**2 for norm in healthy.grad_norms.values()))
    assert total == pytest.approx(healthy.grad_norm, rel=1e-6)


def test_the_first_module_that_breaks_is_named(tiny_config, open_groups):
    config = tiny_config()
    parts = build_parts(config, open_groups(config))
    broken = dict(parts.named_parameters())["decoder.layers.1.mlp.linear_fc2.weight"]
    tokenizer = Tokenizer.from_file(config.data.tokenizer_file, config.data.eod_token)
    batch = BatchReader(config, "train", tokenizer).micro_batch(0, 2)
    forward_step = ForwardStep(
        config, punctuation_table(config, tokenizer, parts.groups), topk=1, groups=parts.groups
    )
    with replay_module.first_bad_outputs(parts) as bad:
        forward_backward(parts, [batch], forward_step, forward_only=True)
    assert bad == []
    with torch.no_grad():
        broken[0, 0] = math.inf
    with replay_module.first_bad_outputs(parts) as bad:
        forward_backward(parts, [batch], forward_step, forward_only=True)
    assert bad[0] == "decoder.layers.1.mlp.linear_fc2"


def test_the_report_names_the_first_module_and_the_first_gradient():
    seen = replay_module.Replay(
        7,
        math.nan,
        math.inf,
        "decoder.layers.1.mlp",
        {"a.weight": 1.0, "b.weight": math.nan, "c.weight": math.inf},
    )
    text = "\n".join(seen.lines())
    assert "decoder.layers.1.mlp" in text
    assert seen.first_bad_gradient == "c.weight"


def test_a_spread_run_is_replayed_by_one_process(tiny_config):
    spread = tiny_config(**{"parallel.tensor_size": 2, "cluster.processes_per_node": 4})
    alone = replay_module.single_process(spread)
    assert (alone.parallel.tensor_size, alone.cluster.processes_per_node) == (1, 1)
    assert dataclasses.replace(alone, parallel=spread.parallel, cluster=spread.cluster) == spread


def test_a_folder_that_is_no_replay_folder_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="config.yaml"):
        replay_module.main([str(tmp_path)])
