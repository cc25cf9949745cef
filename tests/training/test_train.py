"""The training process as a process: exit codes, messages, several of them."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys

import pytest

from phsa_megatron.config.context_volume import context_volume
from phsa_megatron.config.prepare_run import prepare_run_folder
from phsa_megatron.config.run_folder import RunFolder
from phsa_megatron.monitoring.records import read_records
from tests.training.processes import ROOT, environment, run_processes

TIMEOUT_S = 240


def _command(config, **more):
    """Runs a config in one process, as its command; returns (exit code, stdout, stderr)."""
    folder = prepare_run_folder(config).folder
    done = subprocess.run(
        [sys.executable, "-m", "phsa_megatron.train", str(folder.config_file)],
        env=environment(**more),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    return done.returncode, done.stdout, done.stderr


def _start(config, num_processes, **more):
    """Runs a config in several processes, and returns (exit code, stdout, stderr) of each."""
    ended = run_processes(config, list(range(num_processes)), **more)
    return list(zip(ended.codes, ended.stdout, ended.stderr, strict=True))


def _curve(config, name="train/loss_nats"):
    values = read_records(RunFolder.of(config).metrics_file).values_by_step
    return [step[name] for step in values.values() if name in step]


def test_a_failure_leaves_one_line_that_says_where(tiny_config):
    config = tiny_config()
    code, _, stderr = _command(config, PHSA_FAULT="nan_loss@step=2")
    assert code == 1
    assert "step 2 stopped before the weights changed" in stderr
    assert "Traceback" not in stderr
    (line,) = (RunFolder.of(config).logs_dir / "error_rank_00000.jsonl").read_text().splitlines()
    record = json.loads(line)
    assert (record["rank"], record["step"], record["phase"]) == (0, 2, "optimizer")
    assert record["host"] == socket.gethostname()
    assert record["error"] == "TrainingError"


@pytest.mark.slow
def test_two_processes_train_like_one_and_leave_together(tiny_config):
    """The signal reaches the second process only; both leave after the same step, and go on together."""
    one = tiny_config(**{"run.name": "one"})
    code, stdout, _ = _command(one)
    assert code == 0
    assert "all steps are trained" in stdout

    two = tiny_config(
        **{"run.name": "two", "cluster.processes_per_node": 2, "optim.micro_batch_sequences": 1}
    )
    stopped = _start(two, num_processes=2, PHSA_FAULT="sigterm@rank=1,step=3")
    assert [code for code, _, _ in stopped] == [0, 0], stopped
    assert "asked to leave by SIGTERM: step 3 of 6 is saved" in stopped[0][1]
    resumed = _start(two, num_processes=2)
    assert [code for code, _, _ in resumed] == [0, 0], resumed
    assert _curve(two) == pytest.approx(_curve(one), rel=1e-6)
    assert _curve(two, "optim/grad_norm") == pytest.approx(_curve(one, "optim/grad_norm"), rel=1e-5)
    assert _curve(two, "val/loss_nats") == pytest.approx(_curve(one, "val/loss_nats"), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout",
    [
        {"parallel.tensor_size": 2},
        {"parallel.tensor_size": 2, "parallel.sequence_parallel": True},
        {"parallel.pipeline_size": 2},
        {
            "optim.micro_batch_sequences": 1,
            "parallel.overlap_grad_reduce": True,
            "parallel.overlap_param_gather": True,
            "evaluate.every_steps": 2,
            "checkpoint.save_every_steps": 2,
        },
        {
            "parallel.context_size": 2,
            "parallel.recompute": "full",
            "parallel.overlap_grad_reduce": True,
            "parallel.overlap_param_gather": True,
            "evaluate.every_steps": 2,
            "checkpoint.save_every_steps": 2,
        },
        {
            "parallel.context_size": 2,
            "parallel.context_sharding": "contiguous",
            "parallel.context_exchange": "block_sparse",
            "evaluate.every_steps": 2,
        },
    ],
    ids=["tensor", "sequence", "pipeline", "overlap", "context", "blocks"],
)
def test_a_run_goes_on_in_another_layout_as_it_would_have_in_its_own(tiny_config, run, monkeypatch, layout):
    """One checkpoint, continued by one process and by two: the same losses and gradients, to rounding."""
    # A multiple of the padding for every tensor-parallel size: padding rows take part in the softmax.
    common = {"model.vocab_size": 320}
    one = tiny_config(**{"run.name": "one"}, **common)
    monkeypatch.setenv("PHSA_FAULT", "sigterm@step=2")
    assert run(one).outcome.step == 2
    monkeypatch.delenv("PHSA_FAULT")
    two = tiny_config(**{"run.name": "two", "cluster.processes_per_node": 2}, **common, **layout)
    shutil.copytree(RunFolder.of(one).path, RunFolder.of(two).path, symlinks=True)

    straight = run(one)
    results = _start(two, num_processes=2)
    assert [code for code, _, _ in results] == [0, 0], results
    for name in ("train/loss_nats", "optim/grad_norm", "val/loss_nats"):
        expected = [step[name] for step in straight.steps if name in step]
        found = _curve(two, name)
        assert found[-len(expected) :] == pytest.approx(expected, rel=1e-4), name


@pytest.mark.slow
def test_a_run_goes_on_through_layouts_of_four_processes_as_one_process_would(tiny_config, run, monkeypatch):
    """One process, then tensor x pipeline, then data x context: data, losses and gradients are the same."""
    common = {"model.vocab_size": 320, "optim.micro_batch_sequences": 1}
    straight = run(tiny_config(**{"run.name": "one"}, **common))
    # It starts in one process: fresh weights are drawn stage by stage, and depend on the number of stages.
    monkeypatch.setenv("PHSA_FAULT", "sigterm@step=1")
    assert run(tiny_config(**{"run.name": "many"}, **common)).outcome.step == 1
    monkeypatch.delenv("PHSA_FAULT")
    four = {"run.name": "many", "cluster.processes_per_node": 4, **common}
    pipeline = {"parallel.tensor_size": 2, "parallel.sequence_parallel": True, "parallel.pipeline_size": 2}
    stopped = _start(tiny_config(**four, **pipeline), num_processes=4, PHSA_FAULT="sigterm@step=3")
    assert [code for code, _, _ in stopped] == [0] * 4, stopped
    assert "step 3 of 6 is saved" in stopped[0][1]
    last = tiny_config(**four, **{"parallel.context_size": 2, "parallel.context_exchange": "block_sparse"})
    ended = _start(last, num_processes=4)
    assert [code for code, _, _ in ended] == [0] * 4, ended
    for name in ("train/loss_nats", "optim/grad_norm", "progress/consumed_tokens"):
        expected = [step[name] for step in straight.steps if name in step]
        assert len(expected) == 6
        assert _curve(last, name) == pytest.approx(expected, rel=1e-4), name


@pytest.mark.slow
def test_experts_of_two_processes_start_train_and_go_on_as_those_of_one(tiny_config, run, monkeypatch):
    """Two processes, then one, then two: fresh weights, losses and the optimizer's state are the same."""
    common = {
        "model.num_experts": 4,
        "model.expert_balance_coeff": 0.01,
        # Balance is over a micro-batch, so that its size is a part of the loss.
        "optim.micro_batch_sequences": 1,
        # An odd number of sequences: one of two processes has no text in the last round.
        "evaluate.every_steps": 1,
        "evaluate.micro_batch_sequences": 1,
    }
    straight = run(tiny_config(**{"run.name": "straight"}, **common))
    two = {"run.name": "many", "cluster.processes_per_node": 2, "parallel.expert_size": 2}
    stopped = _start(tiny_config(**two, **common), num_processes=2, PHSA_FAULT="sigterm@step=2")
    assert [code for code, _, _ in stopped] == [0, 0], stopped
    monkeypatch.setenv("PHSA_FAULT", "sigterm@step=4")
    assert run(tiny_config(**{"run.name": "many"}, **common)).outcome.step == 4
    monkeypatch.delenv("PHSA_FAULT")
    ended = _start(tiny_config(**two, **common), num_processes=2)
    assert [code for code, _, _ in ended] == [0, 0], ended
    for name in ("train/loss_nats", "optim/grad_norm", "progress/consumed_tokens"):
        expected = [step[name] for step in straight.steps if name in step]
        assert len(expected) == 6
        assert _curve(tiny_config(**two, **common), name) == pytest.approx(expected, rel=1e-4), name
    assert straight.steps[-1]["val/loss_nats"] == pytest.approx(
        _curve(tiny_config(**two, **common), "val/loss_nats")[-1], rel=1e-4
    )


@pytest.mark.slow
def test_parts_of_sequences_are_counted_once_and_a_run_goes_on_without_context_parallelism(tiny_config, run):
    """Two context-parallel processes report what one does, and one process finishes their stopped run."""
    common = {
        # Few enough that pieces become padding: the count of that must not double.
        "data.max_documents_per_sequence": 2,
        "evaluate.every_steps": 1,
        "run.sample_prompts": ["the cat"],
        "run.sample_num_tokens": 4,
    }
    straight = run(tiny_config(**{"run.name": "one"}, **common))
    two = tiny_config(
        **{"run.name": "two", "cluster.processes_per_node": 2, "parallel.context_size": 2}, **common
    )
    stopped = _start(two, num_processes=2, PHSA_FAULT="sigterm@rank=1,step=3")
    assert [code for code, _, _ in stopped] == [0, 0], stopped
    shutil.copytree(RunFolder.of(two).path, RunFolder.of(two).path.with_name("three"), symlinks=True)
    volume = context_volume(two)
    assert _curve(two, "perf/context_sent_bytes_per_layer") == pytest.approx(
        # Whole steps of both processes, evaluations left out.
        [volume.forward_bytes + volume.gradient_bytes] * 3
    )
    alone = run(tiny_config(**{"run.name": "three"}, **common))
    assert len(alone.steps) == len(straight.steps) == 6

    reported = [
        name for name in straight.steps[0] if name.startswith(("train/", "optim/", "val/", "attention/"))
    ]
    reported += ["progress/consumed_tokens", "data/overflow_tokens"]
    assert straight.steps[0]["data/overflow_tokens"] > 0
    assert any(name.startswith("attention/layer_2/") for name in reported)
    # Each context-parallel process counts the choices of its own queries, and neighbours among them.
    own = ("/selection_entropy_frac", "/neighbour_overlap_frac")
    reported = [name for name in reported if not name.endswith(own)]
    for name in set(reported) - {"val/eval_s", "optim/num_zeros"}:
        # The evaluation of the step at which it was stopped did not happen.
        pairs = [
            (one[name], other[name])
            for one, other in zip(straight.steps, alone.steps, strict=True)
            if name in one and name in other
        ]
        assert len(pairs) >= 5, name
        assert [other for _, other in pairs] == pytest.approx([one for one, _ in pairs], rel=1e-4), name
    samples = [json.loads(r.folder.summary_file.read_text())["samples"] for r in (straight, alone)]
    assert samples[0] == samples[1]


def test_a_settings_file_that_is_not_there_is_one_line(tmp_path):
    found = subprocess.run(
        [sys.executable, "-m", "phsa_megatron.train", str(tmp_path / "config.yaml")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=TIMEOUT_S,
    )
    assert found.returncode == 1
    assert "config.yaml" in found.stderr
    assert "Traceback" not in found.stderr
