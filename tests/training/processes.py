"""Training processes of a run, started and watched as processes of their own: forks with all imports done."""

from __future__ import annotations

import json
import socket
import time
from dataclasses import dataclass
from typing import Any

from phsa_megatron.config.prepare_run import prepare_run_folder
from phsa_megatron.config.run_folder import RunFolder
from phsa_megatron.config.schema import TrainConfig
from tests.forks import ROOT, Fork, environment

__all__ = ["ROOT", "Ended", "environment", "finish", "free_port", "run_processes", "start"]
TIMEOUT_S = 240
TRAIN = "phsa_megatron.train:main"


@dataclass(frozen=True)
class Ended:
    """How the processes of a run ended, in the order of their ranks."""

    codes: list[int]
    stdout: list[str]
    stderr: list[str]
    seconds: float
    folder: RunFolder

    def failures(self, rank: int) -> list[dict[str, Any]]:
        """Lines that a process left."""
        path = self.folder.logs_dir / f"error_rank_{rank:05d}.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def everything(self) -> str:
        """All that was printed, for a failing assertion."""
        return "\n".join([f"codes {self.codes}", *self.stdout, *self.stderr])


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start(config: TrainConfig, ranks: list[int], call: str = TRAIN, **more: str) -> list[Fork]:
    """Start some of the processes of a run."""
    folder = prepare_run_folder(config).folder
    world_size = config.cluster.num_nodes * config.cluster.processes_per_node
    shared = environment(
        WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()), **more
    )
    return [
        Fork(
            call,
            [str(folder.config_file)],
            shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in ranks
    ]


def finish(config: TrainConfig, processes: list[Fork], began_s: float) -> Ended:
    """Wait for processes and return how they ended; none is left behind."""
    try:
        printed = [process.communicate(timeout=TIMEOUT_S) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return Ended(
        [process.returncode or 0 for process in processes],
        [out for out, _ in printed],
        [err for _, err in printed],
        time.monotonic() - began_s,
        RunFolder.of(config),
    )


def run_processes(config: TrainConfig, ranks: list[int], call: str = TRAIN, **more: str) -> Ended:
    """Start some of the processes of a run and wait for them."""
    began_s = time.monotonic()
    return finish(config, start(config, ranks, call, **more), began_s)
