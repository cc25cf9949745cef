"""Feeds the rules of `monitoring/alerts.py` and leaves what they say: RUN/alerts, the console, records, W&B.

A spike also leaves what is needed to look at it: the sequences of the step with their losses and documents,
gradient and weight norms by block, the random generators at its start, and the command that runs it again.
"""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from phsa_megatron.monitoring.alerts import Alert, SpeedRule, SpikeRule, StragglerRule, write_alert
from phsa_megatron.training import heartbeat
from phsa_megatron.training.norms import block_norms
from phsa_megatron.training.state import rng_digest
from phsa_megatron.training.step import StepResult, micro_batch_starts

if TYPE_CHECKING:
    from phsa_megatron.training.run import Run

_MAX_SEQUENCES = 16
"""Sequences of a spike that are described, those with the highest loss."""


class Alarms:
    """The alerts of an open run.

    Args:
        run: who has a console, records and a folder; process 0 tells, except of stalls, which each tells.
    """

    def __init__(self, run: Run) -> None:
        settings = run.config.monitoring.alerts
        self._run = run
        self._enabled = settings.enabled
        self._spike = SpikeRule(settings)
        self._speed, self._straggler = SpeedRule(settings), StragglerRule(settings)
        if self._enabled:
            run.progress.on_stall.append(self._stalled)

    def after_step(self, result: StepResult, rng: dict[str, Any]) -> None:
        """Looks at a step that is done. Collective where it spikes: all processes have the same loss.

        Args:
            result: of the step.
            rng: the random generators at its start.
        """
        step = self._run.state.step
        alert = self._spike.see(step, result.loss_nats) if self._enabled else None
        if alert is not None:
            evidence = spike_evidence(self._run, result, rng)
            self.tell(Alert(alert.kind, step, f"{alert.text}\n{evidence['hint']}", alert.fields | evidence))

    def after_record(self, values: dict[str, float]) -> None:
        """Looks at what was just recorded; process 0 decides, by its own clock."""
        run, times = self._run, self._run.meter.own_times
        if not self._enabled or run.groups.rank != 0 or times is None:
            return
        alerts = [self._speed.see(run.state.step, values["perf/step_time_s"])]
        if run.groups.world_size > 1:
            alerts.append(self._straggler.see(run.state.step, *times.slowest(), times.step_s))
        for alert in alerts:
            if alert is not None:
                self.tell(alert)

    def tell(self, alert: Alert) -> None:
        """Leaves an alert everywhere, on the processes that write."""
        run = self._run
        if run.groups.rank == 0:
            path = self._write(alert)
            run.console.message(f"ALERT {alert.kind}: {alert.text}")
            run.recorder.alert(alert, str(path) if path else None)

    def _write(self, alert: Alert) -> Any:
        try:
            return write_alert(self._run.folder.alerts_dir, alert)
        except OSError as error:  # an alert must never end the run that it is about
            print(f"the alert {alert.kind} could not be written: {error}", file=sys.stderr)
            return None

    def _stalled(self, text: str) -> None:
        """Tells of a stall, from the watchdog's thread; the main thread may never move again."""
        run, rank = self._run, self._run.groups.rank
        beats = heartbeat.read(run.folder.heartbeats_dir, run.groups.world_size)
        alert = Alert(
            "stall", run.progress.step, text, {"heartbeats": [b.where() for b in beats.values()]}, rank
        )
        path = self._write(alert)
        print(f"ALERT stall: rank {rank}: {text}", file=sys.stderr, flush=True)
        if rank == 0:
            run.recorder.alert(alert, str(path) if path else None)


def spike_evidence(run: Run, result: StepResult, rng: dict[str, Any]) -> dict[str, Any]:
    """Returns what is known about the step that was just made, for RUN/alerts. Collective."""
    batch = run.config.optim.global_batch_sequences
    consumed = run.state.consumed_sequences - batch
    losses = _sequence_losses(run, result, consumed)
    worst = sorted(losses, key=lambda pair: (-pair[1], pair[0]))[:_MAX_SEQUENCES]
    step = run.state.step
    rng_file = run.folder.alerts_dir / f"rng_step_{step:08d}_rank_{run.groups.rank:05d}.pt"
    try:
        rng_file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(rng, rng_file)
    except (OSError, RuntimeError) as error:  # the same rule: it is only an alert
        print(f"{rng_file} could not be written: {error}", file=sys.stderr)
    command = f"phsa-train replay {run.folder.path} --step {step}"
    numbers = [run.train_reader.order.number(position) for position, _ in worst]
    return {
        "hint": f"run the step again with: {command}\n"
        f"to pass over its sequences after going back: data.skip_sequences=['{numbers[0]}'] or a range",
        "replay_command": command,
        "first_sequence": run.train_reader.order.number(consumed),
        "num_sequences": batch,
        "grad_norm": result.grad_norm,
        "lr": result.lr,
        "worst_sequences": [
            {"sequence": number, "loss_nats": loss, "documents": _documents(run, number)}
            for number, (_, loss) in zip(numbers, worst, strict=True)
        ],
        "norms": block_norms(run.parts, result.grad_norm),
        "rng_sha256": rng_digest(rng),
        "rng_file": rng_file.name,
    }


def _sequence_losses(run: Run, result: StepResult, consumed: int) -> list[tuple[int, float]]:
    """Returns (position in the data, mean loss) of every sequence of the step that has a loss."""
    totals: dict[int, list[float]] = {}
    starts = micro_batch_starts(run.config, run.groups, consumed)
    mine = [
        (first + offset, nats, tokens)
        for first, row in zip(starts, result.rows, strict=False)  # no rows except on the last stage
        for offset, (nats, tokens) in enumerate(row.T.tolist())
    ]
    everyone: list[list[tuple[int, float, float]]] = [[] for _ in range(run.groups.world_size)]
    dist.all_gather_object(everyone, mine)
    # Tensor-parallel processes report the same rows, context-parallel ones parts of them: both divide out.
    for part in everyone:
        for position, nats, tokens in part:
            total = totals.setdefault(position, [0.0, 0.0])
            total[0] += nats
            total[1] += tokens
    return [(p, nats / tokens) for p, (nats, tokens) in totals.items() if tokens and math.isfinite(nats)]


def _documents(run: Run, number: int) -> list[dict[str, Any]]:
    sequence = run.train_reader.order.sequence_at(number)
    return [
        {
            "source": sequence.source,
            "document": p.document,
            "first_token": p.first_token,
            "tokens": p.num_tokens,
        }
        for p in sequence.pieces
    ]
