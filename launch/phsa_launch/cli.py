"""`phsa-launch`: composes a run once, writes its resolved file and starts its processes. Torch-free."""

from __future__ import annotations

import argparse
import importlib.util
import os
import shlex
import socket
import sys
from pathlib import Path
from typing import NoReturn

from phsa_megatron.config.compose import compose
from phsa_megatron.config.derive import derive
from phsa_megatron.config.environment import process_environment
from phsa_megatron.config.errors import ConfigError, PhsaError
from phsa_megatron.config.prepare_run import Start, inspect_run_folder, prepare_run_folder
from phsa_megatron.config.schema import TrainConfig
from phsa_megatron.config.validate import validate

_DESCRIPTION = """\
Start a run with one process for each device of this host. The settings are composed and checked once, here;
the processes read the resolved file.

  phsa-launch recipe=phsa_0p6b_pretrain_8gpu_h100_bf16_4k data.sources.dclm.weight=1 ...
  phsa-launch recipe=phsa_demo_cpu cluster.processes_per_node=2 optim.micro_batch_sequences=4 --dry-run
"""


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code, or never returns when torchrun takes over the process."""
    parser = argparse.ArgumentParser(
        prog="phsa-launch", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="recipe=NAME, GROUP=NAME, KEY=VALUE"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check everything and print the command; write and start nothing",
    )
    parser.add_argument(
        "--recipes-dir", type=Path, help="your own folder of recipes, beside the built-in ones"
    )
    arguments = parser.parse_intermixed_args(argv)
    try:
        return _launch(arguments.overrides, arguments.recipes_dir, arguments.dry_run)
    except PhsaError as error:
        print(f"phsa-launch: {error}", file=sys.stderr)
        return 2


def torchrun_command(config: TrainConfig, config_file: Path, port: int) -> list[str]:
    """Return the command that starts all processes of a run on this host.

    The rendezvous is static at 127.0.0.1: host names that do not resolve cannot make it hang.
    """
    return [
        sys.executable,
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


def _become(command: list[str], variables: dict[str, str]) -> NoReturn:
    """Replace this process, so that signals and the exit code are torchrun's own."""
    os.execvpe(command[0], command, {**os.environ, **variables})


def _launch(overrides: list[str], recipes_dir: Path | None, dry_run: bool) -> int:
    config = compose(overrides, recipes_dir).config
    validate(config)
    if config.cluster.num_nodes > 1:
        raise ConfigError(
            f"cluster.num_nodes={config.cluster.num_nodes}: phsa-launch starts processes on this host only, "
            "and jobs over several hosts are not part of this version; set cluster.num_nodes=1"
        )
    if importlib.util.find_spec("torch") is None and not dry_run:
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
    _become(command, variables)


if __name__ == "__main__":
    sys.exit(main())
