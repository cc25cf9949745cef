"""A run that goes from N processes to N / 2 and back, beside one that stays: same data, same loss.

Real runs (`python -m phsa_megatron.train`), asked to leave by `RUN/exit` wherever they are by then, and
started again in another layout. Tokens with a loss are counted and differ from sequence to sequence: their
sums must be equal at every step. A first step after a change has the weights of the run that stays, but for
the roundings of the steps before: its loss may differ by one unit times the root of their number, and few
other steps' losses may fit.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from phsa_megatron.config.prepare_run import prepare_run_folder
from phsa_megatron.config.records import read_records
from phsa_megatron.config.run_folder import RunFolder
from phsa_megatron.config.schema import Device, Dtype, SourceConfig, TrainConfig, WandbMode
from phsa_megatron.data.bpe import train_bpe
from phsa_megatron.data.prepare import PrepareRequest, prepare
from tests.distributed.layout_matrix import CP2, PP2, SP, TP2
from tests.distributed.multi_gpu_layouts import Size, layout_config
from tests.distributed.multi_gpu_start import cpu_threads, environments, served_store

VOCAB = 300
WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat,",
    "and",
    "dog",
    "ran",
    "off.",
    "why",
    "not?",
    "red;",
    "blue",
    "green",
]
LAYOUT_OF = {1: {}, 2: CP2, 4: TP2 | SP | CP2, 8: TP2 | SP | CP2 | PP2}
MOST_OTHERS_FRAC = 0.25
"""Share of all steps whose loss may be as near as the right one's: more, and the bound shows nothing."""


def prepare_text(folder: Path) -> None:
    """Write a tokenizer and a training set of documents that a small model learns something from."""
    texts = [" ".join(random.Random(i).choices(WORDS[i % 5 :], k=40 + 37 * (i % 11))) for i in range(400)]
    folder.mkdir(parents=True, exist_ok=True)
    train_bpe(texts[:50], vocab_size=VOCAB).save(str(folder / "tokenizer.json"))
    source = folder / "text.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    prepare(PrepareRequest([source], folder / "train", folder / "tokenizer.json"))


def run_config(folder: Path, name: str, size: Size, processes: int, num_steps: int) -> TrainConfig:
    """Return the settings of one start."""
    config = layout_config(size, processes, LAYOUT_OF[processes])
    config.run.name, config.run.root_dir, config.run.train_steps = name, str(folder / "runs"), num_steps
    config.model.name = config.data.name = config.cluster.name = "multi_gpu"
    # A multiple of 64 times every tensor size: rows of padding are in the softmax, and would change the loss.
    config.model.vocab_size = 384
    config.data.tokenizer_file = str(folder / "tokenizer.json")
    prefix = str(folder / "train")
    config.data.sources = {"text": SourceConfig(1.0, "text", prefix, prefix)}
    config.optim = replace(config.optim, warmup_steps=2, decay_steps=2, lr=3e-3)
    config.evaluate.num_sequences_per_domain = 1
    config.checkpoint.save_every_steps = 0
    config.monitoring.report, config.monitoring.progress = False, False
    config.monitoring.wandb.mode = WandbMode.disabled
    return config


class Started:
    """The processes of one start of a run."""

    def __init__(self, config: TrainConfig, logs: Path) -> None:
        folder = prepare_run_folder(config).folder
        processes = config.cluster.processes_per_node
        self.folder, self.log, self._store = folder, logs, served_store()
        threads = cpu_threads(processes, on_gpus=config.cluster.device == Device.cuda)
        with logs.open("w") as out:
            self.processes = [
                subprocess.Popen(
                    [sys.executable, "-m", "phsa_megatron.train", str(folder.config_file)],
                    env=environment,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
                for environment in environments(processes, self._store.port, threads)
            ]

    def wait(self, until: Callable[[], bool], deadline_s: float) -> None:
        """Wait until something is so or all have ended; raise with the end of the log if one failed."""
        while True:
            codes = [process.poll() for process in self.processes]
            late = time.monotonic() > deadline_s
            if any(codes) or late:
                self.kill()
                text = self.log.read_text()[-6000:]
                raise RuntimeError(
                    f"{self.folder.path}: {'too late' if late else f'ended with {codes}'}\n{text}"
                )
            if None not in codes or until():
                return
            time.sleep(0.02)

    def kill(self) -> None:
        """End the processes and their own."""
        for process in self.processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def last_step(folder: RunFolder) -> int:
    """Return the last step in the records."""
    if not folder.metrics_file.exists():
        return 0
    return max(curve(folder), default=0)


def curve(folder: RunFolder) -> dict[int, tuple[float, float]]:
    """Return {step: (loss, tokens with a loss so far)}."""
    values = read_records(folder.metrics_file).values_by_step
    return {
        step: (row["train/loss_nats"], row["progress/consumed_tokens"])
        for step, row in values.items()
        if "train/loss_nats" in row
    }


def run_case(size: Size, processes: int, folder: Path, seconds: float) -> dict[str, Any]:
    """Run both and compare them. Raises with a log if a process fails or time is over."""
    num_steps = 12 if size.device == Device.cpu else 40
    deadline_s = time.monotonic() + seconds
    prepare_text(folder)
    half = max(1, processes // 2)
    started: list[Started] = []

    def start(name: str, count: int) -> Started:
        config = run_config(folder, name, size, count, num_steps)
        started.append(Started(config, folder / f"{name}_{len(started)}.log"))
        return started[-1]

    try:
        stays = start("stays", processes)
        changes, stops = [], []
        for part, count in enumerate((processes, half, processes), start=1):
            one = start("changes", count)
            if part < 3:
                target = last_step(one.folder) + num_steps // 4
                one.wait(lambda one=one, target=target: last_step(one.folder) >= target, deadline_s)
                one.folder.exit_request.touch()
            one.wait(lambda: False, deadline_s)
            stops.append(last_step(one.folder))
            changes.append(count)
        stays.wait(lambda: False, deadline_s)
        expected, found = curve(stays.folder), curve(started[-1].folder)
    finally:
        for one in started:
            one.kill()
    return compare(expected, found, stops, size) | {"processes": changes, "stops": stops}


def compare(
    expected: dict[int, tuple[float, float]],
    found: dict[int, tuple[float, float]],
    stops: list[int],
    size: Size,
) -> dict[str, Any]:
    """Return how the two runs differ, and `passed`."""
    same_tokens = {s: t for s, (_, t) in expected.items()} == {s: t for s, (_, t) in found.items()}
    unit = 2.0**-9 if size.dtype == Dtype.bf16 else 2.0**-20
    firsts = []
    for stop in stops[:-1]:
        step = stop + 1
        if step not in expected:
            return {"passed": False, "reason": f"the run was over before it could change at step {stop}"}
        loss, bound = expected[step][0], unit * step**0.5
        fits = sum(abs(other / found[step][0] - 1) <= bound for other, _ in expected.values())
        firsts.append(
            {"step": step, "loss": found[step][0], "loss_of_the_other": loss, "bound_frac": bound,
             "distance_frac": abs(found[step][0] / loss - 1), "steps_that_fit_frac": fits / len(expected)}
        )  # fmt: skip
    worst = max(abs(found[s][0] / expected[s][0] - 1) for s in expected) if same_tokens else float("nan")
    near = all(one["distance_frac"] <= one["bound_frac"] for one in firsts)
    shown = all(one["steps_that_fit_frac"] <= MOST_OTHERS_FRAC for one in firsts)
    return {
        "same_data": same_tokens, "first_steps": firsts, "largest_loss_distance_frac": worst,
        "passed": same_tokens and near and shown, "near": near, "bound_shows_something": shown,
    }  # fmt: skip
