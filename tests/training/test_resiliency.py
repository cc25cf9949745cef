"""The adapter to nvidia-resiliency-ext: refused where it cannot work, and real under ft_launcher."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest

from phsa_megatron.config.errors import ConfigError, DeviceError
from phsa_megatron.config.prepare_run import prepare_run_folder
from phsa_megatron.config.schema import TrainConfig
from phsa_megatron.config.schema_health import Resiliency
from phsa_megatron.training import resiliency
from phsa_megatron.training.progress import Progress
from tests.training.processes import ROOT, environment, free_port

NAME = "nvidia_resiliency_ext.fault_tolerance"


@pytest.fixture
def asked():
    config = TrainConfig()
    config.health.resiliency = Resiliency.nvrx
    return config


class Client:
    """Stands for the package's client."""

    def __init__(self):
        self.calls = []
        Client.last = self

    def init_workload_monitoring(self):
        self.calls.append("init")

    def send_heartbeat(self):
        self.calls.append("beat")

    def shutdown_workload_monitoring(self):
        self.calls.append("shutdown")


@pytest.fixture
def installed(monkeypatch):
    module = types.ModuleType(NAME)
    module.RankMonitorClient, module.RankMonitorClientError = Client, ValueError
    monkeypatch.setitem(sys.modules, "nvidia_resiliency_ext", types.ModuleType("nvidia_resiliency_ext"))
    monkeypatch.setitem(sys.modules, NAME, module)
    return module


def test_asked_for_and_absent_is_refused_with_what_to_install(asked, monkeypatch):
    monkeypatch.setitem(sys.modules, NAME, None)
    with (
        pytest.raises(DeviceError, match=r"health.resiliency=nvrx: .*phsa-megatron\[resiliency\]"),
        resiliency.resilient(asked, Progress()),
    ):
        pass


def test_without_ft_launcher_it_is_refused(asked, installed, monkeypatch):
    monkeypatch.delenv(resiliency.SOCKET_VARIABLE, raising=False)
    with (
        pytest.raises(ConfigError, match="start it with ft_launcher"),
        resiliency.resilient(asked, Progress()),
    ):
        pass


def test_heartbeats_follow_the_progress_and_stop_with_the_run(asked, installed, monkeypatch):
    monkeypatch.setenv(resiliency.SOCKET_VARIABLE, "/a/socket")
    monkeypatch.setattr(resiliency, "_MIN_INTERVAL_S", 0.0)
    progress = Progress()
    with resiliency.resilient(asked, progress):
        progress.enter("data", step=1)
        progress.moved()
    progress.enter("end")
    assert Client.last.calls == ["init", "beat", "beat", "shutdown"]


def test_heartbeats_are_at_most_one_a_second(asked, installed, monkeypatch):
    monkeypatch.setenv(resiliency.SOCKET_VARIABLE, "/a/socket")
    progress = Progress()
    with resiliency.resilient(asked, progress):
        for _ in range(100):
            progress.moved()
    assert Client.last.calls.count("beat") <= 3


def test_not_asked_for_costs_nothing_and_needs_nothing(monkeypatch):
    monkeypatch.setitem(sys.modules, NAME, None)
    progress = Progress()
    with resiliency.resilient(TrainConfig(), progress):
        assert progress.on_move == []


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("nvidia_resiliency_ext") is None,
    reason="nvidia-resiliency-ext is not installed: pip install 'phsa-megatron[resiliency]'",
)
def test_ft_launcher_restarts_a_hung_run_of_two_processes_which_then_ends(tiny_config):
    config = tiny_config(
        **{
            "cluster.processes_per_node": 2,
            "optim.micro_batch_sequences": 1,
            "checkpoint.save_every_steps": 1,
            "health.resiliency": "nvrx",
            "health.watchdog": False,  # here ft_launcher is to notice the hang
        }
    )
    folder = prepare_run_folder(config).folder
    launcher = shutil.which("ft_launcher", path=str(Path(sys.executable).parent))
    assert launcher is not None
    done = subprocess.run(
        [
            *(launcher, "--nnodes=1", "--nproc-per-node=2", "--rdzv-backend=c10d", "--max-restarts=2"),
            f"--rdzv-endpoint=127.0.0.1:{free_port()}",
            *("--ft-initial-rank-heartbeat-timeout=60", "--ft-rank-heartbeat-timeout=10"),
            *("--ft-workload-check-interval=1", "-m", "phsa_megatron.train", str(folder.config_file)),
        ],
        env=environment(PHSA_FAULT="hang@rank=1,step=3,phase=backward"),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    assert folder.done.exists()
    (fault,) = [json.loads(line) for line in folder.faults_file.read_text().splitlines()]
    assert fault["kind"] == "hang"
    assert "resumed from" in done.stdout and "at step 2" in done.stdout
