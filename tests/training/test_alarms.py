"""Injected trouble raises its alert and leaves its file."""

from __future__ import annotations

import json
import math

import pytest
import torch

from phsa_megatron.config.errors import ConfigError, TrainingError
from phsa_megatron.config.run_folder import RunFolder
from phsa_megatron.monitoring.alerts import read_alerts
from phsa_megatron.monitoring.records import read_records
from phsa_megatron.training import loop, replay
from phsa_megatron.training.faults import VARIABLE
from tests.training.processes import run_processes

NO_CLOCK = {"monitoring.alerts.throughput_drop_frac": 0.999}
"""Keeps a busy machine out of tests that are not about speed."""


@pytest.fixture
def spiking_run(tiny_config, run, monkeypatch):
    """A run of 24 steps whose 22nd loss looks like a spike to the rule."""

    def start(**overrides):
        config = tiny_config(
            **{
                "run.train_steps": 24,
                "checkpoint.save_every_steps": 8,
                "checkpoint.keep_last": 9,
                **NO_CLOCK,
                **overrides,
            }
        )
        from phsa_megatron.monitoring.alerts import SpikeRule

        see = SpikeRule.see
        monkeypatch.setattr(SpikeRule, "see", lambda self, n, loss: see(self, n, loss + 9 * (n == 22)))
        return config, run(config)

    return start


def test_a_spike_leaves_the_sequences_norms_generators_and_a_command_that_makes_the_step_again(
    spiking_run, capsys
):
    config, finished = spiking_run()
    (alert,) = read_alerts(finished.folder.alerts_dir)
    fields = alert["fields"]
    assert (alert["kind"], alert["step"]) == ("loss_spike", 22)
    assert fields["first_sequence"] == 21 * 4 and fields["num_sequences"] == 4
    loss, grad_norm, _ = finished.curve()[21]
    assert fields["grad_norm"] == grad_norm > config.optim.clip_grad_norm  # so that clipping has to be undone
    squares = sum(block["grad_norm"] ** 2 for block in fields["norms"].values())
    assert math.sqrt(squares) == pytest.approx(grad_norm, rel=1e-5)
    assert list(fields["norms"]) == ["embedding", "layer_1", "layer_2", "final_norm"]
    worst = fields["worst_sequences"]
    assert sorted(s["sequence"] for s in worst) == [84, 85, 86, 87]
    assert [s["loss_nats"] for s in worst] == sorted((s["loss_nats"] for s in worst), reverse=True)
    assert min(s["loss_nats"] for s in worst) < loss < max(s["loss_nats"] for s in worst)
    assert all(sum(d["tokens"] for d in s["documents"]) == 65 for s in worst)
    rng = torch.load(finished.folder.alerts_dir / fields["rng_file"], weights_only=False)
    assert set(rng) == {"torch", "megatron", "cuda", "numpy", "python"}
    (event,) = finished.events("alert")
    assert event["alert"] == "loss_spike" and "phsa-train replay" in event["text"]

    # The command of the alert: from the checkpoint of step 16 through 5 steps, then the step itself.
    capsys.readouterr()
    command = fields["replay_command"].split()
    assert command[:2] == ["phsa-train", "replay"]
    before = sorted(p for p in finished.folder.path.rglob("*"))
    assert replay.main(command[2:]) == 0
    out = capsys.readouterr().out
    assert "from the checkpoint of step 16" in out
    assert f"step 22: loss {loss!r}, gradient norm {grad_norm!r}" in out
    assert sorted(p for p in finished.folder.path.rglob("*")) == before


def test_a_step_before_every_checkpoint_is_made_again_from_the_start(tiny_config, run, capsys):
    finished = run(tiny_config())
    capsys.readouterr()
    assert replay.main([str(finished.folder.path), "--step", "2"]) == 0
    out = capsys.readouterr().out
    loss, grad_norm, _ = finished.curve()[1]
    assert "from fresh weights" in out and f"step 2: loss {loss!r}, gradient norm {grad_norm!r}" in out
    with pytest.raises(ConfigError, match="--step=7"):
        replay.main([str(finished.folder.path), "--step", "7"])


def test_no_alert_in_a_healthy_run_and_none_where_they_are_off(tiny_config, run, spiking_run):
    assert not run(tiny_config(**{"run.name": "healthy"}, **NO_CLOCK)).folder.alerts_dir.exists()
    _, finished = spiking_run(**{"run.name": "off", "monitoring.alerts.enabled": False})
    assert not finished.folder.alerts_dir.exists()


def test_a_loss_that_is_not_finite_leaves_its_file_with_the_command(tiny_config, run, monkeypatch):
    config = tiny_config(**NO_CLOCK)
    monkeypatch.setenv(VARIABLE, "nan_loss@step=3")
    with pytest.raises(TrainingError):
        run(config)
    (alert,) = read_alerts(RunFolder.of(config).alerts_dir)
    assert (alert["kind"], alert["step"]) == ("non_finite", 3)
    assert alert["fields"]["sequences"] == [8, 9, 10, 11] and "phsa-train replay" in alert["text"]


def test_lost_speed_leaves_its_file(tiny_config, run, monkeypatch):
    slow = ";".join(f"slow@step={n},seconds=2" for n in (9, 10))
    monkeypatch.setenv(VARIABLE, slow)
    config = tiny_config(
        **{"run.train_steps": 11, "monitoring.alerts.patience_records": 2}
        # Five times as slow: not what a busy machine does to two steps in a row.
        | {"monitoring.alerts.throughput_drop_frac": 0.8}
    )
    finished = run(config)
    found = read_alerts(finished.folder.alerts_dir)
    assert [(a["kind"], a["step"]) for a in found] == [("throughput_drop", 10)]
    assert found[0]["fields"]["step_time_s"] > 1


def _norms_add_up(ended, num_steps):
    """Squares of block norms add up to the optimizer's own norm, which counts every weight once."""
    values = read_records(ended.folder.metrics_file).values_by_step
    for step in range(1, num_steps + 1):
        blocks = [v for n, v in values[step].items() if n.count("/") == 2 and n.endswith("/grad_norm")]
        assert len(blocks) == 4
        assert math.hypot(*blocks) == pytest.approx(values[step]["optim/grad_norm"], rel=1e-5)


@pytest.mark.slow
def test_norms_by_block_count_every_weight_once_under_tensor_parallelism(tiny_config):
    config = tiny_config(
        **{
            "cluster.processes_per_node": 2,
            "parallel.tensor_size": 2,
            "monitoring.norms_every_steps": 1,
            "run.train_steps": 4,
        }
    )
    ended = run_processes(config, [0, 1])
    assert ended.codes == [0, 0], ended.everything()
    _norms_add_up(ended, 3)


@pytest.mark.slow
def test_a_stall_is_told_while_it_lasts_and_a_straggler_by_its_rank(tiny_config):
    """Two processes: rank 1 computes slowly for two records, and later stalls for longer than is allowed."""
    config = tiny_config(
        **{
            "cluster.processes_per_node": 2,
            "run.train_steps": 6,
            "monitoring.alerts.patience_records": 2,
            "monitoring.alerts.straggler_ratio": 5.0,
            "monitoring.alerts.stall_frac": 0.05,
            "monitoring.norms_every_steps": 1,
            "health.heartbeat_every_s": 0.2,
            "health.step_timeout_s": 30.0,
        }
    )
    faults = [f"slow@rank=1,step={n},phase=forward,seconds=2" for n in (3, 4)]
    faults.append("slow@rank=1,step=5,phase=backward,seconds=3")
    ended = run_processes(config, [0, 1], **{VARIABLE: ";".join(faults)})
    assert ended.codes == [0, 0], ended.everything()
    found = {(a["kind"], a["rank"]): a for a in read_alerts(ended.folder.alerts_dir)}
    straggler = found.pop(("straggler", None))
    assert straggler["fields"]["straggler_rank"] == 1 and straggler["step"] == 4
    stall = found.pop(("stall", 1))
    assert stall["step"] == 5 and "phase backward" in stall["text"]
    assert "health.step_timeout_s allows 30 s" in stall["text"]
    lines = [json.loads(line) for line in ended.folder.metrics_file.read_text().splitlines()]
    slowest = {r["step"]: r["values"] for r in lines if "perf/slowest_rank" in r.get("values", {})}
    assert slowest[3]["perf/slowest_rank"] == 1 and slowest[3]["perf/slowest_ratio"] > 1.5
    _norms_add_up(ended, 5)
    for step in (3, 5):  # rank 0 waits where gradients are summed: 2 s and 3 s, half of it in the mean
        waited_s, step_s = slowest[step]["perf/communication_s"], slowest[step]["perf/step_time_s"]
        assert 0.8 < waited_s < step_s and slowest[6]["perf/communication_s"] < 0.5
        assert waited_s <= sum(slowest[step][f"perf/{x}_s"] for x in ("forward", "backward", "optimizer"))
    assert slowest[4]["perf/forward_s"] > 0.5 > slowest[6]["perf/forward_s"]


def test_the_loop_hands_every_step_to_the_alarms(tiny_config, run, monkeypatch):
    seen = []
    after_step = loop.Alarms.after_step
    monkeypatch.setattr(
        loop.Alarms, "after_step", lambda self, result, rng: seen.append(after_step(self, result, rng))
    )
    run(tiny_config(**{"monitoring.log_every_steps": 3}))
    assert len(seen) == 6


def test_skipped_sequences_are_passed_over_and_recorded_and_the_past_cannot_be_changed(tiny_config, run):
    steady = {"optim.decay_steps": 0}  # no decay that moves with the end of the run
    plain = run(tiny_config(**{"run.name": "plain", "run.train_steps": 4, **steady}))
    config = tiny_config(
        **{"run.name": "skips", "run.train_steps": 3, "data.skip_sequences": ["4-7"], **steady}
    )
    first = run(config)
    # Steps 2 and 3 read sequences 8 to 15: other text than sequences 4 to 11.
    assert first.curve()[0] == plain.curve()[0] and first.curve()[1] != plain.curve()[1]
    more = {"run.name": "skips", "run.train_steps": 5, **steady}
    with pytest.raises(ConfigError, match="differs from the checkpoint's before sequence 16"):
        run(tiny_config(**more))
    with pytest.raises(ConfigError, match="What is trained on cannot be passed over"):
        run(tiny_config(**more, **{"data.skip_sequences": ["4-7", "9"]}))
    second = run(tiny_config(**more, **{"data.skip_sequences": ["4-7", "16-17"]}))
    straight = run(tiny_config(**{**more, "run.name": "straight", "data.skip_sequences": ["4-7", "16-17"]}))
    assert second.curve()[3:] == straight.curve()[3:]
