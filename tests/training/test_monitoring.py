"""What a real run writes for others to read: W&B across a restart, TensorBoard, traces."""

from __future__ import annotations

import gzip
import importlib.util
import json
import os
import subprocess
import sys
from collections import Counter

import pytest
import torch

from phsa_launch.run_progress import read_progress
from phsa_megatron.config.errors import ConfigError, DeviceError
from phsa_megatron.config.run_folder import RunFolder
from phsa_megatron.config.schema import ProfileConfig
from phsa_megatron.monitoring import wandb_offline
from phsa_megatron.monitoring.records import read_records
from phsa_megatron.monitoring.wandb_offline import read_offline
from phsa_megatron.training import profile_command
from phsa_megatron.training.faults import VARIABLE, InjectedFaultError
from phsa_megatron.training.profiling import PhaseRanges
from phsa_megatron.training.progress import Progress
from tests.training.processes import run_processes


def test_wandb_offline_across_a_crash_is_one_run_with_the_values_of_metrics_jsonl(
    tiny_config, run, monkeypatch, capsys
):
    config = tiny_config(
        **{
            "monitoring.wandb.mode": "offline",
            "checkpoint.save_every_steps": 2,
            "run.sample_prompts": ["the cat"],
            "run.sample_num_tokens": 2,
        }
    )
    monkeypatch.setenv(VARIABLE, "crash@step=6")
    with pytest.raises(InjectedFaultError):
        run(config)
    # Two folders of one second would have the same name: W&B counts seconds.
    wandb_dir = RunFolder.of(config).wandb_dir
    (first,) = wandb_dir.glob("offline-run-*")
    first.rename(wandb_dir / first.name.replace("offline-run-", "offline-run-0"))
    monkeypatch.delenv(VARIABLE)
    finished = run(config)

    launches = read_offline(finished.folder.wandb_dir)
    assert [launch.launch for launch in launches] == [1, 2]
    assert {launch.run_id for launch in launches} == {(wandb_dir / "run_id").read_text().strip()}
    assert all(launch.config["attention"]["train_topk"] == 1 for launch in launches)
    steps = [sorted({row.step for row in launch.rows}) for launch in launches]
    assert steps == [[1, 2, 3, 4, 5], [5, 6]], "step 5 was made twice, and both are kept apart"
    curve = [
        row.values["train/loss_nats"]
        for launch, wanted in zip(launches, ([1, 2, 3, 4], [5, 6]), strict=True)
        for row in launch.rows
        if row.step in wanted and "train/loss_nats" in row.values
    ]
    assert curve == [loss for loss, _, _ in finished.curve()]
    (row,) = [row for row in launches[1].rows if "samples" in row.values]
    assert row.values == {"samples": "table-file"}
    _objects_and_code_are_those_of_the_run(launches, finished)

    capsys.readouterr()
    assert wandb_offline.main([str(finished.folder.path)]) == 0
    said = capsys.readouterr().out
    assert said.count("equal to metrics.jsonl") == 2 and "upload: wandb sync --id" in said
    assert wandb_offline.main([str(finished.folder.path), "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert rows[0]["launch"] == 1 and rows[0]["step"] == 1
    # A record that W&B does not have: the comparison can fail.
    with finished.folder.metrics_file.open("a") as file:
        file.write(json.dumps({"step": 7, "time": 1.0, "values": {"train/loss_nats": 1.0}}) + "\n")
    assert wandb_offline.main([str(finished.folder.path)]) == 1
    assert "DIFFERS" in capsys.readouterr().out


def _objects_and_code_are_those_of_the_run(launches, finished):
    (samples,) = [o for o in launches[1].objects if o.kind == "table"]
    written = json.loads(finished.folder.summary_file.read_text())["samples"]
    assert (samples.step, samples.name, samples.columns) == (6, "samples", ["step", "prompt", "text"])
    assert samples.rows == [[6, sample["prompt"], sample["text"]] for sample in written]
    assert written[0]["prompt"] == "the cat"

    # Histograms of the last evaluation: by layer and over all, the shares that metrics.jsonl has.
    values = read_records(finished.folder.metrics_file).values_by_step[6]
    found = {o.name: o for o in launches[1].objects if o.kind == "histogram" and o.step == 6}
    wheres = ["attention/", "attention/layer_1/", "attention/layer_2/"]
    assert list(found) == [f"{where}distance_histogram" for where in wheres]
    for where in wheres:
        bins = found[f"{where}distance_histogram"].rows
        assert [edges for *edges, _ in bins] == [[2**m, 2 ** (m + 1)] for m in range(len(bins))]
        logged = [values[f"{where}distance_log2_{m}_frac"] for m in range(len(bins))]
        assert [share for *_, share in bins] == logged
        # A share is rounded once, and so is each sum: a dozen roundings of 2^-53.
        assert sum(logged) == pytest.approx(1, abs=1e-14) and len({*logged}) > 1
        assert where == "attention/" or f"{where}distance_log2_{len(bins)}_frac" not in values

    for launch in launches:
        name = f"code/launch_{launch.launch}"
        assert launch.config["code"][f"launch_{launch.launch}"].startswith(("commit ", "phsa-megatron "))
        text = launch.files[f"{name}/version"].read_text()
        assert text == (finished.folder.code_dir / "version").read_text()
        assert {f"{name}/{file.name}" for file in finished.folder.code_dir.iterdir()} <= set(launch.files)
    assert [event["code"] for event in finished.events("start")] == [
        launch.config["code"][f"launch_{launch.launch}"] for launch in launches
    ]
    assert launches[0].config["run"]["name"] == launches[1].config["run"]["name"] == "tiny"
    assert launches[1].config["derived"]["tokens_per_step"] == 4 * 64


def test_goodput_is_one_number_across_a_crash_in_metrics_and_for_status(tiny_config, run, monkeypatch):
    config = tiny_config(**{"checkpoint.save_every_steps": 2})
    monkeypatch.setenv(VARIABLE, "crash@step=6")
    with pytest.raises(InjectedFaultError):
        run(config)
    monkeypatch.delenv(VARIABLE)
    # The first launch is moved into the past: as if the run had waited a day for a node.
    file = RunFolder.of(config).metrics_file
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps(line | {"time": line["time"] - 100_000}) + "\n" for line in lines))
    finished = run(config)

    records = read_records(finished.folder.metrics_file)
    _, step_times = records.series("perf/step_time_s")
    expected = sum(step_times) / (records.time_by_step[6] - records.launches[0].start_time)
    steps, shares = records.series("perf/goodput_frac")
    assert steps == [1, 2, 3, 4, 5, 6]
    # The clock is read before the record is written: seconds at most, of a day.
    assert shares[-1] == pytest.approx(expected, rel=1e-3) and shares[-1] < shares[3] / 3
    seen = read_progress(finished.folder).goodput
    assert seen.frac(records.time_by_step[6]) == pytest.approx(shares[-1], rel=1e-3)
    # What it must not be: of the last launch alone, or with step 5 counted twice.
    alone = sum(step_times[4:]) / (records.time_by_step[6] - records.launches[1].start_time)
    (twice,) = [line["values"]["perf/step_time_s"] for line in lines if line.get("step") == 5]
    assert abs(alone / expected - 1) > 0.01 and twice / sum(step_times) > 0.01


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout",
    [
        {"tensor_size": 2},
        {"pipeline_size": 2},
        {"context_size": 2},
        {"context_size": 2, "context_exchange": "block_sparse"},
        {"distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True},
    ],
    ids=["tensor", "pipeline", "context", "context_sparse", "overlapped"],
)
def test_who_waits_for_the_other_process_has_it_in_communication(tiny_config, layout):
    """Process 1 is slow by 4 s in one step; process 0 waits, wherever its layout first needs the other."""
    settings = {f"parallel.{name}": value for name, value in layout.items()}
    config = tiny_config(**{"cluster.processes_per_node": 2, "run.train_steps": 5, **settings})
    ended = run_processes(config, [0, 1], **{VARIABLE: "slow@rank=1,step=3,phase=forward,seconds=4"})
    assert ended.codes == [0, 0], ended.everything()
    values = read_records(ended.folder.metrics_file).values_by_step
    waited = {step: values[step]["perf/communication_s"] for step in range(1, 6)}
    # Half of 4 s in the mean of both, less what process 0 still had to do itself.
    assert 1.6 < waited[3] < values[3]["perf/step_time_s"], waited
    # Not both of the others, however busy the machine is.
    assert min(waited[4], waited[5]) < waited[3] / 3, waited


@pytest.mark.skipif(
    importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed here"
)
def test_tensorboard_has_the_same_numbers_across_a_restart(tiny_config, run, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = tiny_config(**{"monitoring.tensorboard": True, "checkpoint.save_every_steps": 2})
    monkeypatch.setenv(VARIABLE, "crash@step=6")
    with pytest.raises(InjectedFaultError):
        run(config)
    monkeypatch.delenv(VARIABLE)
    finished = run(config)
    events = EventAccumulator(str(finished.folder.tensorboard_dir))
    events.Reload()
    found = [(scalar.step, scalar.value) for scalar in events.Scalars("train/loss_nats")]
    expected = [(step, loss) for step, (loss, _, _) in enumerate(finished.curve(), 1)]
    assert [step for step, _ in found] == [step for step, _ in expected], (
        "step 5 of the killed launch is gone"
    )
    assert [value for _, value in found] == pytest.approx([value for _, value in expected], rel=1e-6)


def test_without_tensorboard_the_recipe_is_refused(tiny_config, run, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(DeviceError, match=r"monitoring.tensorboard=true needs the package tensorboard"):
        run(tiny_config(**{"monitoring.tensorboard": True}))


def _phases(trace):
    with gzip.open(trace, "rt", encoding="utf-8") as file:
        events = json.load(file)["traceEvents"]
    named = [e["name"] for e in events if str(e.get("name", "")).startswith("step ") and e.get("ph") == "X"]
    return Counter(named)


def test_a_run_traces_the_steps_that_its_recipe_names(tiny_config, run):
    plain = run(tiny_config(**{"run.name": "plain"}))
    profile = {"monitoring.profile.first_step": 3, "monitoring.profile.num_steps": 2}
    traced = run(tiny_config(**{"run.name": "traced", **profile}))
    assert traced.curve() == plain.curve()
    trace = traced.folder.profile_dir / "steps_00000003_00000004.trace.json.gz"
    phases = _phases(trace)
    assert {name.split(":")[0] for name in phases} == {"step 3", "step 4"}
    # Two micro-batches a step.
    assert phases["step 3: forward"] >= 2 and phases["step 4: optimizer"] >= 1
    table = trace.with_name("steps_00000003_00000004.kernels.txt").read_text()
    assert "aten::mm" in table and "step 4: backward" in table
    assert not plain.folder.profile_dir.exists()


def test_a_trace_of_the_last_steps_is_written_too(tiny_config, run):
    config = tiny_config(**{"monitoring.profile.first_step": 6, "monitoring.profile.num_steps": 9})
    assert len(list(run(config).folder.profile_dir.iterdir())) == 2


def test_phases_are_nvtx_ranges_one_after_the_other(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", lambda name: calls.append(name))
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: calls.append("end"))
    for nvtx in (True, False):
        progress = Progress()
        ranges = PhaseRanges(progress, nvtx=nvtx)
        progress.on_enter.append(ranges.enter)
        for phase in ("data", "forward", "backward"):
            progress.enter(phase, step=4)
        ranges.leave()
        ranges.leave()  # nothing is open
    assert calls == ["step 4: data", "end", "step 4: forward", "end", "step 4: backward", "end"]


def test_the_command_traces_without_a_run_folder(tiny_config, tmp_path):
    config = tiny_config()
    files = profile_command.profile_steps(config, ProfileConfig(first_step=2, num_steps=1), tmp_path / "out")
    assert [path.name for path in files] == [
        "steps_00000002_00000002.trace.json.gz", "steps_00000002_00000002.kernels.txt",
    ]  # fmt: skip
    assert {name.split(":")[0] for name in _phases(files[0])} == {"step 2"}
    assert not os.path.exists(config.run.root_dir)
    for wrong in ("0", "3-2", "x"):
        with pytest.raises(ConfigError, match=f"--steps={wrong}"):
            profile_command._steps(wrong)


def test_help_of_the_commands_needs_no_torch():
    code = (
        "import sys; from phsa_megatron.cli import main; main(['--help']); assert 'torch' not in sys.modules"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "profile" in out and "wandb" in out
