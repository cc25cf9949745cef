"""Rules between the settings of `health` and with others; `validate.py` lists them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from phsa_megatron.config.schema import Device, TrainConfig


def watchdog_timeouts(config: TrainConfig) -> Iterator[str]:
    """Yield the timeouts that the watchdog could not keep."""
    health = config.health
    shortest = 2 * health.heartbeat_every_s
    for name in ("step_timeout_s", "data_timeout_s", "first_step_timeout_s", "long_phase_timeout_s"):
        value = getattr(health, name)
        if value < shortest:
            yield (
                f"health.{name}={value:g}: the watchdog looks every health.heartbeat_every_s="
                f"{health.heartbeat_every_s:g} s, so it cannot be shorter than two looks; use at least "
                f"{shortest:g}, or a smaller health.heartbeat_every_s"
            )


def local_copy(config: TrainConfig) -> Iterator[str]:
    """Yield what is wrong with the place of the local checkpoint copy."""
    local = config.checkpoint.local_copy_dir
    if local is not None and not Path(local).is_absolute():
        yield (
            f"checkpoint.local_copy_dir={local}: it names a folder on each node's own disk, whatever the "
            "process's working folder; use an absolute path"
        )


def gpu_scores(config: TrainConfig) -> Iterator[str]:
    """Yield why kernels cannot be timed."""
    every = config.health.gpu_scores_every_steps
    if every == 0:
        return
    if config.cluster.device != Device.cuda:
        yield (
            f"health.gpu_scores_every_steps={every}: it times kernels of GPUs, and cluster.device="
            f"{config.cluster.device.value}; set it to 0 (monitoring.alerts tells of slow processes anywhere)"
        )
    if config.monitoring.profile.first_step:
        yield (
            f"health.gpu_scores_every_steps={every}: only one can time kernels, and monitoring.profile."
            f"first_step={config.monitoring.profile.first_step} asks for a trace; set one of them to 0"
        )
