"""A step made again: one that was not finite and was kept, or any step that a checkpoint lies before.

`RUN/replay/step_00000007/` is a run folder of its own: the settings, a committed checkpoint of the state
before the step (weights, optimizer, counters, every random generator), and `replay.json` with what was seen.
`phsa-train replay FOLDER` runs the step's forward and backward pass again; it updates no weight and writes
nothing.

`phsa-train replay RUN --step N` goes to any step, such as that of a loss spike: it starts from the newest
checkpoint before it, or from fresh weights, and makes the steps in between, in memory only.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from phsa_megatron.config import compose
from phsa_megatron.config.errors import CheckpointError, ConfigError, TrainingError
from phsa_megatron.config.run_folder import RunFolder
from phsa_megatron.config.schema import ParallelConfig, TrainConfig
from phsa_megatron.data.batches import Batch, BatchReader
from phsa_megatron.data.tokenizer import Tokenizer
from phsa_megatron.monitoring.recorder import environment
from phsa_megatron.parallel.groups import Groups, initialize
from phsa_megatron.training.checkpoint import Checkpointer
from phsa_megatron.training.faults import VARIABLE, Faults
from phsa_megatron.training.forward_step import ForwardStep
from phsa_megatron.training.optimizer import Parts, build_parts, set_hyperparameters
from phsa_megatron.training.progress import Progress
from phsa_megatron.training.run import Run, punctuation_table
from phsa_megatron.training.state import TrainState, restore_rng
from phsa_megatron.training.step import (
    NonFiniteStepError,
    forward_backward,
    mean_loss,
    micro_batch_starts,
    poison_gradient,
    train_step,
)

EVIDENCE_NAME = "replay.json"


def write_replay(run: Run, error: NonFiniteStepError, rng: dict[str, Any]) -> TrainingError:
    """Writes the replay folder of a step that just failed, and returns the error to raise. Collective.

    Args:
        run: weights, optimizer and state as before the step.
        error: what was seen.
        rng: the random generators at the start of the step.
    """
    folder = RunFolder(run.folder.replay_dir / f"step_{error.step:08d}")
    restore_rng(rng)
    try:
        run.checkpointer.save_to(folder.checkpoints_dir / _step_name(run.state), run.parts, run.state)
        if run.groups.rank == 0:
            folder.config_file.write_text(compose.dump(run.config), encoding="utf-8")
            evidence = {
                "step": error.step,
                **error.evidence(),
                "first_sequence": run.state.consumed_sequences,
                "injected_faults": os.environ.get(VARIABLE),
                "environment": environment(),
            }
            text = json.dumps(evidence, indent=2) + "\n"
            (folder.path / EVIDENCE_NAME).write_text(text, encoding="utf-8")
    except (CheckpointError, OSError) as failure:
        # The first error is the one that matters: a person must see it even on a full disk.
        return TrainingError(f"{error.describe()}\nThe replay folder could not be written: {failure}")
    command = f"phsa-train replay {folder.path}"
    run.notify("non_finite", f"{error.describe()}\nrun it again with: {command}", step=error.step)
    return TrainingError(
        f"{error.describe()}\nThe state before the step is kept. Run the step again, and see which layer "
        f"breaks first:\n  {command}"
    )


@dataclass(frozen=True)
class Replay:
    """What a step did when it was run again."""

    step: int
    loss_nats: float
    grad_norm: float
    first_bad_output: str | None
    """First module, in order of execution, whose output is not finite; None if all are."""
    grad_norms: dict[str, float]
    """L2 norm of each parameter's gradient, in model order."""

    @property
    def first_bad_gradient(self) -> str | None:
        """Returns the last parameter in model order whose gradient is not finite: backward starts there."""
        bad = [name for name, norm in self.grad_norms.items() if not math.isfinite(norm)]
        return bad[-1] if bad else None

    def lines(self) -> list[str]:
        """Returns the report for a person."""
        width = max(map(len, self.grad_norms))
        return [
            f"step {self.step}: loss {self.loss_nats!r}, gradient norm {self.grad_norm!r}",
            f"first module with an output that is not finite: {self.first_bad_output or 'none'}",
            "first gradient that is not finite, in the order of the backward pass: "
            f"{self.first_bad_gradient or 'none'}",
            "gradient norm by parameter:",
            *(f"  {name:<{width}}  {norm:.6g}" for name, norm in self.grad_norms.items()),
        ]


def main(argv: list[str]) -> int:
    """Runs `phsa-train replay`; returns 0 if the step is finite this time, 3 if it is not again.

    Raises:
        PhsaError: the folder is not a replay folder, or the step cannot be run here.
    """
    parser = argparse.ArgumentParser(prog="phsa-train replay", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("folder", type=Path, help="RUN/replay/step_########, or RUN with --step")
    parser.add_argument("--step", type=int, help="number of the step of RUN to make again")
    arguments = parser.parse_args(argv)
    folder = RunFolder(arguments.folder)
    config = single_process(compose.load(folder.config_file))
    if arguments.step is not None and not 1 <= arguments.step <= config.run.train_steps:
        raise ConfigError(
            f"--step={arguments.step}: steps of this run count from 1 to run.train_steps="
            f"{config.run.train_steps}"
        )
    groups = initialize(config)
    try:
        result = replay(folder, config, groups, arguments.step)
    finally:
        groups.close()
    if arguments.step is None:
        evidence = json.loads((folder.path / EVIDENCE_NAME).read_text(encoding="utf-8"))
        print(f"seen in the run: loss {evidence['loss_nats']}, gradient norm {evidence['grad_norm']}")
        if evidence["injected_faults"]:
            print(f"the run had injected faults: {VARIABLE}={evidence['injected_faults']}")
    print("\n".join(result.lines()))
    return 0 if math.isfinite(result.loss_nats) and math.isfinite(result.grad_norm) else 3


def single_process(config: TrainConfig) -> TrainConfig:
    """Returns the same run for one process: equal to the bit if it had one, to rounding otherwise."""
    return dataclasses.replace(
        config,
        parallel=ParallelConfig(
            distributed_optimizer=config.parallel.distributed_optimizer, recompute=config.parallel.recompute
        ),
        cluster=dataclasses.replace(config.cluster, num_nodes=1, processes_per_node=1),
    )


def replay(folder: RunFolder, config: TrainConfig, groups: Groups, step: int | None = None) -> Replay:
    """Runs the forward and backward pass of a step again, and changes nothing.

    Args:
        folder: of the run, or of a step that was not finite.
        config: of the run, for this one process.
        groups: of this process.
        step: which one; None is the step after the folder's newest checkpoint.

    Raises:
        CheckpointError: the folder holds no checkpoint to start from.
    """
    parts = build_parts(config, groups)
    tokenizer = Tokenizer.from_file(config.data.tokenizer_file, config.data.eod_token)
    reader = BatchReader(config, "train", tokenizer)
    table = punctuation_table(config, tokenizer, groups)
    faults = Faults.from_environment(groups.rank)
    state = _state_before(folder, parts, step)
    while step is not None and state.step < step - 1:
        train_step(parts, _batches(reader, parts, state), table, state, Progress(faults=faults))
    step = state.step + 1
    forward_step = ForwardStep.of_step(
        config,
        table,
        groups,
        step,
        poisoned=faults.happens("nan_loss", step),
    )
    batches = _batches(reader, parts, state)
    set_hyperparameters(parts, state.consumed_sequences + config.optim.global_batch_sequences)
    parts.zero_grad()
    with first_bad_outputs(parts) as bad_outputs:
        rows = forward_backward(parts, batches, forward_step, forward_only=False)
    if faults.happens("nan_grad", step):
        poison_gradient(parts)
    loss_nats, _ = mean_loss(parts, rows)
    parts.optimizer.prepare_grads()
    grad_norm = float(parts.optimizer.get_grad_norm())
    grad_norms = {
        name: float(torch.linalg.vector_norm(gradient.double())) for name, gradient in parts.gradient_sums()
    }
    return Replay(step, loss_nats, grad_norm, bad_outputs[0] if bad_outputs else None, grad_norms)


def _state_before(folder: RunFolder, parts: Parts, step: int | None) -> TrainState:
    """Fills the parts with what lies nearest before a step, and returns its counters."""
    committed = [n for n in folder.committed_steps() if step is None or n < step]
    if committed:
        if step is not None:
            print(f"from the checkpoint of step {committed[-1]} to step {step}, as one process")
        path = folder.checkpoints_dir / f"step_{committed[-1]:08d}"
        return Checkpointer(folder, parts.config, parts.groups).load_from(path, parts)
    if step is None:
        raise CheckpointError(
            f"{folder.path} holds no committed checkpoint: give a folder RUN/replay/step_########, or --step"
        )
    if parts.config.run.init_from is not None:
        raise CheckpointError(
            f"{folder.path} holds no checkpoint from before step {step}, and its first weights came from "
            f"run.init_from={parts.config.run.init_from}; keep more with checkpoint.keep_last"
        )
    print(f"from fresh weights to step {step}, as one process")
    return TrainState()


def _batches(reader: BatchReader, parts: Parts, state: TrainState) -> list[Batch]:
    size = parts.config.optim.micro_batch_sequences
    starts = micro_batch_starts(parts.config, parts.groups, state.consumed_sequences)
    return [reader.micro_batch(first, size) for first in starts]


@contextmanager
def first_bad_outputs(parts: Parts) -> Iterator[list[str]]:
    """Collects the names of modules whose output is not finite, in the order in which they end."""
    bad: list[str] = []

    def hook(name: str) -> Any:
        def look(module: torch.nn.Module, inputs: Any, output: Any) -> None:
            tensors = output if isinstance(output, tuple) else (output,)
            for tensor in tensors:
                if (
                    isinstance(tensor, Tensor)
                    and tensor.is_floating_point()
                    and not torch.isfinite(tensor).all()
                ):
                    bad.append(name)

        return look

    handles = [
        child.register_forward_hook(hook(name or type(module).__name__))
        for module in parts.modules
        for name, child in module.named_modules()
    ]
    try:
        yield bad
    finally:
        for handle in handles:
            handle.remove()


def _step_name(state: TrainState) -> str:
    return f"step_{state.step:08d}"
