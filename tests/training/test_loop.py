from __future__ import annotations

import json
import math
import signal
import threading

import pytest

from phsa_megatron.config.errors import TrainingError
from phsa_megatron.config.run_folder import RunFolder
from phsa_megatron.training.faults import VARIABLE, InjectedFaultError


def test_a_run_learns_and_leaves_summary_and_marker(tiny_config, run):
    config = tiny_config(
        **{"run.train_steps": 30, "run.sample_prompts": ["the cat"], "run.sample_num_tokens": 8}
    )
    finished = run(config)
    assert finished.outcome.done
    losses = [loss for loss, _, _ in finished.curve()]
    assert len(losses) == 30
    assert sum(losses[-5:]) / 5 < 0.6 * losses[0]
    assert finished.folder.done.read_text().strip() == "30"
    assert finished.folder.committed_step.read_text().strip() == "30"

    summary = json.loads(finished.folder.summary_file.read_text())
    assert summary["steps"] == 30
    assert summary["sequences"] == 120
    assert 0 < summary["tokens"] <= 120 * 64
    assert summary["final_val_loss_nats"] < math.log(300)
    assert summary["bigram_entropy_nats"] < summary["unigram_entropy_nats"] < math.log(300)
    assert (summary["attention"], summary["topk"], summary["topk_evaluated"]) == ("phsa", 1, 2)
    assert 0 < summary["frac_queries_with_more_candidates_than_k"] < 1
    assert set(summary["val_by_domain"]) == {"en", "zh"}
    assert summary["samples"][0]["prompt"] == "the cat"
    assert summary["wall_s"] > 0


def test_two_runs_are_equal_to_the_last_bit(tiny_config, run):
    first = run(tiny_config(**{"run.name": "first"}))
    second = run(tiny_config(**{"run.name": "second"}))
    other_seed = run(tiny_config(**{"run.name": "third", "run.seed": 8}))
    assert len(first.curve()) == 6
    assert first.curve() == second.curve()
    assert first.curve() != other_seed.curve()


def test_evaluation_changes_nothing_in_training(tiny_config, run):
    without = run(tiny_config(**{"run.name": "without"}))
    with_it = run(tiny_config(**{"run.name": "with_it", "evaluate.every_steps": 1}))
    assert [("val/loss_nats" in step) for step in with_it.steps] == [True] * 6
    assert [("val/loss_nats" in step) for step in without.steps] == [False] * 5 + [True]
    assert with_it.curve() == without.curve()
    assert with_it.steps[-1]["val/loss_nats"] == without.steps[-1]["val/loss_nats"]


def test_dense_attention_trains_and_has_no_topk(tiny_config, run):
    finished = run(tiny_config(**{"attention.kind": "dense"}))
    summary = json.loads(finished.folder.summary_file.read_text())
    assert (summary["attention"], summary["topk"]) == ("dense", None)
    assert finished.curve()[-1][0] < finished.curve()[0][0]


def test_sigterm_saves_and_leaves_and_the_same_command_goes_on(tiny_config, run, monkeypatch):
    straight = run(tiny_config(**{"run.name": "straight"}))
    config = tiny_config(**{"run.name": "stopped"})
    monkeypatch.setenv(VARIABLE, "sigterm@step=3")
    stopped = run(config)
    assert not stopped.outcome.done
    assert stopped.outcome.step == 3
    assert "SIGTERM" in stopped.outcome.reason
    assert stopped.folder.committed_step.read_text().strip() == "3"
    assert not stopped.folder.done.exists()
    assert not stopped.folder.summary_file.exists()
    monkeypatch.delenv(VARIABLE)
    resumed = run(config)
    assert resumed.outcome.done
    assert resumed.curve() == straight.curve()
    summary = json.loads(resumed.folder.summary_file.read_text())
    assert summary["tokens"] == json.loads(straight.folder.summary_file.read_text())["tokens"]


def test_a_finished_run_can_be_made_longer(tiny_config, run, monkeypatch):
    first = run(tiny_config(**{"run.train_steps": 4}))
    assert first.outcome.done
    longer = tiny_config(**{"run.train_steps": 8})
    monkeypatch.setenv(VARIABLE, "sigterm@step=5")
    stopped = run(longer)
    assert stopped.outcome.step == 5
    assert not stopped.folder.done.exists()
    assert not stopped.folder.summary_file.exists()
    monkeypatch.delenv(VARIABLE)
    assert run(longer).outcome.done
    summary = json.loads(first.folder.summary_file.read_text())
    assert (summary["steps"], summary["sequences"]) == (8, 32)


def test_handlers_are_put_back_after_a_run(tiny_config, run):
    before = signal.getsignal(signal.SIGTERM)
    run(tiny_config(**{"run.train_steps": 4}))
    assert signal.getsignal(signal.SIGTERM) is before


class _TouchWhenStepIsLogged(threading.Thread):
    """Touches a request file as soon as a step is in the records; the test decides nothing by time."""

    def __init__(self, folder: RunFolder, step: int, request: str) -> None:
        super().__init__(daemon=True)
        self.folder, self.marker, self.request = folder, f'"step": {step},', request

    def run(self) -> None:
        while True:
            file = self.folder.metrics_file
            if file.exists() and self.marker in file.read_text():
                getattr(self.folder, self.request).touch()
                return


def test_an_exit_request_is_seen_while_the_data_hangs(tiny_config, run, monkeypatch):
    config = tiny_config()
    monkeypatch.setenv(VARIABLE, "hang_data@step=4")
    toucher = _TouchWhenStepIsLogged(RunFolder.of(config), 3, "exit_request")
    toucher.start()
    stopped = run(config)
    toucher.join()
    assert not stopped.outcome.done
    assert stopped.outcome.step == 3
    assert "RUN/exit" in stopped.outcome.reason
    assert stopped.folder.committed_step.read_text().strip() == "3"


def test_an_exit_request_is_seen_in_evaluation(tiny_config, run, monkeypatch):
    from phsa_megatron.training import evaluate

    config = tiny_config(**{"evaluate.every_steps": 2})
    forward_backward = evaluate.forward_backward

    def touch_and_go_on(*args, **kwargs):
        RunFolder.of(config).exit_request.touch()
        return forward_backward(*args, **kwargs)

    monkeypatch.setattr(evaluate, "forward_backward", touch_and_go_on)
    stopped = run(config)
    assert not stopped.outcome.done
    assert stopped.outcome.step == 2
    assert not any("val/loss_nats" in step for step in stopped.steps)
    assert stopped.folder.committed_step.read_text().strip() == "2"


def test_a_save_request_saves_and_goes_on(tiny_config, run, monkeypatch):
    from phsa_megatron.training import loop

    config = tiny_config()
    train_step = loop.train_step

    def touch_and_go_on(parts, batches, table, state, progress, recorder, logits):
        result = train_step(parts, batches, table, state, progress, recorder, logits)
        if state.step == 2:
            RunFolder.of(config).save_request.touch()
        return result

    monkeypatch.setattr(loop, "train_step", touch_and_go_on)
    finished = run(config)
    assert finished.outcome.done
    assert [event["step"] for event in finished.events("checkpoint_committed")] == [2, 6]
    assert not finished.folder.save_request.exists()


def test_saves_come_at_their_interval(tiny_config, run):
    finished = run(tiny_config(**{"checkpoint.save_every_steps": 2}))
    assert [event["step"] for event in finished.events("checkpoint_committed")] == [2, 4, 6]


def test_a_crash_is_recorded_and_the_run_resumes_from_its_last_save(tiny_config, run, monkeypatch):
    straight = run(tiny_config(**{"run.name": "straight"}))
    config = tiny_config(**{"run.name": "crashed", "checkpoint.save_every_steps": 2})
    monkeypatch.setenv(VARIABLE, "crash@step=6")
    with pytest.raises(InjectedFaultError):
        run(config)
    lines = RunFolder.of(config).metrics_file.read_text().splitlines()
    errors = [record for record in map(json.loads, lines) if record.get("event") == "error"]
    assert [(e["step"], e["error"]) for e in errors] == [(6, "InjectedFaultError")]
    monkeypatch.delenv(VARIABLE)
    assert run(config).curve() == straight.curve()


def test_a_loss_that_is_not_finite_stops_the_run_with_the_command_to_replay(tiny_config, run, monkeypatch):
    config = tiny_config()
    monkeypatch.setenv(VARIABLE, "nan_loss@step=4")
    with pytest.raises(TrainingError, match="step 4 stopped before the weights changed: loss nan") as caught:
        run(config)
    folder = RunFolder.of(config).replay_dir / "step_00000004"
    assert f"phsa-train replay {folder}" in str(caught.value)
    assert RunFolder(folder).committed_steps() == [3]


def test_the_log_interval_thins_records_out_and_keeps_their_sums(tiny_config, run):
    every = run(tiny_config(**{"run.name": "every"}))
    third = run(tiny_config(**{"run.name": "third", "monitoring.log_every_steps": 3}))
    assert third.curve() == [every.curve()[2], every.curve()[5]]
