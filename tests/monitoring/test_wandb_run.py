import dataclasses
import importlib
import json
import logging
import subprocess
import sys

import pytest
import wandb

from phsa_megatron.config.errors import DeviceError
from phsa_megatron.config.schema import MonitoringConfig, RunConfig, TrainConfig, WandbConfig, WandbMode
from phsa_megatron.monitoring.wandb_run import stable_run_id, start_wandb


@dataclasses.dataclass(frozen=True)
class Derived:
    total_tokens: int = 123


@pytest.fixture
def wandb_dir(tmp_path):
    return tmp_path / "demo" / "wandb"


def _config(mode):
    return TrainConfig(run=RunConfig(name="demo"), monitoring=MonitoringConfig(wandb=WandbConfig(mode=mode)))


def _records(launch):
    """Read an offline launch back with W&B's own command: one object a record, its kind under `type`."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(launch)]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [json.loads(line) for line in out.splitlines()]


def test_two_offline_launches_are_one_run_on_its_own_step_axis(wandb_dir, capfd):
    launches = []
    for number, steps in enumerate(
        [(1, 2, 3, 4), (3, 4, 5)]
    ):  # The second launch resumes at 2: steps go back.
        run = start_wandb(_config(WandbMode.offline), Derived(), wandb_dir)
        run_id = run.run_id
        for step in steps:
            run.log(step, {"train/loss_nats": 1.0 / step})
        run.close()
        assert f"wandb sync --id {run_id} {wandb_dir}/offline-run-*" in capfd.readouterr().out
        (folder,) = wandb_dir.glob("offline-run-*")
        launches.append(folder.rename(wandb_dir / f"launch-{number}"))
    first, second = (_records(launch) for launch in launches)

    ids = [record["run"]["run_id"] for record in first + second if record["type"] == "run"]
    assert ids == [stable_run_id(wandb_dir)] * 2
    items = [record["history"]["item"] for record in first + second if record["type"] == "history"]
    assert [item["progress/step"] for item in items] == [1, 2, 3, 4, 3, 4, 5], (
        "no step of a resumed run is dropped"
    )
    for records in (first, second):
        metrics = [record["metric"] for record in records if record["type"] == "metric"]
        assert any(m.get("glob_name") == "*" and m["step_metric"] == "progress/step" for m in metrics)
        (run_record,) = (record["run"] for record in records if record["type"] == "run")
        uploaded = run_record["config"]["update"]
        assert uploaded["attention"]["train_topk"] == 2 and uploaded["derived"] == {"total_tokens": 123}


def test_disabled_does_not_even_import_wandb(wandb_dir, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert start_wandb(_config(WandbMode.disabled), Derived(), wandb_dir) is None
    assert not wandb_dir.exists()


def test_a_missing_package_is_named_with_the_extra_that_brings_it(wandb_dir, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(
        DeviceError, match=r"wandb.mode=offline needs the package wandb.*phsa-megatron\[train\]"
    ):
        start_wandb(_config(WandbMode.offline), Derived(), wandb_dir)


def test_online_without_a_login_is_refused_instead_of_asking(wandb_dir, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setattr(wandb, "api", type("Api", (), {"api_key": None})())
    with pytest.raises(DeviceError, match="needs a login and there is none"):
        start_wandb(_config(WandbMode.online), Derived(), wandb_dir)


def test_online_without_a_server_goes_on_offline_and_says_so(wandb_dir, monkeypatch, caplog):
    real_init = importlib.import_module("wandb").init

    def init(*, mode, **arguments):
        if mode == "online":
            raise wandb.errors.CommError("no route to host")
        return real_init(mode=mode, **arguments)

    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setattr(wandb, "init", init)
    with caplog.at_level(logging.WARNING):
        run = start_wandb(_config(WandbMode.online), Derived(), wandb_dir)
    assert "no route to host" in caplog.text and "offline" in caplog.text
    assert run.sync_command is not None and run.run_id == stable_run_id(wandb_dir)
    run.close()


def test_each_run_folder_has_its_own_id(tmp_path):
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    first, second = map(stable_run_id, folders)
    assert first != second and first == stable_run_id(folders[0])
    assert [path.name for path in folders[0].iterdir()] == ["run_id"]
