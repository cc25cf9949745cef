"""One unit from fresh weights, or from where it was left, to its record: trained and measured in memory."""

from __future__ import annotations

import fcntl
import gc
import hashlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from phsa_megatron.config.derive import derive
from phsa_megatron.config.errors import TrainingError
from phsa_megatron.config.prepare_run import prepare_run_folder
from phsa_megatron.config.resolved import write_atomically
from phsa_megatron.config.run_folder import RunFolder
from phsa_megatron.config.schema import Device, TrainConfig
from phsa_megatron.config.yaml_file import leaves
from phsa_megatron.evaluation.claim_study.measure import Measures, Model, Questions, measure
from phsa_megatron.evaluation.claim_study.units import Unit, View
from phsa_megatron.monitoring.recorder import environment
from phsa_megatron.parallel.groups import initialize
from phsa_megatron.training.optimizer import Parts
from phsa_megatron.training.progress import Progress
from phsa_megatron.training.run import Run, open_run, read_ahead
from phsa_megatron.training.step import train_step

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Heard:
    """What the progress bar is told: tokens trained on in this unit, and what goes on."""

    tokens: int
    text: str


def unit_file(out: Path, unit: Unit) -> Path:
    """Returns the file of a unit's record."""
    return out / "units" / f"{unit.name}.json"


@contextmanager
def claimed(out: Path, unit: Unit) -> Iterator[bool]:
    """Holds a unit for this process, and yields whether it could: False if another process has it.

    The claim ends with the process, however that ends.
    """
    path = out / "claims" / unit.name
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def finished_record(out: Path, unit: Unit, measures: Measures) -> dict[str, Any] | None:
    """Returns the record of a finished unit, or None.

    Raises:
        TrainingError: the record is of other settings; it is never mixed in and never overwritten.
    """
    path = unit_file(out, unit)
    if not path.is_file():
        return None
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    now = _settings(unit) | {"measures": json.loads(json.dumps(asdict(measures)))}
    then = record["settings"] | {"measures": record["measures"]}
    # A setting that is newer than the record had its default then.
    defaults = _leaves(TrainConfig())
    changed = [
        key
        for key in sorted(now | then)
        if now.get(key, defaults.get(key)) != then.get(key, defaults.get(key))
    ]
    if changed:
        raise TrainingError(
            f"{path} was made with other settings ({', '.join(changed)}): use another --out, or move it away"
        )
    return record


def run_unit(
    out: Path,
    unit: Unit,
    views: list[View],
    questions: Questions,
    should_leave: Callable[[], bool],
    hear: Callable[[Heard], None],
    commit: str,
) -> dict[str, Any] | None:
    """Trains and measures a unit, and writes its record.

    Args:
        out: folder of the study.
        unit: what to train.
        views: how to evaluate it.
        questions: what it is asked.
        should_leave: asked after every step and view; True saves a checkpoint and leaves.
        hear: told how far it is.
        commit: of the code, for the record.

    Returns:
        The record, or None if it left before the end; the next call goes on from its checkpoint, and from
        the views that it has evaluated.
    """
    prepare_run_folder(unit.config)
    folder = RunFolder.of(unit.config)
    start_s = time.perf_counter()
    with (folder.path / "console.log").open("a", encoding="utf-8") as log:
        groups = initialize(unit.config)
        try:
            # Every derived number of every unit would hide the study's own lines.
            with redirect_stdout(log), open_run(unit.config, groups, Progress()) as run:
                _first_weights(run)
                if groups.device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                opened_s = time.perf_counter()
                was_trained = run.state.step == run.config.run.train_steps
                if not _train(run, should_leave, hear):
                    return None
                run.meter.stop(run.state)  # brings the time of training up to date, over all its starts
                peak = torch.cuda.max_memory_allocated() / 2**30 if groups.device.type == "cuda" else None
                evaluated = _evaluate(run, was_trained, views, questions, should_leave, hear)
                if evaluated is None:
                    return None
                record = _record(unit, run, questions.measures)
                record |= {
                    "commit": commit,
                    "views": evaluated.views,
                    "peak_memory_gib": peak,
                    "seconds": {"open": opened_s - start_s, "train": run.state.wall_s}
                    | {"evaluate": evaluated.seconds},
                }
        finally:
            groups.close()
    # The next unit has all of the device's memory again.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    path = unit_file(out, unit)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(record, ensure_ascii=False) + "\n")
    return record


def _train(run: Run, should_leave: Callable[[], bool], hear: Callable[[Heard], None]) -> bool:
    """Makes the steps that are left; returns whether all are done. What is left undone is saved."""
    steps, every = run.config.run.train_steps, run.config.monitoring.log_every_steps
    per_step = run.derived.tokens_per_step
    with read_ahead(run) as prefetcher:
        run.meter.start()
        while run.state.step < steps:
            batches = run.wait_for_batches(prefetcher)
            if batches is None or run.poll().exit or should_leave():
                run.save(must_succeed=True)
                return False
            result = train_step(run.parts, batches, run.table, run.state, run.progress)
            step = run.state.step
            run.meter.add(batches, step)
            if step % every == 0 or step == steps:
                values = run.meter.record(run, result)
                run.recorder.log(step, values)
                run.console.step(step, values)
            hear(Heard(step * per_step, f"step {step}/{steps}, loss {result.loss_nats:.3f}"))
    return True


@dataclass(frozen=True)
class _Evaluated:
    """How much is measured, views that are, by name, and the time that they took over all starts."""

    measures: dict[str, Any]
    views: dict[str, Any]
    seconds: float


def _evaluate(
    run: Run,
    was_trained: bool,
    views: list[View],
    questions: Questions,
    should_leave: Callable[[], bool],
    hear: Callable[[Heard], None],
) -> _Evaluated | None:
    """Measures the views that are left; None if it had to leave, with weights and views saved.

    Views of an earlier start are of these weights only if these came from a checkpoint of the last step.

    Raises:
        TrainingError: views of an earlier start were measured otherwise.
    """
    file = run.folder.path / "views.json"
    measures = asdict(questions.measures)
    done = _Evaluated(measures, {}, 0.0)
    if was_trained and file.is_file():
        done = _read_views(file, measures)
    start_s = time.perf_counter()

    def keep() -> None:
        if not was_trained:
            # Not `run.save`, which would count the evaluation until now as time of training.
            run.checkpointer.save(run.parts, run.state, must_succeed=True)
        write_atomically(file, json.dumps(asdict(done), ensure_ascii=False))

    model = Model(run.config, _weights(run.parts), run.groups, questions.tokenizer)
    for view in views:
        if view.name in done.views:
            continue
        if run.poll().exit or should_leave():
            keep()
            return None
        hear(Heard(run.derived.total_tokens, f"evaluates {view.name}"))
        try:
            found = measure(model, questions, view)
        except Exception:
            # Training is done and took minutes: what a view lacks, such as memory, must not cost it.
            keep()
            raise
        seconds, start_s = time.perf_counter() - start_s, time.perf_counter()
        done = replace(done, views={**done.views, view.name: found}, seconds=done.seconds + seconds)
    return replace(done, views={view.name: done.views[view.name] for view in views})


def _read_views(file: Path, measures: dict[str, Any]) -> _Evaluated:
    found = _Evaluated(**json.loads(file.read_text(encoding="utf-8")))
    if found.measures != json.loads(json.dumps(measures)):
        raise TrainingError(
            f"{file} has views measured with {found.measures}, not {measures}: give the --lengths and "
            "--trials of then, or move the file away to measure these views again"
        )
    return found


def _weights(parts: Parts) -> dict[str, Any]:
    (module,) = parts.modules
    return dict(module.state_dict())


def _first_weights(run: Run) -> str:
    """Returns the hash of the weights at step 0, kept for a run that goes on later."""
    path = run.folder.path / "first_weights_sha256"
    if run.state.step == 0:
        digest = hashlib.sha256()
        for name, parameter in run.parts.named_parameters():
            digest.update(name.encode())
            digest.update(parameter.detach().float().cpu().numpy().tobytes())
        write_atomically(path, digest.hexdigest() + "\n")
    return path.read_text(encoding="utf-8").strip()


def _settings(unit: Unit) -> dict[str, Any]:
    """Returns all settings that shape the numbers, by dotted key."""
    left_out = ("run.root_dir", "run.num_threads")
    return {key: value for key, value in _leaves(unit.config).items() if key not in left_out}


def _leaves(config: TrainConfig) -> dict[str, Any]:
    return dict(leaves(json.loads(json.dumps(asdict(config)))))


def _record(unit: Unit, run: Run, measures: Measures) -> dict[str, Any]:
    derived = derive(unit.config)
    on_gpu = unit.config.cluster.device is Device.cuda
    losses = [
        [record["step"], record["values"]["train/loss_nats"]]
        for record in map(json.loads, run.folder.metrics_file.read_text(encoding="utf-8").splitlines())
        if "train/loss_nats" in record.get("values", {})
    ]
    return {
        "format_version": FORMAT_VERSION,
        "variant": unit.variant.name,
        "about": unit.variant.about,
        "seed": unit.seed,
        "settings": _settings(unit),
        "measures": asdict(measures),
        "steps": run.state.step,
        "tokens": run.state.consumed_sequences * unit.config.data.seq_len_tokens,
        "tokens_with_loss": run.state.consumed_tokens,
        "parameters": derived.parameters.total,
        "flops": derived.flops_per_token_selected * derived.total_tokens,
        "sparsity_last_token_frac": derived.sparsity_last_token_frac,
        "first_weights_sha256": _first_weights(run),
        "data_fingerprint": run.train_reader.fingerprint,
        "train_loss_nats": losses,
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "packages": environment()["packages"],
    }
