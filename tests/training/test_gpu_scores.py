"""nvidia-resiliency-ext's detector: refused where it cannot work, and what a run makes of its report."""

from __future__ import annotations

import importlib
import sys
import types
from contextlib import contextmanager

import pytest

from phsa_megatron.config.errors import DeviceError
from phsa_megatron.config.schema import TrainConfig
from phsa_megatron.training import gpu_scores as room
from phsa_megatron.training.gpu_scores import gpu_scores

REAL = "nvidia_resiliency_ext.straggler"


class Straggler:
    def __init__(self, rank, node):
        self.rank, self.node = rank, node


class Report:
    """Rank 1 at half of the speed of the fastest; rank 0 at 0.6 of its own best."""

    gpu_relative_perf_scores = {0: 1.0, 1: 0.5}
    gpu_individual_perf_scores = {0: 0.6, 1: 0.98}

    def identify_stragglers(self, gpu_rel_threshold, gpu_indiv_threshold):
        pairs = (
            ("straggler_gpus_relative", self.gpu_relative_perf_scores, gpu_rel_threshold),
            ("straggler_gpus_individual", self.gpu_individual_perf_scores, gpu_indiv_threshold),
        )
        return {
            key: {Straggler(rank, f"n{rank}") for rank, score in scores.items() if score < limit}
            for key, scores, limit in pairs
        }


class Detector:
    """Stands for the package's detector."""

    calls: list[object] = []

    @classmethod
    def initialize(cls, **settings):
        cls.calls = [settings["profiling_interval"]]

    @classmethod
    @contextmanager
    def detection_section(cls, name, profile_cuda):
        assert profile_cuda
        cls.calls.append(name)
        yield

    @classmethod
    def generate_report(cls):
        cls.calls.append("report")
        return Report()

    @classmethod
    def shutdown(cls):
        cls.calls.append("shutdown")


def install(monkeypatch, detector):
    parent, module = types.ModuleType("nvidia_resiliency_ext"), types.ModuleType(REAL)
    module.Detector = detector
    monkeypatch.setitem(sys.modules, "nvidia_resiliency_ext", parent)
    monkeypatch.setitem(sys.modules, REAL, module)


@pytest.fixture
def asked():
    config = TrainConfig()
    config.health.gpu_scores_every_steps = 20
    return config


def run(config, num_steps):
    told = []
    with gpu_scores(config, told.append) as scores:
        for step in range(1, num_steps + 1):
            with scores.step():
                pass
            scores.after_step(step)
    return told


def test_a_slow_gpu_is_told_with_rank_and_node(asked, monkeypatch):
    install(monkeypatch, Detector)
    told = run(asked, 20)
    assert Detector.calls == [2, *["step"] * 20, "report", "shutdown"]
    assert [alert.kind for alert in told] == ["straggler"] * 2
    assert "rank 1 on n1 runs its kernels at 50% of the speed of the fastest" in told[0].text
    assert "rank 0 on n0 runs its kernels at 60% of its own best speed" in told[1].text
    assert told[0].step == 20


def test_the_ratio_of_the_alerts_is_the_limit(asked, monkeypatch):
    install(monkeypatch, Detector)
    asked.monitoring.alerts.straggler_ratio = 1.9
    assert [alert.fields["straggler_rank"] for alert in run(asked, 20)] == [1]
    asked.monitoring.alerts.straggler_ratio = 2.1
    assert run(asked, 20) == []


def test_not_asked_for_needs_nothing(monkeypatch):
    for name in room._MODULES:
        monkeypatch.setitem(sys.modules, name, None)
    assert run(TrainConfig(), 3) == []


def test_absent_is_refused_with_what_to_install(asked, monkeypatch):
    for name in room._MODULES:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(
        DeviceError, match=r"gpu_scores_every_steps.*phsa-megatron\[resiliency\].*set it to 0"
    ):
        run(asked, 1)


def test_without_cupti_it_is_refused(asked, monkeypatch):
    class NoCupti(Detector):
        @classmethod
        def initialize(cls, **settings):
            raise ImportError("libcupti.so.12")

    install(monkeypatch, NoCupti)
    with pytest.raises(DeviceError, match=r"gpu_scores_every_steps=20: .*libcupti.so.12.*set it to 0"):
        run(asked, 1)


def test_the_package_has_what_is_called():
    package = pytest.importorskip(
        "nvidia_resiliency_ext", reason="pip install 'phsa-megatron[resiliency]' installs it"
    )
    assert package
    for name in room._MODULES:
        try:
            module = importlib.import_module(name)
        except ImportError:
            continue
        for method in ("initialize", "detection_section", "generate_report", "shutdown"):
            assert callable(getattr(module.Detector, method))
        assert callable(module.Report.identify_stragglers)
        return
    pytest.fail(f"none of {room._MODULES} is there")
