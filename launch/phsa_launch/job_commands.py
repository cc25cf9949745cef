"""`phsa-launch status|logs|stop|requeue RUN`: what a person does with a run that was started."""

from __future__ import annotations

import argparse
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console

from phsa_launch import slurm_commands
from phsa_launch.job_script import job_log, job_name
from phsa_launch.run_status import print_status
from phsa_launch.submit import refuse_a_second_job, submit_script
from phsa_megatron.config.errors import ConfigError
from phsa_megatron.config.resolved import load
from phsa_megatron.config.run_folder import RunFolder
from phsa_megatron.config.schema import Scheduler, TrainConfig

_FOLLOW_EVERY_S = 1.0


def status(argv: list[str]) -> int:
    """Print the state of runs; returns the exit code."""
    parser = _parser("status", "State, last step, time left, restarts with their causes, goodput.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders")
    for path in parser.parse_args(argv).runs:
        folder, config = _open(path)
        print_status(folder, config, Console())
    return 0


def logs(argv: list[str]) -> int:
    """Print a log; returns the exit code."""
    parser = _parser("logs", "The console of the last job (or of a local run's ranks), or one rank's log.")
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder")
    parser.add_argument("--rank", type=int, help="this rank's own log instead of the console")
    parser.add_argument("--list", action="store_true", help="only name the logs that there are")
    parser.add_argument("-n", "--lines", type=int, default=50, help="how many lines from the end (50)")
    parser.add_argument("-f", "--follow", action="store_true", help="wait for more, until Ctrl-C")
    arguments = parser.parse_args(argv)
    folder, _ = _open(arguments.run)
    if arguments.list:
        found = [*_job_logs(folder), *sorted(folder.logs_dir.rglob("*.*"))]
        print("\n".join(str(path) for path in found) or f"no logs yet in {folder.path}")
        return 0
    path = _log(folder, arguments.rank)
    with path.open(encoding="utf-8", errors="replace") as stream:
        print("".join(deque(stream, maxlen=max(0, arguments.lines))), end="", flush=True)
        if arguments.follow:
            for text in _follow(stream.readline):
                print(text, end="", flush=True)
    return 0


def stop(argv: list[str]) -> int:
    """Ask a run to save and leave, and cancel jobs that wait; returns the exit code."""
    parser = _parser("stop", "Ask the run to save and leave for good; jobs of it that wait are cancelled.")
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder")
    parser.add_argument(
        "--now", action="store_true", help="cancel the running job too: it has seconds to save"
    )
    arguments = parser.parse_args(argv)
    folder, config = _open(arguments.run)
    if config.cluster.scheduler is Scheduler.local:
        folder.exit_request.touch()
        print(f"asked to leave ({folder.exit_request}): the run saves after its present step and ends")
        return 0
    live = [job for job in slurm_commands.jobs_named(job_name(folder)) if not job.is_over]
    waiting = [job.job_id for job in live if job.state == "PENDING"]
    running = [job.job_id for job in live if job.state != "PENDING"]
    if waiting:
        slurm_commands.cancel(waiting)
        print(f"cancelled what waited: {', '.join(waiting)}")
    if running and arguments.now:
        slurm_commands.cancel(running)
        print(f"cancelled: {', '.join(running)}")
    elif running:
        folder.exit_request.touch()
        print(f"asked job {running[0]} to leave: it saves after its present step and ends")
    if not live:
        print(f"no job of {folder.path} waits or runs")
    return 0


def requeue(argv: list[str]) -> int:
    """Submit a run's batch script again; returns the exit code."""
    parser = _parser(
        "requeue",
        "Submit RUN/job.sbatch again, as it is: after a stop, or after the run gave up. It goes on from the "
        "last committed step. To change settings, start phsa-launch again with all of them instead.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder")
    folder, config = _open(parser.parse_args(argv).run)
    if config.cluster.scheduler is Scheduler.local or not folder.job_script.is_file():
        raise ConfigError(
            f"{folder.path} is no Slurm job ({folder.job_script.name} is not there): start it again with the "
            "command it was started with"
        )
    if folder.done.exists():
        print(f"{folder.path} is done; nothing is left to do")
        return 0
    refuse_a_second_job(folder)
    _, messages = submit_script(folder, config.cluster.chain)
    print("\n".join(messages))
    return 0


def _parser(name: str, description: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(prog=f"phsa-launch {name}", description=description)


def _open(path: Path) -> tuple[RunFolder, TrainConfig]:
    folder = RunFolder(path)
    if not folder.config_file.is_file():
        raise ConfigError(
            f"{path} is no run folder: {folder.config_file} is not there. Name one, like runs/mine"
        )
    return folder, load(folder.config_file)


def _job_logs(folder: RunFolder) -> list[Path]:
    """Return the consoles of all jobs, oldest first."""
    if not folder.job_ids_file.is_file():
        return []
    ids = folder.job_ids_file.read_text(encoding="utf-8").split()
    return [path for path in (job_log(folder, job_id) for job_id in ids) if path.is_file()]


def _log(folder: RunFolder, rank: int | None) -> Path:
    if rank is None:
        found = _job_logs(folder)
        missing = "no job of it has started; a local run prints to its terminal"
    else:
        found = sorted(folder.logs_dir.glob(f"node_*/rank_{rank:05d}.log"), key=lambda p: p.stat().st_mtime)
        missing = f"rank {rank} has no log; see phsa-launch logs {folder.path} --list"
    if not found:
        raise ConfigError(f"{folder.path}: {missing}")
    return found[-1]


def _follow(readline: Callable[[], str]) -> Iterator[str]:
    while True:
        text = readline()
        if text:
            yield text
        else:
            time.sleep(_FOLLOW_EVERY_S)
