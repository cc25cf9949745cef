"""Small training runs on the test cluster: start, hold at a step, compare with the uninterrupted run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from phsa_megatron.config.records import Records, read_records
from phsa_megatron.config.run_folder import RunFolder
from tests.launch.slurm_cluster import SlurmCluster, wait_until

ROOT = Path(__file__).resolve().parents[2]
STEPS = 30
SAVE_EVERY = 10
# The demo model on real text, with two layers and short sequences: most of a job's time is importing torch.
SETTINGS = (
    *("recipe=phsa_demo_cpu", "cluster=slurm_cpu", "monitoring=quiet", "cluster.preflight=false"),
    *("model.num_layers=2", "data.seq_len_tokens=64", "run.num_threads=1", "run.sample_prompts=[]"),
    *(f"run.train_steps={STEPS}", "optim.warmup_steps=2", "optim.decay_steps=10"),
    *(
        f"checkpoint.save_every_steps={SAVE_EVERY}",
        "checkpoint.keep_last=10",
        "optim.micro_batch_sequences=1",
    ),
    *("evaluate.every_steps=0", "evaluate.num_sequences_per_domain=4", "evaluate.micro_batch_sequences=1"),
    *("cluster.environment.GLOO_SOCKET_IFNAME=lo", "cluster.environment.PYTHONWARNINGS=ignore"),
)


class Workplace:
    """A folder with the demo's data, from which runs are launched onto a cluster."""

    def __init__(self, cluster: SlurmCluster, folder: Path) -> None:
        self.cluster = cluster
        self.folder = folder
        paths = os.pathsep.join(str(ROOT / part) for part in ("", "kernels", "launch"))
        self.environment = cluster.environment | {
            "PYTHONPATH": paths,
            "OMP_NUM_THREADS": "1",
            "COLUMNS": "200",
        }
        self._module("phsa_megatron.cli", "prepare-demo")

    def launch(self, *arguments: str, succeeds: bool = True) -> str:
        """Return what `phsa-launch` says."""
        return self._module("phsa_launch.cli", *arguments, succeeds=succeeds)

    def submit(self, name: str, *settings: str) -> SlurmRun:
        """Start a run; later settings win."""
        chosen = {text.split("=", 1)[0]: text for text in (*SETTINGS, f"run.name={name}", *settings)}
        self.launch(*chosen.values())
        return self.run(name)

    def run(self, name: str) -> SlurmRun:
        """Return a run that was started."""
        return SlurmRun(self, RunFolder(self.folder / "runs" / name))

    def _module(self, module: str, *arguments: str, succeeds: bool = True) -> str:
        done = subprocess.run(
            [sys.executable, "-m", module, *arguments],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
        )
        assert (done.returncode == 0) == succeeds, done.stdout + done.stderr
        return done.stdout + done.stderr


class SlurmRun:
    """A run that was submitted."""

    def __init__(self, place: Workplace, folder: RunFolder) -> None:
        self.place = place
        self.folder = folder

    @property
    def job_ids(self) -> list[str]:
        """The run's jobs, oldest first."""
        return self.folder.job_ids_file.read_text().split()

    @property
    def console(self) -> str:
        """All lines on the consoles of the run's jobs."""
        logs = (self.folder.path / f"slurm-{job_id}.log" for job_id in self.job_ids)
        return "".join(log.read_text() for log in logs if log.exists())

    @property
    def attempts(self) -> list[dict[str, Any]]:
        """The lines of restarts.jsonl."""
        if not self.folder.restarts_file.exists():
            return []
        return [json.loads(line) for line in self.folder.restarts_file.read_text().splitlines()]

    @property
    def causes(self) -> list[str]:
        """Why each attempt ended."""
        return [attempt["cause"] for attempt in self.attempts]

    def wait(self, timeout_s: float = 240.0) -> dict[str, str]:
        """Return the last job's fields once it is over."""
        return self.place.cluster.wait_for_job(self.job_ids[-1], timeout_s)

    def wait_for_console(self, text: str, timeout_s: float = 120.0) -> None:
        """Wait until a text is on the console."""
        wait_until(lambda: text in self.console, timeout_s, f"{text!r} is not on the console")

    def rank_processes(self) -> dict[int, int]:
        """Return the process of each rank that is training now."""
        found = {}
        for pid in self.place.cluster.processes():
            try:
                words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            except OSError:
                continue
            if b"phsa_megatron.train" in words and bytes(self.folder.config_file) in words:
                ranks = [field[5:] for field in environment if field.startswith(b"RANK=")]
                found.update({int(rank): pid for rank in ranks})
        return found

    @contextmanager
    def held_after(self, step: int) -> Iterator[None]:
        """Hold all ranks still from when a step is committed until the block ends, like a very slow machine.

        Slurm sends CONT before TERM, so they are stopped again and again.
        """

        def committed() -> bool:
            file = self.folder.committed_step
            return file.exists() and int(file.read_text()) >= step

        wait_until(committed, 180, f"step {step} is not committed; console:\n{self.console}")
        released = threading.Event()

        def hold() -> None:
            while not released.wait(0.1):
                _signal_all(self.rank_processes(), signal.SIGSTOP)

        held = self.rank_processes()
        _signal_all(held, signal.SIGSTOP)
        assert held, "the run ended before it could be held"
        holder = threading.Thread(target=hold)
        holder.start()
        try:
            yield
        finally:
            released.set()
            holder.join()
            _signal_all(self.rank_processes(), signal.SIGCONT)

    def records(self) -> Records:
        """Return what counts of metrics.jsonl."""
        return read_records(self.folder.metrics_file)

    def curve(self) -> dict[str, list[float]]:
        """Return loss, gradient norm and learning rate; every step from 1 to the last is there once."""
        records = self.records()
        curves = {}
        for name in ("train/loss_nats", "optim/grad_norm", "optim/lr"):
            steps, curves[name] = records.series(name)
            assert steps == list(range(1, STEPS + 1))
        return curves


def _signal_all(processes: dict[int, int], number: signal.Signals) -> None:
    for pid in processes.values():
        with suppress(ProcessLookupError):
            os.kill(pid, number)
