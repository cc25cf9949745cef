"""Random faults over a run of the demo model: all survived, to the last bit, and at what cost.

    python tests/e2e/random_faults.py --faults 100 --output docs/results

Two processes over gloo train the demo model in a tiny shape, with saves in the background. Each start gets
one fault (kind, process, step and phase drawn from a seed), or is killed from outside as a lost node is; it
is started again until the wanted number of faults has happened, and then left to finish. Shown at the end:
loss, gradient norm and zero count of every step equal an uninterrupted run's, also of steps run twice; none
is missing. With --fork the processes are forked from one that has imported torch: a start costs a second
instead of ten, and recovery is measured without those.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from phsa_megatron.config.compose import compose
from phsa_megatron.config.goodput import Goodput
from phsa_megatron.config.prepare_run import prepare_run_folder
from phsa_megatron.config.run_folder import RunFolder
from phsa_megatron.config.schema import TrainConfig
from phsa_megatron.monitoring.records import read_records

sys.path.insert(0, str(Path(__file__).parent))
from process_starts import Process, fork, import_everything, spawn
from random_faults_report import write

from phsa_megatron.training.verify_resume import COMPARED, compare_curves, read_curve

ROOT = Path(__file__).resolve().parents[2]
SAVE_EVERY, EVALUATE_EVERY = 5, 10
KINDS = ("crash", "kill", "exit", "sigterm", "hang", "node")
PHASES = ("data", "forward", "backward", "optimizer", "checkpoint", "evaluate", "start")
WORLD_SIZE = 2
STALLED_AFTER_S = 240.0
# What a launcher grants the processes that are left when one has failed, before it kills them.
GRACE_S = 30.0
SETTINGS = (
    "recipe=phsa_demo_cpu", "run.num_threads=1", "run.sample_prompts=[]", "model.num_layers=2",
    "model.hidden_size=64", "model.ffn_hidden_size=128", "model.num_query_heads=4", "model.num_kv_heads=2",
    "model.head_dim=16", "data.seq_len_tokens=128", "attention.local_tokens=32", "optim.warmup_steps=10",
    "optim.decay_steps=20", "optim.global_batch_sequences=4", "optim.micro_batch_sequences=1",
    f"checkpoint.save_every_steps={SAVE_EVERY}", "checkpoint.async_save=true",
    f"evaluate.every_steps={EVALUATE_EVERY}", "evaluate.num_sequences_per_domain=2",
    "evaluate.micro_batch_sequences=1", f"cluster.processes_per_node={WORLD_SIZE}",
    "monitoring.wandb.mode=disabled", "monitoring.report=false", "monitoring.progress=false",
    "health.heartbeat_every_s=1", "health.step_timeout_s=10", "health.data_timeout_s=10",
    "health.long_phase_timeout_s=30", "health.first_step_timeout_s=30", "health.start_timeout_s=60",
)  # fmt: skip


@dataclass
class Fault:
    """One fault and what it cost."""

    number: int
    kind: str
    phase: str
    step: int
    rank: int
    codes: list[int]
    resumed_from_step: int
    happened_unix_s: float
    recovered_s: float | None = None
    """From the fault to the end of the first step that had not been made before."""


def draw(generator: random.Random, committed: int) -> tuple[str, str, int, int]:
    """A kind, a phase, a step soon after the committed one, and a rank."""
    kind, phase = generator.choice(KINDS), generator.choice(PHASES)
    rank, step = generator.randrange(WORLD_SIZE), committed + generator.randint(1, 8)
    if kind == "node":
        return kind, "any", step, rank
    every = {"checkpoint": SAVE_EVERY, "evaluate": EVALUATE_EVERY}.get(phase)
    if every is not None:
        step = (committed // every + 1) * every
    if phase == "start":
        # A process that hangs before it starts would hold the others for health.start_timeout_s.
        return ("crash" if kind in ("hang", "sigterm") else kind), phase, 0, rank
    return kind, phase, step, rank


class Trial:
    """One run folder, started again and again."""

    def __init__(self, config: TrainConfig, log: Path, *, forks: bool) -> None:
        self.config, self.folder, self.log = config, RunFolder.of(config), log
        self.forks = forks
        self.num_killed_waiting = 0

    def committed(self) -> int:
        path = self.folder.committed_step
        return int(path.read_text()) if path.exists() else 0

    def start(self, fault: str) -> list[Process]:
        prepare_run_folder(self.config)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        path = os.pathsep.join(str(ROOT / part) for part in (".", "kernels", "launch"))
        shared = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PHSA_FAULT": fault, "MASTER_PORT": port}
        shared |= {"WORLD_SIZE": str(WORLD_SIZE), "MASTER_ADDR": "127.0.0.1"}
        begin = fork if self.forks else spawn
        file = self.folder.config_file
        with self.log.open("ab") as log:
            return [
                begin(file, shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, log)
                for rank in range(WORLD_SIZE)
            ]

    def run(self, fault: str = "", kill_after_step: int | None = None) -> tuple[list[int], float | None]:
        """Start, wait for the end and return the exit codes and the time of a kill from outside."""
        num_lines = self._num_lines()
        processes = self.start(fault)
        killed_unix_s, ended_s = None, None
        began_s = time.monotonic()
        while any(process.poll() is None for process in processes):
            time.sleep(0.05)
            now_s = time.monotonic()
            if (
                kill_after_step is not None
                and killed_unix_s is None
                and self._reached(num_lines, kill_after_step)
            ):
                killed_unix_s = time.time()
                _kill(processes)
            if ended_s is None and any(process.poll() for process in processes):
                ended_s = now_s
            if ended_s is not None and now_s - ended_s > GRACE_S:
                self.num_killed_waiting += 1
                _kill(processes)
            if now_s - began_s > STALLED_AFTER_S and ended_s is None and fault:
                _kill(processes)
                raise SystemExit(f"no end after {STALLED_AFTER_S:.0f} s with {fault}; see {self.log}")
        _kill(processes)  # whatever they started
        return [process.returncode for process in processes], killed_unix_s

    def _num_lines(self) -> int:
        path = self.folder.metrics_file
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def _reached(self, num_lines: int, step: int) -> bool:
        """Whether this start has logged a step."""
        path = self.folder.metrics_file
        if not path.exists():
            return False
        lines = path.read_bytes().split(b"\n")[num_lines:-1]
        return any(json.loads(line).get("step", -1) >= step for line in lines if b'"values"' in line)


def _kill(processes: list[Process]) -> None:
    """Kill everything that the processes started, too: a lost node leaves nothing."""
    for process in processes:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    for process in processes:
        process.wait()


def inject(trial: Trial, number: int, generator: random.Random) -> Fault:
    """One start with one fault, which must have happened."""
    committed = trial.committed()
    kind, phase, step, rank = draw(generator, committed)
    killed_unix_s = None
    if kind == "node":
        codes, killed_unix_s = trial.run(kill_after_step=step)
        happened_unix_s = killed_unix_s
    else:
        where = f"phase={phase}" if phase == "start" else f"step={step},phase={phase}"
        text = f"{kind}@rank={rank},{where},times={number}"
        codes, _ = trial.run(text)
        records = [json.loads(line) for line in trial.folder.faults_file.read_text().splitlines()]
        happened_unix_s = records[-1]["time_unix_s"] if records and records[-1]["fault"] == text else None
    if happened_unix_s is None:
        raise SystemExit(f"fault {number} ({kind} at step {step}, {phase}) did not happen; see {trial.log}")
    expected_zero = kind == "sigterm"
    if (codes == [0] * WORLD_SIZE) != expected_zero:
        raise SystemExit(f"fault {number} ({kind} at step {step}, {phase}) ended with codes {codes}")
    return Fault(number, kind, phase, step, rank, codes, trial.committed(), happened_unix_s)


def measure_recovery(folder: RunFolder, faults: list[Fault]) -> None:
    """Fill in when each fault was made good: the end of the first step after it that was new."""
    firsts = dict[int, float]()  # when a step was made for the first time
    for line in folder.metrics_file.read_bytes().split(b"\n")[:-1]:
        record = json.loads(line)
        values = record.get("values", {})
        if COMPARED[0] in values and record["step"] not in firsts:
            firsts[record["step"]] = record["time"]
    for fault in faults:
        after = [when for when in firsts.values() if when > fault.happened_unix_s]
        fault.recovered_s = round(min(after) - fault.happened_unix_s, 2) if after else None


def main() -> int:
    """Run the trial; returns 0 if every bit is as without faults."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--faults", type=int, default=100, help="how many faults (default: 100)")
    parser.add_argument("--fork", action="store_true", help="fork starts from one process: faster")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps-per-fault", type=int, default=6, help="length of the run, in steps a fault")
    parser.add_argument("--work", type=Path, default=Path("random_faults"), help="folder for data and runs")
    parser.add_argument("--output", type=Path, help="write NAME.json and NAME.md here")
    parser.add_argument("--name", default="random_faults", help="of the two files")
    arguments = parser.parse_args()
    work = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    os.chdir(work)
    if not (work / "prepared" / "demo").exists():
        path = os.pathsep.join(str(ROOT / part) for part in (".", "kernels", "launch"))
        subprocess.run(
            [sys.executable, "-m", "phsa_megatron.cli", "prepare-demo"],
            env=os.environ | {"PYTHONPATH": path},
            check=True,
        )
    trials = {}
    steps = arguments.faults * arguments.steps_per_fault
    for name in ("straight", "faulty"):
        own = [f"run.name={name}_{arguments.faults}", f"run.root_dir={work}/runs", f"run.train_steps={steps}"]
        trials[name] = Trial(compose([*SETTINGS, *own]).config, work / f"{name}.log", forks=arguments.fork)
        if trials[name].folder.path.exists():
            raise SystemExit(f"{trials[name].folder.path} is there already: remove it, or use another --work")
    if arguments.fork:
        import_everything()
    began_s = time.monotonic()
    codes, _ = trials["straight"].run()
    straight_s = time.monotonic() - began_s
    print(f"uninterrupted: {steps} steps in {straight_s:.0f} s, codes {codes}", flush=True)

    generator, faults, began_s = random.Random(arguments.seed), [], time.monotonic()
    trial = trials["faulty"]
    while len(faults) < arguments.faults:
        fault = inject(trial, len(faults) + 1, generator)
        faults.append(fault)
        left_s = (time.monotonic() - began_s) / len(faults) * (arguments.faults - len(faults))
        print(
            f"fault {fault.number}/{arguments.faults}: {fault.kind} at step {fault.step}, {fault.phase}, "
            f"rank {fault.rank}: codes {fault.codes}, committed {fault.resumed_from_step}, "
            f"{left_s / 60:.0f} min left",
            flush=True,
        )
        if fault.resumed_from_step + 2 * EVALUATE_EVERY >= steps:
            break
    codes, _ = trial.run()
    faulty_s = time.monotonic() - began_s
    return conclude(trials, faults, steps, codes, straight_s, faulty_s, arguments)


def conclude(
    trials: dict[str, Trial],
    faults: list[Fault],
    steps: int,
    codes: list[int],
    straight_s: float,
    faulty_s: float,
    arguments: argparse.Namespace,
) -> int:
    """Compare, print, write; returns 0 if nothing differs."""
    folder = trials["faulty"].folder
    compared = compare_curves(read_curve(trials["straight"].folder), read_curve(folder), steps)
    problems = list(compared.differences)
    counted = sorted(
        s for s, v in read_records(folder.metrics_file).values_by_step.items() if COMPARED[0] in v
    )
    if counted != list(range(1, steps + 1)):
        problems.append("a step is missing or doubled in metrics.jsonl")
    if codes != [0] * WORLD_SIZE or not folder.done.exists():
        problems.append(f"the last start ended with codes {codes}")
    measure_recovery(folder, faults)
    goodput = Goodput.of(read_records(folder.metrics_file))
    assert goodput is not None
    recovered = sorted(f.recovered_s for f in faults if f.recovered_s is not None)
    summary: dict[str, Any] = {
        "num_faults": len(faults),
        "num_survived": len(faults) if not problems else 0,
        "steps": steps,
        "num_steps_run_twice": compared.num_repeated,
        "equal_to_the_last_bit": not problems,
        "uninterrupted_s": round(straight_s, 1),
        "with_faults_s": round(faulty_s, 1),
        "goodput_frac": round(goodput.new_step_s / faulty_s, 4),
        "recovery_median_s": statistics.median(recovered) if recovered else None,
        "recovery_p90_s": recovered[int(0.9 * (len(recovered) - 1))] if recovered else None,
        "recovery_max_s": max(recovered, default=None),
        "num_killed_while_waiting": trials["faulty"].num_killed_waiting,
        "forked": arguments.fork,
        "save_every": SAVE_EVERY,
        "grace_s": GRACE_S,
        "seed": arguments.seed,
        "settings": list(SETTINGS),
    }
    print(json.dumps(summary, indent=1))
    print("\n".join(problems[:20]) or "PASS: every step as without faults, to the last bit")
    if arguments.output is not None:
        write(ROOT / arguments.output, arguments.name, summary, [asdict(fault) for fault in faults])
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
