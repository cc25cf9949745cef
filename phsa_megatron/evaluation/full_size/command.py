"""Whole training steps at full size on one GPU, PHSA beside dense attention, and what a step is made of.

    phsa-train measure-training --out docs/results                   rows, profile and curves, then the page
    phsa-train measure-training --out OUT --only phsa_k2_32k dense_32k --parts rows profile
    phsa-train measure-training --out docs/results --parts page      the page again, from the files

OUT/h100_training.json is written after every row; a row that does not fit or fails is a row that says so,
and rows that are there and not measured again stay.
Parts: rows, profile (of the 32k steps), curves (--curve-steps steps of both at 4k), ops (norms and SwiGLU
alone, in several implementations), page. Further KEY=VALUE settings go to every row.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import time
import traceback
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from phsa_megatron.config.code_snapshot import current_commit
from phsa_megatron.config.derive import derive
from phsa_megatron.config.document_flops import DocumentFlops, StepFlops
from phsa_megatron.config.environment import process_environment
from phsa_megatron.config.errors import ConfigError
from phsa_megatron.config.schema import TrainConfig
from phsa_megatron.evaluation.full_size import page
from phsa_megatron.evaluation.full_size.kernel_times import profile_step
from phsa_megatron.evaluation.full_size.op_times import op_times
from phsa_megatron.evaluation.full_size.rows import (
    ROWS,
    Row,
    Setting,
    config_of,
    gates,
    overrides_of,
    recipe_of,
    settings_to_try,
    without,
)
from phsa_megatron.evaluation.full_size.session import Session, Timing
from phsa_megatron.monitoring.throughput import Throughput
from phsa_megatron.training.state import TrainState

PARTS = ("rows", "profile", "curves", "ops", "page")
PROFILED = ("phsa_k2_32k", "dense_32k", "phsa_k2_4k")
_SECONDS_A_ROW = {4096: 15.0, 32768: 40.0, 131072: 110.0}
"""What a row may still take; one that would end after the deadline is not begun."""


def _flops_a_step(config: TrainConfig, timing: Timing) -> StepFlops:
    """Return the mean FLOPs of the timed steps, from the lengths of their documents."""
    num_steps = len(timing.document_tokens)
    lengths = [tokens for step in timing.document_tokens for tokens in step]
    counted = DocumentFlops(config, derive(config).parameters).of_step(lengths, 1)
    return StepFlops(counted.selected // num_steps, counted.dense // num_steps)


class Measurement:
    """The files of a measurement and the session that fills them."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.folder: Path = arguments.out
        self.folder.mkdir(parents=True, exist_ok=True)
        self.extra = tuple(arguments.overrides)
        self.deadline_s = time.monotonic() + arguments.deadline_s
        self.rows = [row for row in ROWS if not arguments.only or row.name in arguments.only]
        self.num_warm_up, self.num_timed = arguments.warm_up, arguments.timed
        first = config_of(self.rows[0], Setting(), self.extra)
        os.environ.update(process_environment(first))
        self.device = first.cluster.device.value
        self.about = _about(arguments.commit, self.device)
        others = page.devices(self.folder) - {self.about["device"]}
        if others:
            raise ConfigError(
                f"--out={self.folder} holds measurements of {', '.join(sorted(others))}, and this is "
                f"{self.about['device']}: rows of one page are compared with each other. Give another folder"
            )
        self.memory_gib = torch.cuda.mem_get_info()[1] / 2**30 if self.device == "cuda" else 80.0
        # One code path serves rows of several shapes; past this number torch would stop compiling it.
        dynamo: Any = torch._dynamo.config
        dynamo.recompile_limit = max(64, dynamo.recompile_limit)
        start_s = time.perf_counter()
        self.session = Session(first)
        self.settings: dict[str, Setting] = {}
        self.say(f"built in {time.perf_counter() - start_s:.1f} s, {self.memory_gib:.1f} GiB on the device")

    @property
    def left_s(self) -> float:
        """Return the seconds until the deadline."""
        return float(self.deadline_s - time.monotonic())

    def say(self, text: str) -> None:
        """Print a line with the seconds that are left."""
        print(f"[{self.left_s:4.0f} s left] {text}", flush=True)

    def measure_rows(self) -> None:
        """Measure every row that the deadline leaves time for."""
        found = page.read_rows(self.folder)
        for row in self.rows:
            if self.left_s < _SECONDS_A_ROW.get(row.seq_len_tokens, 15.0):
                self.say(f"{row.name}: no time left")
                continue
            measured = self._row(row)
            found = _in_order([*(old for old in found if old["name"] != row.name), measured])
            page.write_json(self.folder / page.ROWS_FILE, found)
            self.say(page.line(measured))
        for gate in gates(found):
            value = "-" if gate.value is None else f"{gate.value:.3f}"
            print(f"{gate.verdict:>12}  {gate.name}: {value} (gate {gate.least}, goal {gate.goal})")

    def _row(self, row: Row) -> dict[str, Any]:
        """Return the row with the best of its settings, or why there is none."""
        best: tuple[Setting, Timing] | None = None
        tried: list[dict[str, Any]] = []
        for setting in settings_to_try(row, self.memory_gib, self.extra):
            if best is not None and not _may_be_faster(setting, best[0]):
                continue
            if tried and self.left_s < _SECONDS_A_ROW.get(row.seq_len_tokens, 15.0):
                break
            timing, trouble = self._attempt(row, setting)
            entry: dict[str, Any] = {"recompute": setting.text, "micro_batch": setting.micro_batch}
            if timing is None:
                entry["failed"] = trouble
            else:
                entry |= {
                    "step_ms": round(timing.median_s * 1e3, 2),
                    "peak_memory_gib": timing.peak_memory_gib,
                }
                if best is None or timing.median_s < best[1].median_s:
                    best = setting, timing
            tried.append(entry)
            self.say(f"{row.name} {setting.text}, micro-batch {setting.micro_batch}: {entry}")
        base = {"name": row.name, "attention": row.attention, "seq_len_tokens": row.seq_len_tokens}
        base |= {"topk": row.topk, "packed": row.packed, "tried": tried, **self.about}
        if best is None:
            return base | {"failed": tried[-1]["failed"] if tried else "nothing was tried"}
        setting, timing = best
        self.settings[row.name] = setting
        return base | self._values(row, setting, timing)

    def _values(self, row: Row, setting: Setting, timing: Timing) -> dict[str, Any]:
        config = config_of(row, setting, self.extra)
        derived = derive(config)
        throughput = Throughput(derived, consumed_tokens=0, peak_tflops=config.cluster.peak_tflops)
        speed = throughput.update(timing.median_s, derived.tokens_per_step, _flops_a_step(config, timing))
        return {
            "model": config.model.name,
            "recipe": recipe_of(row),
            "overrides": overrides_of(row, setting, self.extra),
            "recompute": setting.text,
            "micro_batch": setting.micro_batch,
            "tokens_per_step": derived.tokens_per_step,
            "num_documents": len(timing.document_tokens[-1]),
            "document_tokens": round(timing.tokens_of_a_tokens_document, 1),
            "step_ms": round(timing.median_s * 1e3, 2),
            "step_time_s": timing.median_s,
            "steps_ms": [round(s * 1e3, 2) for s in timing.step_s],
            "tokens_per_s": speed["perf/tokens_per_s"],
            "mfu_selected_frac": speed.get("perf/mfu_selected_frac"),
            "dense_equiv_tflops": speed["perf/dense_equiv_tflops"],
            "peak_memory_gib": timing.peak_memory_gib,
            "reserved_memory_gib": timing.reserved_gib,
            "losses_nats": timing.losses_nats,
        }

    def _attempt(self, row: Row, setting: Setting) -> tuple[Timing | None, str]:
        """Return what a setting took, or why it did not work; the session can go on after either."""
        trouble = ""
        try:
            self.session.adopt(config_of(row, setting, self.extra))
            timing = self.session.time_steps(
                self.num_warm_up or row.num_warm_up, self.num_timed or row.num_timed
            )
            return timing, trouble
        except Exception as error:  # a row must not end the measurement
            trouble = f"{type(error).__name__}: {error}"
            out_of_memory = isinstance(error, torch.OutOfMemoryError) or "out of memory" in trouble.lower()
            if not out_of_memory:
                traceback.print_exc()
        # Outside of the handler: the exception holds what filled the memory.
        self._recover()
        return None, trouble.splitlines()[0][:300] if "memory" in trouble.lower() else trouble[:2000]

    def _recover(self) -> None:
        try:
            self.session.free()
        except Exception:  # what comes next will fail too, and say so
            traceback.print_exc()

    def profile(self) -> None:
        """Profile a step of the named rows, with the settings that were found best."""
        profiles = []
        for row in self.rows:
            if row.name not in PROFILED or self.left_s < 30:
                continue
            setting = self.settings.get(row.name)
            if setting is None:
                setting = settings_to_try(row, self.memory_gib, self.extra)[0]
            try:
                self.session.adopt(config_of(row, setting, self.extra))
                self.session.free()
                profiles.append(profile_step(self.session, self.folder, row.name) | self.about)
            except Exception:
                traceback.print_exc()
                self._recover()
                continue
            page.write_json(self.folder / page.PROFILE_FILE, profiles)
            self.say(f"{row.name}: {profiles[-1]['kinds_ms']}, idle {profiles[-1]['idle_ms']} ms")

    def curves(self, num_steps: int) -> None:
        """Train PHSA and dense attention at 4k from the same fresh weights on the same text.

        A curve of that many steps that is there already stays.
        """
        self.session.groups.close()
        found, known = page.read_curves(self.folder)
        curves = {name: losses for name, losses in found.items() if len(losses) == num_steps}
        commits = {name: known[name] for name in curves}
        for name, row in (("phsa", Row("phsa", 4096, 2)), ("dense", Row("dense", 4096))):
            if name in curves:
                continue
            self.session = None  # type: ignore[assignment]  # its memory is needed
            settings = without(
                [
                    "optim.global_batch_sequences=8",
                    "optim.lr=6e-4",
                    f"run.train_steps={num_steps}",
                    f"optim.warmup_steps={num_steps // 10}",
                    f"optim.decay_steps={num_steps // 5}",
                ],
                self.extra,
            )
            try:
                self.session = Session(
                    config_of(row, Setting(micro_batch=8), (*settings, *self.extra)), TrainState()
                )
                for losses in self._curve(num_steps):
                    curves[name], commits[name] = losses, self.about["commit"]
                    content = {"curves": curves, "commits": commits, **self.about}
                    page.write_json(self.folder / page.CURVES_FILE, content)
                self.session.groups.close()
            except Exception:
                traceback.print_exc()

    def _curve(self, num_steps: int) -> Iterator[list[float]]:
        """Yield the losses so far, every 20 steps and at the end."""
        losses: list[float] = []
        with self.session.batches(num_steps) as source:
            for batches in source:
                losses.append(self.session.step(batches).loss_nats)
                if len(losses) % 20 == 0:
                    self.say(f"step {len(losses)}: {losses[-1]:.4f} nats")
                    yield losses
                if self.left_s < 5:
                    break
        yield losses


def _in_order(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    names = [row.name for row in ROWS]
    return sorted(found, key=lambda row: names.index(row["name"]))


def _may_be_faster(setting: Setting, best: Setting) -> bool:
    """Return whether a setting is worth the time after one that fits: not one that computes more twice."""
    return setting.recompute == best.recompute and setting.recompute_layers == best.recompute_layers


def _about(commit: str | None, device: str) -> dict[str, Any]:
    versions: dict[str, str] = {"torch": torch.__version__}
    for name in ("triton", "megatron-core"):
        try:
            versions[name] = str(version(name))
        except PackageNotFoundError:
            versions[name] = "absent"
    if device == "cuda":
        cudnn: Any = torch.backends.cudnn
        versions["cudnn"] = str(cudnn.version())
    if commit is None:
        commit = current_commit() or "unknown"
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    return {"device": name, "versions": versions, "commit": commit}


def main(argv: list[str]) -> int:
    """Run `phsa-train measure-training`; 0 also if gates fail, which the page says."""
    parser = argparse.ArgumentParser(
        prog="phsa-train measure-training",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings of every row")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="gets the files")
    parser.add_argument("--only", nargs="+", default=[], metavar="ROW", choices=[row.name for row in ROWS])
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS, metavar="PART")
    parser.add_argument("--deadline-s", type=float, default=3600.0, help="no row begins that would end later")
    parser.add_argument("--warm-up", type=int, default=0, metavar="N", help="steps before; 0: each row's own")
    parser.add_argument("--timed", type=int, default=0, metavar="N", help="timed steps; 0: each row's own")
    parser.add_argument("--curve-steps", type=int, default=200, metavar="N", help="steps of a loss curve")
    parser.add_argument("--commit", help="of the code, where there is no git to ask")
    arguments = parser.parse_intermixed_args(argv)
    if arguments.parts == ["page"]:
        page.write_page(arguments.out)
        return 0
    measurement = Measurement(arguments)
    if "rows" in arguments.parts:
        measurement.measure_rows()
    if "profile" in arguments.parts:
        measurement.profile()
    if "ops" in arguments.parts:
        page.write_json(arguments.out / page.OPS_FILE, op_times(measurement.device) | measurement.about)
    if "curves" in arguments.parts:
        measurement.curves(arguments.curve_steps)
    if "page" in arguments.parts:
        if importlib.util.find_spec("matplotlib") is None:
            print(f"no matplotlib here: make the page elsewhere, with --out {arguments.out} --parts page")
        else:
            page.write_page(arguments.out)
    return 0


__all__ = ["Measurement", "TrainConfig", "main"]
