from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest

from phsa_megatron.config.errors import ConfigError
from phsa_megatron.training.faults import VARIABLE, Faults, InjectedFaultError


def test_no_variable_means_no_faults(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    assert not Faults.from_environment(rank=0).planned


def test_a_fault_happens_once_at_its_step_and_phase(monkeypatch):
    monkeypatch.setenv(VARIABLE, "nan_loss@step=7; crash@step=5,phase=backward")
    faults = Faults.from_environment(rank=3)
    assert not faults.happens("nan_loss", 6)
    assert faults.happens("nan_loss", 7)
    assert not faults.happens("nan_loss", 7)
    faults.enter(4, "backward")
    faults.enter(5, "forward")
    with pytest.raises(InjectedFaultError, match="step=5"):
        faults.enter(5, "backward")
    faults.enter(5, "backward")


def test_without_a_phase_it_happens_at_the_start_of_the_step(monkeypatch):
    monkeypatch.setenv(VARIABLE, "crash@step=2")
    with pytest.raises(InjectedFaultError):
        Faults.from_environment(rank=0).enter(2, "data")


def test_a_fault_with_a_rank_spares_the_others(monkeypatch):
    monkeypatch.setenv(VARIABLE, "nan_grad@rank=1,step=2")
    assert not Faults.from_environment(rank=0).planned
    assert Faults.from_environment(rank=1).happens("nan_grad", 2)


def test_a_fault_happens_once_in_a_run_folder_and_leaves_its_line(monkeypatch, tmp_path):
    file = tmp_path / "run" / "faults.jsonl"
    monkeypatch.setenv(VARIABLE, "crash@step=3,phase=optimizer;slow@step=3,seconds=0")
    for rank in (0, 1):  # without a rank every process has it once
        first = Faults.from_environment(rank, file)
        first.enter(3, "data")
        with pytest.raises(InjectedFaultError):
            first.enter(3, "optimizer")
        assert not Faults.from_environment(rank, file).planned
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(line["rank"], line["kind"], line["step"]) for line in lines] == [
        (0, "slow", 3),
        (0, "crash", 3),
        (1, "slow", 3),
        (1, "crash", 3),
    ]


def test_times_lets_it_happen_in_several_starts(monkeypatch, tmp_path):
    monkeypatch.setenv(VARIABLE, "crash@step=1,times=2")
    happened = 0
    for _ in range(4):
        try:
            Faults.from_environment(0, tmp_path / "faults.jsonl").enter(1, "data")
        except InjectedFaultError:
            happened += 1
    assert happened == 2


@pytest.mark.parametrize(
    ("spec", "code"), [("kill@phase=start", -signal.SIGKILL), ("exit@phase=start,code=9", 9)]
)
def test_a_silent_end_is_on_the_disk_before_it_happens(tmp_path, spec, code):
    program = (
        "import sys; from pathlib import Path; from phsa_megatron.training.faults import Faults; "
        "Faults.from_environment(0, Path(sys.argv[1])).enter(0, 'start'); print('survived')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "faults.jsonl")],
        env=os.environ | {VARIABLE: spec, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == code and "survived" not in done.stdout
    assert json.loads((tmp_path / "faults.jsonl").read_text())["fault"] == spec


@pytest.mark.parametrize(
    ("spec", "word"),
    [
        ("nan_los@step=7", "kind 'nan_los'"),
        ("crash", "step=0"),
        ("crash@step=0", "step=0"),
        ("crash@step=-1", "step=-1"),
        ("crash@step=x", "step=x"),
        ("crash@1:a", "'1:a'"),
        ("crash@step=1,phase=middle", "phase=middle"),
        ("crash@step=1,phase=start", "step=1"),
        ("nan_loss@step=1,phase=forward", "takes no phase"),
        ("crash@step=1,step=2", "'step=2'"),
        ("crash@step=1,times=0", "times=0"),
    ],
)
def test_a_malformed_fault_is_refused_with_value_rule_and_fix(monkeypatch, spec, word):
    monkeypatch.setenv(VARIABLE, spec)
    with pytest.raises(ConfigError) as caught:
        Faults.from_environment(rank=0)
    text = str(caught.value)
    assert text.startswith(f"{VARIABLE}='{spec}'") and word in text and "KIND@rank=R,step=N,phase=P" in text
