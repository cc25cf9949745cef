"""Real processes that hang, die and wait for each other: who it was has a name, and nobody waits for ever."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys

import pytest

from phsa_megatron.config.exit_codes import FAILED, HUNG, PEER_FAILED
from phsa_megatron.config.prepare_run import prepare_run_folder
from phsa_megatron.config.schema_health import HealthConfig
from phsa_megatron.training import watchdog
from phsa_megatron.training.progress import Progress
from tests.training.processes import ROOT, environment, run_processes


@pytest.fixture
def two(tiny_config):
    """Two data-parallel processes."""

    def make(**overrides):
        settings = {
            "cluster.processes_per_node": 2,
            "optim.micro_batch_sequences": 1,
            "health.heartbeat_every_s": 0.5,
            # Long enough for a busy machine; a test of a hang shortens its own.
            "health.step_timeout_s": 60.0,
            "health.data_timeout_s": 60.0,
            "health.first_step_timeout_s": 60.0,
        }
        return tiny_config(**(settings | overrides))

    return make


def test_a_hung_process_is_named_and_all_leave_their_line(two):
    config = two(**{"health.step_timeout_s": 5.0})
    ended = run_processes(config, [0, 1], PHSA_FAULT="hang@rank=1,step=3,phase=backward")
    assert ended.codes == [HUNG, HUNG], ended.everything()
    host = socket.gethostname()
    assert f"behind: rank 1 ({host}) at step 3, phase backward" in ended.stderr[0], ended.everything()
    assert "waiting for them: ranks 0;" in ended.stderr[0]
    assert "behind" not in ended.stderr[1], "one process tells the story"
    (victim,), (culprit,) = ended.failures(0), ended.failures(1)
    assert (culprit["kind"], culprit["step"], culprit["phase"]) == ("hang", 3, "backward")
    assert not culprit["in_collective"] and "time.sleep" in "".join(culprit["stack"])
    assert victim["collective_number"] > culprit["collective_number"]
    assert re.fullmatch(r"reduce_scatter_tensor #\d+ \[\d+\], not returned", victim["last_collective"])
    assert victim["in_collective"]
    assert victim["rank"] == 0 and victim["host"] == host
    beat = json.loads((ended.folder.heartbeats_dir / "rank_1.json").read_text())
    assert {
        "rank",
        "host",
        "node_rank",
        "pid",
        "step",
        "phase",
        "last_collective",
        "time_unix_s",
    } <= beat.keys()
    assert (beat["rank"], beat["step"], beat["phase"]) == (1, 3, "backward")
    assert not list(ended.folder.logs_dir.glob("stacks*")), "Python could run"
    faults = [json.loads(line) for line in ended.folder.faults_file.read_text().splitlines()]
    assert [(fault["kind"], fault["rank"]) for fault in faults] == [("hang", 1)]


def test_a_crash_is_one_line_and_the_other_process_does_not_wait(two, monkeypatch):
    ended = run_processes(two(), [0, 1], PHSA_FAULT="crash@rank=1,step=2,phase=optimizer")
    assert ended.codes[1] == FAILED and ended.codes[0] in (FAILED, PEER_FAILED), ended.everything()
    (line,) = ended.failures(1)
    assert (line["kind"], line["rank"], line["step"], line["phase"]) == ("crash", 1, 2, "optimizer")
    assert line["error"] == "InjectedFaultError" and "Traceback" in line["traceback"][0]
    assert len(ended.failures(0)) == 1


@pytest.mark.slow
def test_a_killed_process_does_not_leave_the_other_waiting(two):
    ended = run_processes(two(), [0, 1], PHSA_FAULT="kill@rank=1,step=2,phase=forward")
    assert ended.codes[1] == -signal.SIGKILL and ended.codes[0] != 0, ended.everything()
    assert not ended.failures(1) and len(ended.failures(0)) == 1
    assert ended.folder.faults_file.exists()


@pytest.mark.slow
def test_a_batch_that_never_comes_is_the_fault_of_the_process_that_has_none(two):
    config = two(**{"health.data_timeout_s": 5.0})
    ended = run_processes(config, [0, 1], PHSA_FAULT="hang_data@rank=1,step=3")
    assert ended.codes == [HUNG, HUNG], ended.everything()
    assert "behind: rank 1" in ended.stderr[0] and "waits for its own batch" in ended.stderr[0]


def test_a_process_that_never_starts_is_named_within_a_minute(two):
    ended = run_processes(two(**{"health.start_timeout_s": 3.0}), [0])
    assert ended.codes == [FAILED]
    assert "processes [1] of 2 did not start within 3 s" in ended.stderr[0], ended.everything()
    assert "node rank 0, local rank 1" in ended.stderr[0]
    assert ended.seconds < 60
    (line,) = ended.failures(0)
    assert (line["phase"], line["step"], line["error"]) == ("start", 0, "DeviceError")


@pytest.mark.parametrize(("watchdog_on", "code"), [(False, 0), (True, HUNG)])
def test_only_the_watchdog_ends_a_process_that_is_slow(two, watchdog_on, code):
    """The negative control of the hang: the same limits and the same process, with and without it."""
    config = two(
        **{
            "run.name": f"watchdog_{watchdog_on}",
            "run.train_steps": 4,
            "cluster.processes_per_node": 1,
            "health.watchdog": watchdog_on,
            "health.step_timeout_s": 2.0,
        }
    )
    ended = run_processes(config, [0], PHSA_FAULT="slow@step=2,seconds=5,phase=backward")
    assert ended.codes == [code], ended.everything()
    assert [line["kind"] for line in ended.failures(0)] == ["hang"] * watchdog_on


@pytest.mark.parametrize(
    ("phase", "steps_done", "setting"),
    [
        ("load", 0, "first_step_timeout_s"),
        ("forward", 0, "first_step_timeout_s"),
        ("data", 0, "first_step_timeout_s"),
        ("forward", 1, "step_timeout_s"),
        ("log", 1, "step_timeout_s"),
        ("data", 1, "data_timeout_s"),
        ("checkpoint", 0, "long_phase_timeout_s"),
        ("evaluate", 1, "long_phase_timeout_s"),
    ],
)
def test_each_phase_has_its_own_limit(phase, steps_done, setting):
    health = HealthConfig()
    progress = Progress(phase=phase, num_steps_done=steps_done)
    assert watchdog.allowed_s(health, progress) == (setting, getattr(health, setting))


# A main thread that keeps the interpreter's lock: no other Python thread can run, the watchdog's neither.
LOCKED = """
import ctypes, sys
from phsa_megatron.config import compose
from phsa_megatron.training.progress import Progress
from phsa_megatron.training.watchdog import Watchdog
config = compose.load(sys.argv[1])
with Watchdog(config, Progress(phase="forward", step=7, num_steps_done=1), 0, 1):
    ctypes.PyDLL(None).sleep(60)
"""


def test_a_process_whose_python_cannot_run_is_ended_with_its_stacks(tiny_config):
    config = tiny_config(
        **{
            "health.heartbeat_every_s": 0.5,
            "health.step_timeout_s": 2.0,
            "health.first_step_timeout_s": 2.0,
            "health.long_phase_timeout_s": 2.0,
        }
    )
    folder = prepare_run_folder(config).folder
    done = subprocess.run(
        [sys.executable, "-c", LOCKED, str(folder.config_file)], env=environment(), cwd=ROOT, timeout=50
    )
    assert done.returncode == 1
    assert "<module>" in (folder.logs_dir / "stacks_rank_00000.txt").read_text()
