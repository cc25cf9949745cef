"""Starts a run on this host: one torchrun, which takes over this process."""

from __future__ import annotations

import importlib.util
import os
import shlex
import socket
import sys
from pathlib import Path
from typing import NoReturn

from phsa_megatron.config.derive import derive
from phsa_megatron.config.environment import process_environment
from phsa_megatron.config.errors import ConfigError
from phsa_megatron.config.prepare_run import Start, inspect_run_folder, prepare_run_folder
from phsa_megatron.config.schema import TrainConfig


def torchrun_command(config: TrainConfig, config_file: Path, port: int) -> list[str]:
    """Return the command that starts all processes of a run on this host.

    The rendezvous is static at 127.0.0.1: host names that do not resolve cannot make it hang.
    """
    return [
        config.cluster.python or sys.executable,
        "-m",
        "torch.distributed.run",
        "--nnodes=1",
        f"--nproc-per-node={config.cluster.processes_per_node}",
        "--rdzv-backend=static",
        "--master-addr=127.0.0.1",
        f"--master-port={port}",
        "-m",
        "phsa_megatron.train",
        str(config_file),
    ]


def free_port() -> int:
    """Return a TCP port of 127.0.0.1 that nobody listens on at this moment."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    assert isinstance(port, int)
    return port


def start_here(config: TrainConfig, dry_run: bool) -> int:
    """Start a checked run; returns the exit code, or never returns when torchrun takes over the process.

    Raises:
        ConfigError: the run needs more than this host has.
    """
    if config.cluster.num_nodes > 1:
        raise ConfigError(
            f"cluster.num_nodes={config.cluster.num_nodes}: cluster.scheduler=local starts processes on this "
            "host only; choose a Slurm cluster (cluster=slurm_h100), or set cluster.num_nodes=1"
        )
    if importlib.util.find_spec("torch") is None and config.cluster.python is None and not dry_run:
        raise ConfigError(
            "torch is not installed here, so nothing can train; install phsa-megatron[cpu] or "
            "phsa-megatron[gpu], or add --dry-run to check the settings only"
        )
    prepared = inspect_run_folder(config) if dry_run else prepare_run_folder(config)
    print("\n".join(prepared.messages))
    if prepared.start == Start.finished:
        return 0
    command = torchrun_command(config, prepared.folder.config_file.resolve(), free_port())
    variables = process_environment(config)
    shown = [f"{name}={shlex.quote(value)}" for name, value in variables.items()]
    shown.append(shlex.join(command))
    if dry_run:
        print("\n".join(derive(config).equations()))
        print(f"resolved file (a dry run does not write it): {prepared.folder.config_file.resolve()}")
        print(f"command: {' '.join(shown)}")
        return 0
    print(f"resolved file: {prepared.folder.config_file.resolve()}")
    print(f"command: {' '.join(shown)}")
    sys.stdout.flush()
    return _become(command, variables)


def _become(command: list[str], variables: dict[str, str]) -> NoReturn:
    """Replace this process, so that signals and the exit code are torchrun's own."""
    os.execvpe(command[0], command, {**os.environ, **variables})
