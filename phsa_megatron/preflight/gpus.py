"""The GPUs of a node as the driver sees them (NVML): count, memory, errors, temperature, throttling.

NVML counts all GPUs of a host; with CUDA_VISIBLE_DEVICES only those that it names are looked at.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

from phsa_megatron.config.errors import DeviceError
from phsa_megatron.config.schema import Device, TrainConfig
from phsa_megatron.config.schema_health import HealthConfig
from phsa_megatron.preflight.checks import Check, Status, judged

NAMES = ("GPU count", "GPU memory", "GPU errors", "GPU temperature", "GPU clocks")

# Bits of NVML's clock event reasons that mean that the hardware is held back; idle, application clocks and
# the power cap of a busy GPU are no fault.
_HELD_BACK = {
    0x8: "hardware slowdown",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "power brake",
}


def driver_version() -> str:
    """The version of the driver, `none` where there is no NVML."""
    try:
        nvml = importlib.import_module("pynvml")
        nvml.nvmlInit()
        return str(nvml.nvmlSystemGetDriverVersion())
    except Exception:  # no library, no driver, no permission: there is no driver to compare
        return "none"


def check_gpus(config: TrainConfig) -> list[Check]:
    """Check the GPUs of this node; on a CPU cluster every check is named as not applicable.

    Raises:
        DeviceError: the run wants GPUs and nvidia-ml-py, or the driver, is not there.
    """
    if config.cluster.device is Device.cpu:
        return [Check(name, Status.not_applicable, "cluster.device=cpu") for name in NAMES]
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError as error:
        raise DeviceError(
            "cluster.device=cuda: the preflight looks at GPUs through NVML, and nvidia-ml-py is not "
            "installed; pip install nvidia-ml-py (it is part of phsa-megatron[gpu])"
        ) from error
    try:
        nvml.nvmlInit()
        handles = _handles(nvml)
    except nvml.NVMLError as error:
        raise DeviceError(
            f"cluster.device=cuda: NVML does not answer ({error}); nvidia-smi on this node says more"
        ) from error
    try:
        return [
            _count(len(handles), config),
            _memory(nvml, handles, config.health),
            _errors(nvml, handles),
            _temperature(nvml, handles, config.health),
            _clocks(nvml, handles),
        ]
    finally:
        nvml.nvmlShutdown()


def _handles(nvml: Any) -> list[Any]:
    """The GPUs that processes of this job will see."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
    names = [name.strip() for name in visible.split(",") if name.strip()]
    return [
        nvml.nvmlDeviceGetHandleByIndex(int(name))
        if name.isdecimal()
        else nvml.nvmlDeviceGetHandleByUUID(name)
        for name in names
    ]


def _count(found: int, config: TrainConfig) -> Check:
    wanted = config.cluster.processes_per_node
    return judged("GPU count", found >= wanted, str(found), f"cluster.processes_per_node={wanted}")


def _over(name: str, faults: list[str], good: str, rule: str) -> Check:
    return judged(name, not faults, "; ".join(faults) or good, rule)


def _ask(nvml: Any, call: str, *arguments: Any) -> Any:
    """An answer of NVML, None where this kind of GPU or driver has none."""
    try:
        return getattr(nvml, call)(*arguments)
    except nvml.NVMLError as error:
        if error.value in (nvml.NVML_ERROR_NOT_SUPPORTED, nvml.NVML_ERROR_FUNCTION_NOT_FOUND):
            return None
        raise DeviceError(f"NVML's {call} failed: {error}") from error


def _memory(nvml: Any, handles: list[Any], health: HealthConfig) -> Check:
    faults, lowest = [], 1.0
    for index, handle in enumerate(handles):
        about = nvml.nvmlDeviceGetMemoryInfo(handle)
        free_frac = about.free / about.total
        lowest = min(lowest, free_frac)
        if free_frac < health.min_free_gpu_memory_frac:
            held = f"{(about.total - about.free) / 2**30:.1f} of {about.total / 2**30:.1f} GiB are in use"
            faults.append(f"GPU {index}: {held}")
    rule = f"at least health.min_free_gpu_memory_frac={health.min_free_gpu_memory_frac:g} is free"
    return _over("GPU memory", faults, f"at least {lowest:.1%} free", rule)


def _errors(nvml: Any, handles: list[Any]) -> Check:
    faults, silent = [], 0
    for index, handle in enumerate(handles):
        count = _ask(
            nvml,
            "nvmlDeviceGetTotalEccErrors",
            handle,
            nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED,
            nvml.NVML_VOLATILE_ECC,
        )
        rows = _ask(nvml, "nvmlDeviceGetRemappedRows", handle)
        silent += count is None
        if count:
            faults.append(f"GPU {index}: {count} uncorrected ECC errors since the driver was loaded")
        if rows is not None and (rows[2] or rows[3]):
            state = "failed" if rows[3] else "is pending until the GPU is reset"
            faults.append(f"GPU {index}: remapping of memory rows {state}")
    good = "none" if not silent else f"none; {silent} of {len(handles)} GPUs do not count ECC errors"
    return _over("GPU errors", faults, good, "no uncorrected ECC error, no pending or failed row remapping")


def _temperature(nvml: Any, handles: list[Any], health: HealthConfig) -> Check:
    degrees = [nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU) for handle in handles]
    limit = health.max_gpu_temperature_c
    faults = [f"GPU {index}: {value} C" for index, value in enumerate(degrees) if value > limit]
    good = f"at most {max(degrees, default=0)} C"
    return _over("GPU temperature", faults, good, f"at most health.max_gpu_temperature_c={limit:g} C")


def _clocks(nvml: Any, handles: list[Any]) -> Check:
    # The name changed in driver 535; older versions of nvidia-ml-py know the old one only.
    newer = hasattr(nvml, "nvmlDeviceGetCurrentClocksEventReasons")
    call = f"nvmlDeviceGetCurrentClocks{'Event' if newer else 'Throttle'}Reasons"
    faults = []
    for index, handle in enumerate(handles):
        reasons = _ask(nvml, call, handle) or 0
        names = [name for bit, name in _HELD_BACK.items() if reasons & bit]
        if names:
            faults.append(f"GPU {index}: {', '.join(names)}")
    return _over("GPU clocks", faults, "not held back", "no thermal, hardware or power-brake slowdown")
