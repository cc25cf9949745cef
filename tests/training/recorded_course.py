"""Steps with everything between them that makes a recording void, and where two such courses differ."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from phsa_megatron.attention.max_logit import MaxLogitRecorder
from phsa_megatron.data.tokenizer import Tokenizer
from phsa_megatron.training.evaluate import Evaluator
from phsa_megatron.training.progress import Progress
from phsa_megatron.training.step import StepResult, train_step
from tests.training.bench import Bench


@dataclass(frozen=True)
class Stage:
    """What one stage of a course gave."""

    name: str
    value: StepResult | float
    """Of a step, or nats per token of an evaluation."""
    rows: list[Any]
    """Nats and tokens of each sequence: of the forward passes alone."""
    gradients: dict[str, Tensor]
    """Of each parameter, after clipping."""


def course(made: Bench, said: Callable[[str], Any]) -> list[Stage]:
    """Steps a bench: its recordings are replayed, then voided by an evaluation and by a look at logits.

    Args:
        made: the bench, before its first step.
        said: a context for each stage, given its name.
    """
    stages = []

    def steps(*names: str, logits: MaxLogitRecorder | None = None) -> None:
        for name in names:
            with said(name):
                result = train_step(
                    made.parts, made.batches(), made.table, made.state, Progress(), logits=logits
                )
                rows = [row.tolist() for row in result.rows]
            gradients = {key: grad.detach().to("cpu", copy=True) for key, grad in made.parts.gradient_sums()}
            stages.append(Stage(name, result, rows, gradients))

    steps("step 1", "step 2", "step 3")
    config = made.config
    with said("evaluation"):
        tokenizer = Tokenizer.from_file(config.data.tokenizer_file, config.data.eod_token)
        evaluator = Evaluator(config, made.groups, tokenizer, made.table)
        found = evaluator.run(made.parts, should_leave=lambda: False)
        assert found is not None
    stages.append(Stage("evaluation", found.total.nats_per_token, [], {}))
    steps("step 4, after the evaluation", "step 5")
    logits = MaxLogitRecorder(config.model.num_layers, made.groups.device)
    steps("step 6, eager, its logits watched", logits=logits)
    steps("step 7, after that")
    return stages


def difference(expected: list[Stage], got: list[Stage]) -> str | None:
    """Returns what differs first, by a bit or more, and how far that is from there; None if nothing does."""
    for eager, recorded in zip(expected, got, strict=True):
        if eager.rows != recorded.rows:
            return f"{eager.name}: forward pass, losses {eager.rows} became {recorded.rows}"
        others = [
            f"{name} by {float((grad - recorded.gradients[name]).abs().max()):.3g}"
            for name, grad in eager.gradients.items()
            if not torch.equal(grad, recorded.gradients[name])
        ]
        if others:
            return (
                f"{eager.name}: backward pass, gradients of {len(others)} of {len(eager.gradients)} "
                f"parameters: {'; '.join(others[:12])}"
            )
        if eager.value != recorded.value:
            return f"{eager.name}: {eager.value} became {recorded.value}"
    return None


@contextmanager
def timed(name: str, say: Callable[[str], None]) -> Iterator[None]:
    """Says that a stage begins, and what it took and holds on the GPU when it ends."""
    say(f"{name} ...")
    start_s = time.perf_counter()
    yield
    memory = ""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        gib = 2**30
        allocated, reserved = torch.cuda.memory_allocated() / gib, torch.cuda.memory_reserved() / gib
        memory = f", {allocated:.2f} GiB allocated, {reserved:.2f} reserved"
    say(f"{name}: {time.perf_counter() - start_s:.1f} s{memory}")
