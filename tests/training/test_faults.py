from __future__ import annotations

import pytest

from phsa_megatron.config.errors import ConfigError
from phsa_megatron.training.faults import VARIABLE, Faults, InjectedFaultError


def test_no_variable_means_no_faults(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    assert not Faults.from_environment(rank=0).planned


def test_a_fault_happens_once_at_its_step(monkeypatch):
    monkeypatch.setenv(VARIABLE, "nan_loss@7, crash@5")
    faults = Faults.from_environment(rank=3)
    assert not faults.happens("nan_loss", 6)
    assert faults.happens("nan_loss", 7)
    assert not faults.happens("nan_loss", 7)
    faults.at_step_start(4)
    with pytest.raises(InjectedFaultError, match="step 5"):
        faults.at_step_start(5)


def test_a_fault_with_a_rank_spares_the_others(monkeypatch):
    monkeypatch.setenv(VARIABLE, "nan_grad@2:1")
    assert not Faults.from_environment(rank=0).planned
    assert Faults.from_environment(rank=1).happens("nan_grad", 2)


@pytest.mark.parametrize("spec", ["nan_los@7", "crash", "crash@0", "crash@-1", "crash@x", "crash@1:a"])
def test_an_unknown_fault_is_refused(monkeypatch, spec):
    monkeypatch.setenv(VARIABLE, spec)
    with pytest.raises(ConfigError, match="kind@step"):
        Faults.from_environment(rank=0)
