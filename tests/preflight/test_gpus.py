"""The GPU checks against a made-up driver: each fault is found, named with its GPU, and none is made up."""

from __future__ import annotations

import sys
import types
from dataclasses import dataclass

import pytest

from phsa_megatron.config.errors import DeviceError
from phsa_megatron.config.schema import Device, TrainConfig
from phsa_megatron.preflight import gpus
from phsa_megatron.preflight.checks import Status

GIB = 2**30


@dataclass
class Gpu:
    """What NVML says of one GPU."""

    free_gib: float = 79.0
    ecc_errors: int | None = 0
    rows: tuple[int, int, int, int] | None = (0, 0, 0, 0)
    degrees: int = 40
    reasons: int = 0x1 | 0x4  # idle, power cap


class NVMLError(Exception):
    def __init__(self, value):
        self.value = value
        super().__init__(f"error {value}")


class FakeNvml(types.ModuleType):
    """The part of pynvml that is used."""

    NVMLError = NVMLError
    NVML_ERROR_NOT_SUPPORTED, NVML_ERROR_FUNCTION_NOT_FOUND = 3, 13
    NVML_MEMORY_ERROR_TYPE_UNCORRECTED, NVML_VOLATILE_ECC, NVML_TEMPERATURE_GPU = 1, 0, 0

    def __init__(self, devices):
        super().__init__("pynvml")
        self.devices = devices

    def nvmlInit(self):
        pass

    nvmlShutdown = nvmlInit

    def nvmlSystemGetDriverVersion(self):
        return "570.1"

    def nvmlDeviceGetCount(self):
        return len(self.devices)

    def nvmlDeviceGetHandleByIndex(self, index):
        if index >= len(self.devices):
            raise NVMLError(6)
        return self.devices[index]

    def nvmlDeviceGetMemoryInfo(self, gpu):
        return types.SimpleNamespace(free=gpu.free_gib * GIB, total=80 * GIB)

    def _known(self, value):
        if value is None:
            raise NVMLError(self.NVML_ERROR_NOT_SUPPORTED)
        return value

    def nvmlDeviceGetTotalEccErrors(self, gpu, kind, counter):
        return self._known(gpu.ecc_errors)

    def nvmlDeviceGetRemappedRows(self, gpu):
        return self._known(gpu.rows)

    def nvmlDeviceGetTemperature(self, gpu, sensor):
        return gpu.degrees

    def nvmlDeviceGetCurrentClocksEventReasons(self, gpu):
        return gpu.reasons


@pytest.fixture
def check(monkeypatch):
    """Runs the checks on given GPUs, of which the run wants as many as there are."""

    def run(*devices, wanted=None):
        monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(list(devices)))
        config = TrainConfig()
        config.cluster.device = Device.cuda
        config.cluster.processes_per_node = len(devices) if wanted is None else wanted
        return {check.name: check for check in gpus.check_gpus(config)}

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return run


def test_healthy_gpus_pass_every_check(check):
    found = check(Gpu(), Gpu())
    assert list(found) == list(gpus.NAMES)
    assert {c.status for c in found.values()} == {Status.ok}


@pytest.mark.parametrize(
    ("fault", "name", "words"),
    [
        ({"free_gib": 60.0}, "GPU memory", "GPU 1: 20.0 of 80.0 GiB are in use"),
        ({"ecc_errors": 2}, "GPU errors", "GPU 1: 2 uncorrected ECC errors"),
        ({"rows": (0, 1, 1, 0)}, "GPU errors", "GPU 1: remapping of memory rows is pending"),
        ({"rows": (0, 1, 0, 1)}, "GPU errors", "GPU 1: remapping of memory rows failed"),
        ({"degrees": 91}, "GPU temperature", "GPU 1: 91 C"),
        ({"reasons": 0x40}, "GPU clocks", "GPU 1: hardware thermal slowdown"),
        ({"reasons": 0x88}, "GPU clocks", "GPU 1: hardware slowdown, power brake"),
    ],
)
def test_one_fault_is_one_bad_check_that_names_the_gpu(check, fault, name, words):
    found = check(Gpu(), Gpu(**fault))
    assert [c.name for c in found.values() if c.status is Status.bad] == [name]
    assert words in found[name].found and found[name].rule


def test_a_missing_gpu_is_bad(check):
    found = check(Gpu(), wanted=2)
    assert found["GPU count"].status is Status.bad
    assert (
        "processes_per_node=2" in found["GPU count"].reason()
        and "GPU count: 1" in found["GPU count"].reason()
    )


def test_only_visible_gpus_are_looked_at(check, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,2")
    found = check(Gpu(), Gpu(ecc_errors=9), Gpu(), wanted=2)
    assert {c.status for c in found.values()} == {Status.ok}


def test_a_gpu_that_counts_no_errors_is_said_to(check):
    found = check(Gpu(ecc_errors=None, rows=None))
    assert found["GPU errors"].status is Status.ok and "1 of 1 GPUs do not count" in found["GPU errors"].found


def test_a_driver_that_does_not_answer_is_an_error(check, monkeypatch):
    def broken(self):
        raise NVMLError(9)

    monkeypatch.setattr(FakeNvml, "nvmlInit", broken)
    with pytest.raises(DeviceError, match="NVML does not answer"):
        check(Gpu())


def test_without_the_library_gpus_are_refused_with_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    config = TrainConfig()
    config.cluster.device = Device.cuda
    with pytest.raises(DeviceError, match="pip install nvidia-ml-py"):
        gpus.check_gpus(config)


def test_on_a_cpu_cluster_every_gpu_check_is_named_as_not_applicable():
    found = gpus.check_gpus(TrainConfig())
    assert [c.name for c in found] == list(gpus.NAMES)
    assert {c.status for c in found} == {Status.not_applicable}


def test_the_driver_is_among_the_versions(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml([]))
    assert gpus.driver_version() == "570.1"
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert gpus.driver_version() == "none"
