"""The command that shows that a resume is exact, and that it would notice if it were not."""

import dataclasses
import json
import math
import os
import sys

import pytest
import torch
import yaml
from torch.distributed import checkpoint as distributed_checkpoint
from torch.distributed.checkpoint import FileSystemWriter

from phsa_megatron import cli
from phsa_megatron.config.errors import ConfigError
from phsa_megatron.config.run_folder import RunFolder
from phsa_megatron.training import verify_resume
from phsa_megatron.training.state import capture_rng

CURVE = {step: [(2.0 / step, 0.5 * step, 3.0)] for step in range(1, 6)}


def test_equal_curves_pass_and_repeated_steps_are_counted():
    resumed = {**CURVE, 3: CURVE[3] * 2, 4: CURVE[4] * 2}
    result = verify_resume.compare_curves(CURVE, resumed, 5)
    assert result.differences == []
    assert result.num_repeated == 2
    assert len(result.rows) == 6


@pytest.mark.parametrize("column", range(3))
@pytest.mark.parametrize("time", [0, 1], ids=["before_the_kill", "after_the_resume"])
def test_one_bit_in_one_value_fails(column, time):
    values = list(CURVE[3][0])
    values[column] = math.nextafter(values[column], math.inf)
    twice = [CURVE[3][0], CURVE[3][0]]
    twice[time] = tuple(values)
    result = verify_resume.compare_curves(CURVE, {**CURVE, 3: twice}, 5)
    assert len(result.differences) == 1 and result.differences[0].startswith("step 3")


def test_a_missing_step_fails():
    resumed = {step: values for step, values in CURVE.items() if step != 4}
    assert "missing" in verify_resume.compare_curves(CURVE, resumed, 5).differences[0]


def write_shards(folder, **tensors):
    distributed_checkpoint.save(tensors, storage_writer=FileSystemWriter(folder / "shards"), no_dist=True)


def test_generators_and_weights_are_compared(tmp_path):
    weight, moment = torch.randn(3, 4), torch.zeros(5, dtype=torch.bfloat16)
    for name in ("a", "b"):
        (tmp_path / name / "rng").mkdir(parents=True)
        write_shards(tmp_path / name, weight=weight, moment=moment)
        torch.manual_seed(1)
        torch.save(capture_rng(), tmp_path / name / "rng" / "rank_00000.pt")
    assert verify_resume.compare_checkpoints(tmp_path / "a", tmp_path / "b") == []
    torch.rand(1)
    torch.save(capture_rng(), tmp_path / "b" / "rng" / "rank_00000.pt")
    moment[3] = -0.0  # equal as a number
    write_shards(tmp_path / "b", weight=weight, moment=moment, more=weight)
    assert verify_resume.compare_checkpoints(tmp_path / "a", tmp_path / "b") == [
        "rng/rank_00000.pt: the random generators differ",
        "moment: the weights or moments differ",
        "more: only one of the runs has it",
    ]


def test_empty_checkpoints_are_not_equal(tmp_path):
    assert len(verify_resume.compare_checkpoints(tmp_path / "a", tmp_path / "b")) == 2


def test_a_curve_keeps_every_time_a_step_was_run_and_leaves_out_a_torn_line(tmp_path):
    folder = RunFolder(tmp_path)
    values = {"train/loss_nats": 0.1, "optim/grad_norm": 1.5, "optim/num_zeros": 2}
    lines = [json.dumps({"step": 7, "values": values})] * 2 + [
        json.dumps({"event": "end"}),
        '{"step": 8, "va',
    ]
    folder.metrics_file.write_text("\n".join(lines))
    assert verify_resume.read_curve(folder) == {7: [(0.1, 1.5, 2.0)] * 2}


@pytest.mark.parametrize("words", [["steps=5", "kill_at=5"], ["kill_at=1"], ["steps=many"]])
def test_numbers_that_show_nothing_are_refused(words):
    with pytest.raises(ConfigError, match="steps|kill_at"):
        verify_resume.main(["recipe=phsa_demo_cpu", *words])


@pytest.mark.slow
def test_a_tiny_recipe_passes_from_the_command_line(tiny_config, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # the processes find what this one found
    config = tiny_config(**{"run.train_steps": 40, "optim.decay_steps": 10})
    recipe = {name: section for name, section in dataclasses.asdict(config).items() if name != "run"}
    recipe["run"] = {"name": "tiny", "train_steps": 40, "dtype": "bf16", "num_threads": 1}
    own = tmp_path / "recipes" / "recipe"
    own.mkdir(parents=True)
    plain = json.loads(json.dumps(recipe))  # enums become their names
    (own / "tiny.yaml").write_text("# @package _global_\n" + yaml.safe_dump(plain))
    arguments = ["verify-resume", "recipe=tiny", "steps=12", "kill_at=6"]
    code = cli.main([*arguments, "--recipes-dir", str(tmp_path / "recipes")])
    output, errors = capsys.readouterr()
    assert code == 0, output + errors
    assert "PASS: 12 steps" in output and "killed at step" in output
