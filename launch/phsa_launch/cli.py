"""`phsa-launch`: composes a run once and starts it, here or on a cluster; then watches it. Torch-free."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from phsa_launch import job_commands, local, multirun, submit
from phsa_launch.job_script import render
from phsa_megatron.config.compose import compose
from phsa_megatron.config.derive import derive
from phsa_megatron.config.errors import ConfigError, PhsaError
from phsa_megatron.config.prepare_run import inspect_run_folder
from phsa_megatron.config.schema import Scheduler, TrainConfig
from phsa_megatron.config.validate import validate

_DESCRIPTION = """\
Start a run with one process for each device. The settings are composed and checked once, here; the processes
read the resolved file. cluster=NAME says where: processes on this host, or a Slurm job that restarts itself.

  phsa-launch recipe=phsa_0p6b_pretrain_8gpu_h100_bf16_4k data.sources.dclm.weight=1 ...
  phsa-launch recipe=phsa_demo_cpu cluster.processes_per_node=2 optim.micro_batch_sequences=2 --dry-run
  phsa-launch recipe=mine cluster=slurm_h100 cluster.num_nodes=16 cluster.account=me
  phsa-launch recipe=mine cluster=slurm_h100 --dry-run         print the batch script, write and start nothing
  phsa-launch recipe=mine cluster=slurm_h100 --test-only       have Slurm check it, start nothing
  phsa-launch recipe=mine cluster=slurm_h100 --multirun optim.lr=1e-3,2e-3    one job for each value

Afterwards, each with --help:

  phsa-launch status RUN       state, step, time left, restarts with their causes, goodput
  phsa-launch logs RUN         the console, or one rank's log
  phsa-launch stop RUN         save and leave; jobs that wait are cancelled
  phsa-launch requeue RUN      submit the run's script again after a stop, or after it gave up
"""

COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "status": job_commands.status,
    "logs": job_commands.logs,
    "stop": job_commands.stop,
    "requeue": job_commands.requeue,
}
"""What can be done with a run that was started; anything else starts one."""


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code, or never returns when torchrun takes over the process."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        if argv and argv[0] in COMMANDS:
            return COMMANDS[argv[0]](argv[1:])
        return _start(_parser().parse_intermixed_args(argv))
    except PhsaError as error:
        print(f"phsa-launch: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="phsa-launch", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="recipe=NAME, GROUP=NAME, KEY=VALUE"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check everything and print the command or the batch script; write and start nothing",
    )
    parser.add_argument(
        "--test-only", action="store_true", help="have Slurm check the batch script; write and start nothing"
    )
    parser.add_argument(
        "--multirun",
        "-m",
        action="store_true",
        help="a sweep: values with commas, or choice(), range(), glob(); a job and a run folder for each",
    )
    parser.add_argument(
        "--recipes-dir", type=Path, help="your own folder of recipes, beside the built-in ones"
    )
    return parser


def _start(arguments: argparse.Namespace) -> int:
    if arguments.multirun:
        return multirun.start(
            arguments.overrides, arguments.recipes_dir, arguments.dry_run, arguments.test_only
        )
    config = compose(arguments.overrides, arguments.recipes_dir).config
    validate(config)
    if config.cluster.scheduler is Scheduler.local:
        if arguments.test_only:
            raise ConfigError(
                "--test-only asks Slurm, and cluster.scheduler is local; use --dry-run, or a Slurm cluster"
            )
        return local.start_here(config, arguments.dry_run)
    return _start_slurm(config, arguments.dry_run, arguments.test_only)


def _start_slurm(config: TrainConfig, dry_run: bool, test_only: bool) -> int:
    if dry_run:
        prepared = inspect_run_folder(config)
        # What is not the script goes to the error stream: `phsa-launch ... --dry-run > job.sbatch` works.
        print("\n".join([*prepared.messages, *derive(config).equations()]), file=sys.stderr)
        print(render(config, Path.cwd()), end="")
    elif test_only:
        inspect_run_folder(config)
        print(submit.check_with_slurm(config))
    else:
        print("\n".join(submit.submit_run(config).messages))
    return 0


if __name__ == "__main__":
    sys.exit(main())
