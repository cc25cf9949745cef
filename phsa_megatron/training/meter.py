"""Adds up time, tokens, FLOPs and what else is reported, between two records."""

from __future__ import annotations

import resource
import statistics
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from phsa_megatron.config.document_flops import DocumentFlops, StepFlops
from phsa_megatron.data.batches import Batch
from phsa_megatron.monitoring.throughput import Throughput
from phsa_megatron.parallel import collective_trace
from phsa_megatron.parallel.communication_clock import CommunicationClock
from phsa_megatron.parallel.exchange import traffic
from phsa_megatron.parallel.groups import Groups
from phsa_megatron.training.phase_clock import PHASES, PhaseClock
from phsa_megatron.training.state import TrainState

if TYPE_CHECKING:
    from phsa_megatron.training.run import Run
    from phsa_megatron.training.step import StepResult


@dataclass(frozen=True)
class OwnTimes:
    """What each process spent by itself since the last record, in the order of their ranks.

    Attributes:
        own_s: seconds in its own data and forward passes, per step.
        stage: its pipeline stage: stages have different work.
        step_s: wall time of a step.
    """

    own_s: list[float]
    stage: list[int]
    step_s: float

    def slowest(self) -> tuple[int, float, float]:
        """Returns the process furthest above its stage's median: rank, ratio, seconds above it."""
        # The lower median: of two processes the faster one, or nobody could be twice as slow.
        medians = {
            stage: statistics.median_low(
                s for s, at in zip(self.own_s, self.stage, strict=True) if at == stage
            )
            for stage in set(self.stage)
        }
        rows = [
            (s / medians[stage] if medians[stage] > 0 else 1.0, rank, s - medians[stage])
            for rank, (s, stage) in enumerate(zip(self.own_s, self.stage, strict=True))
        ]
        ratio, rank, above_s = max(rows, key=lambda row: (row[0], -row[1]))
        return rank, ratio, above_s


class Meter:
    """Adds up what is reported per record.

    The clock of training stands still in evaluations and saves; the run's wall time does not.

    Args:
        throughput: turns seconds, tokens and FLOPs into speed.
        flops: counts documents.
        clock: of this process's phases.
        communication: of what its steps wait for others.
    """

    def __init__(
        self,
        throughput: Throughput,
        flops: DocumentFlops,
        clock: PhaseClock,
        communication: CommunicationClock,
    ) -> None:
        self.throughput = throughput
        self.flops = flops
        self.clock = clock
        self.communication = communication
        self.data_wait_s = 0.0
        self.own_data_s = 0.0
        self.own_times: OwnTimes | None = None
        """Of the last record."""
        self._num_overflow_tokens = 0
        self._flops = StepFlops(0, 0)
        self._sent_bytes = [0, 0]
        self._num_steps = 0
        self._training_s = 0.0
        self._since_s: float | None = None
        self._wall_since_s = time.perf_counter()

    def start(self) -> None:
        """Starts the clock of training; a running one goes on."""
        if self._since_s is None:
            traffic.take()  # of an evaluation or of samples
            self._since_s = time.perf_counter()

    def stop(self, state: TrainState) -> None:
        """Stops the clock of training, and brings the run's wall time up to date."""
        self._take(state)
        if self._since_s is not None:
            self._take_sent_bytes()
        self._since_s = None

    def count_ahead(self, batches: Iterable[Batch], step: int) -> None:
        """Counts the documents of a step to come, in the thread that read them: `add` then looks them up."""
        for batch in batches:
            self.flops.of_step(batch.document_tokens, step)

    def add(self, batches: list[Batch], step: int) -> None:
        """Counts one step, the one with number `step`."""
        self._num_steps += 1
        self._num_overflow_tokens += sum(batch.num_overflow_tokens for batch in batches)
        for batch in batches:
            counted = self.flops.of_step(batch.document_tokens, step)
            self._flops = StepFlops(
                self._flops.selected + counted.selected, self._flops.dense + counted.dense
            )

    def record(self, run: Run, result: StepResult) -> dict[str, float]:
        """Returns the metrics of the steps since the last record, and begins the next. Collective."""
        self._take(run.state)
        # Context-parallel processes read the same sequences: one of them counts. fp64: FLOPs of many steps
        # do not fit into int64, and nobody needs their last digits.
        counts = [self._num_overflow_tokens, self._flops.selected, self._flops.dense]
        mine = torch.tensor(counts, dtype=torch.float64)
        mine = mine if run.groups.context_rank == 0 else torch.zeros_like(mine)
        overflow, selected, dense = run.groups.sum_over_data(mine).tolist()
        tokens = self._num_steps * run.derived.tokens_per_step
        speed = self.throughput.update(self._training_s, tokens, StepFlops(int(selected), int(dense)))
        values = {
            "train/loss_nats": result.loss_nats,
            **result.added,
            "optim/lr": result.lr,
            "optim/grad_norm": result.grad_norm,
            "optim/num_zeros": result.num_zeros,
            "progress/consumed_tokens": run.state.consumed_tokens,
            "perf/data_wait_s": self.data_wait_s,
            "data/overflow_tokens": int(overflow),
            **speed,
            **self._of_processes(run.groups, speed["perf/step_time_s"]),
            **self._context_traffic(run),
        }
        self.data_wait_s = self.own_data_s = self._training_s = 0.0
        self._num_steps, self._num_overflow_tokens, self._flops = 0, 0, StepFlops(0, 0)
        return values

    def _of_processes(self, groups: Groups, step_s: float) -> dict[str, float]:
        """Returns memory and the split of the step's time over all processes, and keeps their own times."""
        phases = self.clock.take()
        row = [peak_memory_gib(groups), float(groups.collection.pp.rank()), self.own_data_s]
        row += [self.communication.take(), *(phases[name] for name in PHASES)]
        table = groups.gather(torch.tensor(row, dtype=torch.float64))
        memory, stage, own_data, communication, *seconds = table.unbind(1)
        forward = seconds[PHASES.index("forward")]
        self.own_times = OwnTimes(
            ((own_data + forward) / self._num_steps).tolist(), stage.int().tolist(), step_s
        )
        values = {"memory/peak_gib": memory.max().item()}
        for name, column in zip(PHASES, seconds, strict=True):
            values[f"perf/{name}_s"] = column.mean().item() / self._num_steps
        if groups.world_size > 1:
            rank, values["perf/slowest_ratio"], _ = self.own_times.slowest()
            values["perf/slowest_rank"] = rank
            # Where not every collective is seen (a process that train.py did not start) no number is better
            # than one that is too small.
            if collective_trace.is_complete():
                values["perf/communication_s"] = communication.mean().item() / self._num_steps
        return values

    def _context_traffic(self, run: Run) -> dict[str, float]:
        """Returns what was sent between context-parallel processes since the last record. Collective."""
        self._take_sent_bytes()
        parallel, model = run.config.parallel, run.config.model
        if parallel.context_size == 1:
            return {}
        mine = torch.tensor(self._sent_bytes, dtype=torch.int64, device=run.groups.device)
        self._sent_bytes = [0, 0]
        # Every layer is on one stage, and every copy and part of it goes through these micro-batches.
        layers = (model.num_layers + model.mtp_num_layers) * run.groups.world_size // parallel.pipeline_size
        times = layers * run.derived.micro_batches_per_step * self._num_steps
        total, across = (number / times for number in run.groups.sum_over_world(mine).tolist())
        values = {"perf/context_sent_bytes_per_layer": total}
        if parallel.context_node_size is not None:
            values["perf/context_sent_across_nodes_bytes_per_layer"] = across
        return values

    def _take_sent_bytes(self) -> None:
        self._sent_bytes = [a + b for a, b in zip(self._sent_bytes, traffic.take(), strict=True)]

    def _take(self, state: TrainState) -> None:
        now_s = time.perf_counter()
        if self._since_s is not None:
            self._training_s += now_s - self._since_s
            self._since_s = now_s
        state.wall_s += now_s - self._wall_since_s
        self._wall_since_s = now_s


def peak_memory_gib(groups: Groups) -> float:
    """Returns the peak memory of this process since it started: of the device, or of the host on a CPU."""
    if groups.device.type == "cuda":
        num_bytes = torch.cuda.max_memory_allocated()
    else:
        # Linux counts in KiB, macOS in bytes.
        num_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
            1 if sys.platform == "darwin" else 1024
        )
    return num_bytes / 2**30
