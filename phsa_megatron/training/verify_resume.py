"""Shows that a killed and resumed run is the uninterrupted run, to the last bit: `phsa-train verify-resume`.

Two runs of the same recipe in a temporary folder, as processes of their own: one straight to the last step;
one that is killed without warning (SIGKILL to all of its processes) and started again. Compared are loss,
gradient norm and zero-gradient count of every step, those that were run twice included, and at the last step
the bytes of every random generator and of all weights and optimizer state.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from phsa_megatron.config.compose import compose
from phsa_megatron.config.derive import world_size
from phsa_megatron.config.errors import ConfigError, TrainingError
from phsa_megatron.config.run_folder import RunFolder
from phsa_megatron.config.schema import TrainConfig
from phsa_megatron.training.checkpoint_files import SHARDS_NAME
from phsa_megatron.training.commit import step_folder_name
from phsa_megatron.training.state import rng_digest

COMPARED = ("train/loss_nats", "optim/grad_norm", "optim/num_zeros")
POLL_S = 0.02
STALLED_AFTER_S = 900.0

# What a step measured: one entry for each time that it was run.
Curve = dict[int, list[tuple[float, ...]]]


@dataclass
class Comparison:
    """What was compared and what differs.

    Attributes:
        rows: lines of the table, one a step.
        differences: one line each; empty means equal to the last bit.
        num_repeated: steps that the killed run made twice.
    """

    rows: list[str] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)
    num_repeated: int = 0


def main(argv: list[str]) -> int:
    """Run `phsa-train verify-resume`; returns 0 if nothing differs, 1 otherwise.

    Raises:
        ConfigError: the numbers of steps do not fit the recipe.
        TrainingError: a run ended by itself before its time.
    """
    parser = argparse.ArgumentParser(
        prog="phsa-train verify-resume",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: phsa-train verify-resume recipe=phsa_demo_cpu steps=20 kill_at=10",
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="recipe=NAME, settings, steps=, kill_at="
    )
    parser.add_argument(
        "--recipes-dir", type=Path, help="your own folder of recipes, beside the built-in ones"
    )
    parser.add_argument(
        "--keep", action="store_true", help="keep the two run folders also when nothing differs"
    )
    arguments = parser.parse_intermixed_args(argv)
    overrides, steps, kill_at = _split(arguments.overrides)
    folder = Path(tempfile.mkdtemp(prefix="phsa_verify_resume_"))
    trial = _Trial(overrides, arguments.recipes_dir, folder, steps, kill_at)
    straight, resumed = trial.folder_of("straight"), trial.folder_of("resumed")
    trial.run("straight", until=lambda: _committed_step(straight) >= steps)
    trial.run(
        "resumed",
        until=lambda: _last_step(resumed) >= kill_at and _committed_step(resumed) > 0,
        before_step=steps,
    )
    print(f"killed at step {_last_step(resumed)}; committed was step {_committed_step(resumed)}", flush=True)
    trial.run("resumed", until=lambda: _committed_step(resumed) >= steps)

    result = compare_curves(read_curve(straight), read_curve(resumed), steps)
    result.differences += compare_checkpoints(
        straight.checkpoints_dir / step_folder_name(steps), resumed.checkpoints_dir / step_folder_name(steps)
    )
    print("\n".join(result.rows))
    if not result.num_repeated and kill_at % trial.save_every_steps:
        result.differences.append(
            "the killed run repeated no step: it was not resumed from an earlier checkpoint"
        )
    if result.differences:
        print("\n".join(result.differences))
        print(f"FAIL: a resumed run is not the uninterrupted one; both are kept in {folder}")
        return 1
    print(
        f"PASS: {steps} steps, {result.num_repeated} of them run twice, random generators, weights and "
        "optimizer state are equal to the last bit"
    )
    if arguments.keep:
        print(f"kept: {folder}")
    else:
        shutil.rmtree(folder)
    return 0


def _split(words: list[str]) -> tuple[list[str], int, int]:
    """Overrides without `steps=` and `kill_at=`, and the two numbers."""
    numbers = {"steps": 20, "kill_at": 10}
    overrides = []
    for word in words:
        key, _, value = word.partition("=")
        if key not in numbers:
            overrides.append(word)
        elif value.isdecimal():
            numbers[key] = int(value)
        else:
            raise ConfigError(f"{key}={value}: it is a number of steps, such as {key}={numbers[key]}")
    steps, kill_at = numbers["steps"], numbers["kill_at"]
    if not 2 <= kill_at < steps:
        raise ConfigError(
            f"kill_at={kill_at}, steps={steps}: the kill must come at step 2 or later and before the end"
        )
    return overrides, steps, kill_at


class _Trial:
    """Starts the runs, watches their folders, kills them."""

    def __init__(
        self, overrides: list[str], recipes_dir: Path | None, folder: Path, steps: int, kill_at: int
    ) -> None:
        self._root, self._steps = folder, steps
        common = math.gcd(steps, kill_at)
        # Half of it where possible: then the kill falls between two saves or into one.
        self.save_every_steps = common // 2 if common % 2 == 0 else common
        self._overrides = [
            *overrides,
            f"run.root_dir={folder}",
            f"checkpoint.save_every_steps={self.save_every_steps}",
            f"checkpoint.keep_last={steps // self.save_every_steps + 2}",
            "monitoring.log_every_steps=1",
            "monitoring.progress=false",
            "monitoring.report=false",
            "monitoring.wandb.mode=disabled",
        ]
        self._recipes_dir = recipes_dir
        self._config: TrainConfig = compose([*self._overrides, "run.name=straight"], recipes_dir).config
        if steps > self._config.run.train_steps:
            raise ConfigError(
                f"steps={steps} is more than run.train_steps={self._config.run.train_steps}, the whole run: "
                "compare fewer steps"
            )

    def folder_of(self, name: str) -> RunFolder:
        return RunFolder(self._root / name)

    def _command(self, name: str) -> list[str]:
        entry = "phsa_launch.cli" if world_size(self._config) > 1 else "phsa_megatron.cli"
        own = [] if self._recipes_dir is None else ["--recipes-dir", str(self._recipes_dir)]
        return [sys.executable, "-m", entry, *own, *self._overrides, f"run.name={name}"]

    def run(self, name: str, *, until: Callable[[], bool], before_step: int | None = None) -> None:
        """Start a run and kill it, with all processes it started, as soon as `until` is true.

        Args:
            name: name of the run; one that has checkpoints is resumed.
            until: looked at every few milliseconds.
            before_step: if the run gets this far first, the kill came too late to show anything.
        """
        log_path = self._root / f"{name}.log"
        folder, shown, changed_s = self.folder_of(name), -1, time.monotonic()
        with log_path.open("ab") as log:
            process = subprocess.Popen(
                self._command(name), stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            )  # fmt: skip
            try:
                while not until():
                    step = _last_step(folder)
                    if step != shown:
                        _show(name, step, shown, self._steps)
                        shown, changed_s = step, time.monotonic()
                    if process.poll() is not None and not until():
                        raise TrainingError(
                            f"{name}: the run ended by itself at step {step}\n{_tail(log_path)}"
                        )
                    if time.monotonic() - changed_s > STALLED_AFTER_S:
                        raise TrainingError(f"{name}: no step for {STALLED_AFTER_S:.0f} s\n{_tail(log_path)}")
                    time.sleep(POLL_S)
            finally:
                _kill(process)
        if before_step is not None and _committed_step(folder) >= before_step:
            raise TrainingError(
                f"{name}: it reached step {before_step} before it could be killed; compare more steps"
            )


def _show(name: str, step: int, shown: int, steps: int) -> None:
    every = max(1, steps // 10)
    if step < 0:
        print(f"{name}: starting", flush=True)
    elif step // every != shown // every or step == steps:
        print(f"{name}: step {step} of {steps}", flush=True)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a run at once: its process, and every process below it, whatever session that one is in."""
    try:
        family = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:  # it ended by itself in this moment
        family = []
    process.kill()
    for child in family:
        with suppress(psutil.NoSuchProcess):
            child.kill()
    psutil.wait_procs(family, timeout=60)
    process.wait()


def _tail(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()[-30:]
    return "\n".join([f"last lines of {path}:", *(f"  {line}" for line in lines)])


def _committed_step(folder: RunFolder) -> int:
    try:
        return int(folder.committed_step.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return -1


def _last_step(folder: RunFolder) -> int:
    """The last step of the newest start, -1 before the first."""
    curve = read_curve(folder)
    return max(curve, default=-1)


def read_curve(folder: RunFolder) -> Curve:
    """What every complete line of metrics.jsonl says about training steps, repeated ones included."""
    curve: Curve = {}
    if not folder.metrics_file.exists():
        return curve
    for line in folder.metrics_file.read_bytes().split(b"\n")[:-1]:
        record = json.loads(line)
        values = record.get("values", {})
        if COMPARED[0] in values:
            curve.setdefault(record["step"], []).append(tuple(float(values[name]) for name in COMPARED))
    return curve


def compare_curves(straight: Curve, resumed: Curve, steps: int) -> Comparison:
    """Compare every time a step was run with the straight run's one, bit by bit.

    Args:
        straight: steps of the uninterrupted run.
        resumed: steps of the killed and resumed run, some of them twice.
        steps: how many have to be there.
    """
    result = Comparison([f"{'step':>5}  {'loss':<22} {'gradient norm':<22} {'zeros':>8}  times  equal"])
    for step in range(1, steps + 1):
        expected, found = straight.get(step, []), resumed.get(step, [])
        equal = (
            len(expected) == 1
            and bool(found)
            and all(_bits(values) == _bits(expected[0]) for values in found)
        )
        result.num_repeated += len(found) > 1
        if expected:
            loss, norm, zeros = expected[0]
            verdict = "yes" if equal else "NO"
            result.rows.append(
                f"{step:>5}  {loss!r:<22} {norm!r:<22} {zeros:>8.0f}  {len(found):>5}  {verdict}"
            )
        if equal:
            continue
        result.differences.append(
            f"step {step}: straight {expected or 'missing'}, resumed {found or 'missing'}"
        )
    return result


def _bits(values: tuple[float, ...]) -> list[str]:
    return [value.hex() for value in values]


def compare_checkpoints(straight: Path, resumed: Path) -> list[str]:
    """Lines about random generators, weights and optimizer state that differ between two checkpoints."""
    differences = []
    names = [{path.name for path in folder.glob("rng/*.pt")} for folder in (straight, resumed)]
    if names[0] != names[1] or not names[0]:
        differences.append(f"random generators of {sorted(names[0])} and of {sorted(names[1])} were saved")
    for name in sorted(names[0] & names[1]):
        # Files that this command's own runs just wrote.
        digests = [
            rng_digest(torch.load(folder / "rng" / name, weights_only=False))
            for folder in (straight, resumed)
        ]
        if digests[0] != digests[1]:
            differences.append(f"rng/{name}: the random generators differ")
    tensors = [_stored_tensors(folder / SHARDS_NAME) for folder in (straight, resumed)]
    if not tensors[0]:
        differences.append(f"{straight} holds no weights")
    for name in sorted(tensors[0].keys() | tensors[1].keys()):
        if not (name in tensors[0] and name in tensors[1]):
            differences.append(f"{name}: only one of the runs has it")
        elif not _same_bytes(
            *(_read(folder / SHARDS_NAME, name, tensors[0][name]) for folder in (straight, resumed))
        ):
            differences.append(f"{name}: the weights or moments differ")
    return differences


def _stored_tensors(shards: Path) -> dict[str, TensorStorageMetadata]:
    """Shapes and dtypes of the tensors in a folder of shards, by name."""
    if not shards.is_dir():
        return {}
    stored = FileSystemReader(shards).read_metadata().state_dict_metadata
    return {name: entry for name, entry in stored.items() if isinstance(entry, TensorStorageMetadata)}


def _read(shards: Path, name: str, entry: TensorStorageMetadata) -> Tensor:
    """One whole tensor; the file around it also holds settings, whose bytes say nothing about the run."""
    tensor = torch.empty(entry.size, dtype=entry.properties.dtype)
    load({name: tensor}, storage_reader=FileSystemReader(shards), no_dist=True)
    return tensor


def _same_bytes(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.view(-1).view(torch.uint8), b.view(-1).view(torch.uint8))
