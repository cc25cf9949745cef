"""The adapter to nvidia-resiliency-ext: heartbeats to ft_launcher, if asked for and installed.

`health.resiliency=nvrx` with processes started by `ft_launcher` instead of torchrun: it restarts them where
they are (`--max-restarts`) when one ends or its heartbeats stop for `--ft-rank-heartbeat-timeout`. The run's
own watchdog goes on; give it the longer timeouts, or switch it off, to let ft_launcher decide.
"""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from phsa_megatron.config.errors import ConfigError, DeviceError
from phsa_megatron.config.schema import TrainConfig
from phsa_megatron.config.schema_health import Resiliency
from phsa_megatron.training.progress import Progress

SOCKET_VARIABLE = "FT_RANK_MONITOR_IPC_SOCKET"
"""Set by ft_launcher in the processes that it starts."""
_MIN_INTERVAL_S = 1.0


@contextmanager
def resilient(config: TrainConfig, progress: Progress) -> Iterator[None]:
    """Sends a heartbeat whenever this process moves on, at most one a second, until the end of the block.

    Raises:
        DeviceError: nvrx is asked for and not installed, or does not answer.
        ConfigError: nvrx is asked for and ft_launcher has not started this process.
    """
    if config.health.resiliency is Resiliency.none:
        yield
        return
    client = _connect()
    send = _rate_limited(client.send_heartbeat)
    progress.on_move.append(send)
    try:
        yield
    finally:
        progress.on_move.remove(send)
        # The monitor may have gone first: the end of the run is no moment to fail for it.
        with suppress(OSError, RuntimeError, client_error()):
            client.shutdown_workload_monitoring()


def client_error() -> type[Exception]:
    """The error that the client raises."""
    error: type[Exception] = _module().RankMonitorClientError
    return error


def _module() -> Any:
    try:
        return importlib.import_module("nvidia_resiliency_ext.fault_tolerance")
    except ImportError as error:
        raise DeviceError(
            f"health.resiliency=nvrx: nvidia-resiliency-ext cannot be imported ({error}); "
            "pip install 'phsa-megatron[resiliency]', or set health.resiliency=none"
        ) from error


def _connect() -> Any:
    module = _module()
    if not os.environ.get(SOCKET_VARIABLE):
        raise ConfigError(
            f"health.resiliency=nvrx: {SOCKET_VARIABLE} is not set, so ft_launcher has not started this "
            "process; start it with ft_launcher in the place of torchrun, or set health.resiliency=none"
        )
    client = module.RankMonitorClient()
    try:
        client.init_workload_monitoring()
    except (OSError, module.RankMonitorClientError) as error:
        raise DeviceError(f"health.resiliency=nvrx: the rank monitor does not answer: {error}") from error
    return client


def _rate_limited(send: Callable[[], None]) -> Callable[[], None]:
    last_s = 0.0

    def maybe_send() -> None:
        nonlocal last_s
        now_s = time.monotonic()
        if now_s - last_s >= _MIN_INTERVAL_S:
            last_s = now_s
            send()

    return maybe_send
