"""A run that is open: everything the loop needs, built in one order and closed in the reverse."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from phsa_megatron.attention.punctuation import PunctuationTable, table_of
from phsa_megatron.config.derive import Derived, derive
from phsa_megatron.config.document_flops import DocumentFlops
from phsa_megatron.config.errors import TrainingError
from phsa_megatron.config.goodput import Goodput
from phsa_megatron.config.records import read_records
from phsa_megatron.config.run_folder import RunFolder
from phsa_megatron.config.schema import TrainConfig, WandbMode
from phsa_megatron.config.skip_list import check_skip_list, skipped_ranges
from phsa_megatron.data.batches import Batch, BatchReader
from phsa_megatron.data.prefetch import Prefetcher
from phsa_megatron.data.tokenizer import Tokenizer
from phsa_megatron.monitoring.console import Console
from phsa_megatron.monitoring.recorder import Recorder
from phsa_megatron.monitoring.throughput import Throughput
from phsa_megatron.monitoring.wandb_run import stable_run_id
from phsa_megatron.parallel.communication_clock import CommunicationClock
from phsa_megatron.parallel.groups import Groups
from phsa_megatron.training import stages
from phsa_megatron.training.checkpoint import Checkpointer, Notify
from phsa_megatron.training.evaluate import Evaluator
from phsa_megatron.training.faults import Faults
from phsa_megatron.training.meter import Meter
from phsa_megatron.training.optimizer import Parts, build_parts
from phsa_megatron.training.phase_clock import PhaseClock
from phsa_megatron.training.progress import Progress
from phsa_megatron.training.signals import StopRequest, StopSignals
from phsa_megatron.training.state import TrainState
from phsa_megatron.training.step import micro_batch_starts


@dataclass
class Run:
    """The open run of one process."""

    config: TrainConfig
    derived: Derived
    groups: Groups
    folder: RunFolder
    recorder: Recorder
    console: Console
    stops: StopSignals
    progress: Progress
    tokenizer: Tokenizer
    table: PunctuationTable
    train_reader: BatchReader
    evaluator: Evaluator
    parts: Parts
    checkpointer: Checkpointer
    state: TrainState
    meter: Meter
    notify: Notify
    """Tells a person and the records what happened; on process 0."""
    goodput: Goodput | None = None
    """Over all launches; on process 0, which has the records."""
    asked: StopRequest = field(default_factory=StopRequest)
    """What was asked and not yet done; `save` is struck off by `save`, `exit` stays."""

    def poll(self) -> StopRequest:
        """Looks for requests to save or leave, on all processes together, and returns what is still to do."""
        new = self.stops.poll()
        if new:
            self.asked = StopRequest(self.asked.save or new.save, self.asked.exit or new.exit, new.reason)
        return self.asked

    def save(self, *, must_succeed: bool = False) -> None:
        """Saves a checkpoint of the state as it is.

        Raises:
            CheckpointError: it failed, and must not (or not again).
        """
        self.progress.enter("checkpoint")
        start_s = time.perf_counter()
        self.meter.stop(self.state)
        self.checkpointer.save(self.parts, self.state, must_succeed=must_succeed)
        self.asked = StopRequest(False, self.asked.exit, self.asked.reason)
        self.recorder.log(self.state.step, {"checkpoint/save_s": time.perf_counter() - start_s})
        self.meter.start()

    def wait_for_batches(self, prefetcher: Prefetcher[int, list[Batch]]) -> list[Batch] | None:
        """Returns this process's micro-batches of the next step, or None if the run shall leave instead.

        No process starts the step before all have their data, so that each of them can still leave.
        """
        start_s = time.perf_counter()
        batches: list[Batch] | None = None
        try:
            while True:
                if batches is None:
                    batches = _next_or_none(prefetcher)
                    if batches is not None:
                        self.meter.own_data_s += time.monotonic() - self.progress.entered_s
                waits = "its own batch" if batches is None else "the batches of other processes"
                self.progress.detail = f"waits for {waits}"
                if not self.groups.any_true(batches is None):
                    return batches
                if self.poll().exit:
                    return None
        finally:
            self.meter.data_wait_s += time.perf_counter() - start_s


def faults_of(config: TrainConfig, rank: int) -> Faults:
    """Returns the faults that a process shall have in this run and has not had yet.

    Raises:
        ConfigError: PHSA_FAULT cannot be read.
    """
    return Faults.from_environment(rank, RunFolder.of(config).faults_file)


@contextmanager
def open_run(config: TrainConfig, groups: Groups, progress: Progress) -> Iterator[Run]:
    """Prints every derived number, then opens all parts of a run and fills them from where it starts.

    The start is the newest committed checkpoint of the run folder; without one the weights of
    `run.init_from`; without that, fresh weights. Which of them is a line on the console.

    Raises:
        PhsaError: something is missing, damaged or does not fit; the message says what to do.
    """
    folder = RunFolder.of(config)
    folder.path.mkdir(parents=True, exist_ok=True)
    derived = derive(config)
    progress.stage = int(groups.collection.pp.rank())
    with _watch(folder, derived, config, groups, progress) as watch, StopSignals(folder, groups) as stops:
        _announce(watch.console, derived, progress.faults, config)
        progress.enter("build")
        tokenizer = Tokenizer.from_file(config.data.tokenizer_file, config.data.eod_token)
        table = punctuation_table(config, tokenizer, groups)
        train_reader = BatchReader(config, "train", tokenizer)
        evaluator = Evaluator(config, groups, tokenizer, table)
        parts = build_parts(config, groups)
        checkpointer = Checkpointer(folder, config, groups, watch.notify)
        progress.enter("load")
        state = _starting_state(parts, checkpointer, train_reader, folder, watch.notify)
        clock = PhaseClock(groups.device)
        progress.on_enter.append(clock.enter)
        yield Run(
            config=config,
            derived=derived,
            groups=groups,
            folder=folder,
            recorder=watch.recorder,
            console=watch.console,
            notify=watch.notify,
            stops=stops,
            progress=progress,
            tokenizer=tokenizer,
            table=table,
            train_reader=train_reader,
            evaluator=evaluator,
            parts=parts,
            checkpointer=checkpointer,
            state=state,
            meter=Meter(
                _throughput(derived, config, state.consumed_sequences),
                DocumentFlops(config, derived.parameters),
                clock,
                CommunicationClock(groups.device),
            ),
            goodput=Goodput.of(read_records(folder.metrics_file), state.step) if groups.rank == 0 else None,
        )


@dataclass(frozen=True)
class _Watch:
    """Where a run is told of: the terminal and the records, on process 0."""

    console: Console
    recorder: Recorder

    def notify(self, kind: str, text: str, **fields: Any) -> None:
        """Tells a person and the records what happened."""
        self.console.message(text)
        self.recorder.event(kind, text=text, **fields)


@contextmanager
def _watch(
    folder: RunFolder, derived: Derived, config: TrainConfig, groups: Groups, progress: Progress
) -> Iterator[_Watch]:
    console = Console(config, config.run.train_steps, rank=groups.rank)
    recorder = Recorder(folder, config, derived, rank=groups.rank)
    try:
        yield _Watch(console, recorder)
    except BaseException as error:
        # No collectives from here on: the other processes may be gone, or wait somewhere else.
        # And nothing that fails here, such as a full disk, may hide the error itself.
        with suppress(TrainingError):
            recorder.event(
                "error", step=progress.step, phase=progress.phase, error=type(error).__name__, text=str(error)
            )
        raise
    finally:
        console.close()
        recorder.close()


def _announce(console: Console, derived: Derived, faults: Faults, config: TrainConfig) -> None:
    for line in [*derived.equations(), *_throughput(derived, config, 0).equations()]:
        console.message(line)
    if faults.planned:
        console.message(f"injected faults: {[fault.text for fault in faults.planned]}")


def _throughput(derived: Derived, config: TrainConfig, consumed_sequences: int) -> Throughput:
    return Throughput(
        derived,
        consumed_tokens=consumed_sequences * config.data.seq_len_tokens,
        peak_tflops=config.cluster.peak_tflops,
    )


def punctuation_table(config: TrainConfig, tokenizer: Tokenizer, groups: Groups) -> PunctuationTable:
    """Returns the punctuation flags of the run's tokenizer, on the model's device."""
    return table_of(tokenizer.decoded_tokens(), config.attention).to(groups.device)


@contextmanager
def read_ahead(run: Run) -> Iterator[Prefetcher[int, list[Batch]]]:
    """Reads the batches of the steps that are left, in a thread, a few steps ahead.

    What a step gets is a pure function of its number; nothing that was read ahead belongs to a checkpoint.
    """
    first_step, consumed = run.state.step + 1, run.state.consumed_sequences
    batch, size = run.config.optim.global_batch_sequences, run.config.optim.micro_batch_sequences

    def read(step: int) -> list[Batch]:
        if run.progress.faults.happens("hang_data", step):
            time.sleep(float(10**6))
        starts = micro_batch_starts(run.config, run.groups, consumed + (step - first_step) * batch)
        batches = [run.train_reader.micro_batch(first, size) for first in starts]
        run.meter.count_ahead(batches, step)
        # From ordinary memory a copy to the device would first wait for all that the device has to do.
        return [batch.pinned() for batch in batches] if run.groups.device.type == "cuda" else batches

    steps = range(first_step, run.config.run.train_steps + 1)
    with Prefetcher(read, steps, depth=2, poll=_give_up_waiting) as prefetcher:
        yield prefetcher


class _StillWaiting(Exception):
    """The next batch is not there yet."""


def _give_up_waiting() -> None:
    raise _StillWaiting


def _next_or_none(prefetcher: Prefetcher[int, list[Batch]]) -> list[Batch] | None:
    """Returns the next batches if they come within a fraction of a second."""
    try:
        return next(prefetcher)
    except _StillWaiting:
        return None


def _starting_state(
    parts: Parts, checkpointer: Checkpointer, train_reader: BatchReader, folder: RunFolder, notify: Notify
) -> TrainState:
    """Fills the parts from where the run starts, and returns its counters."""
    config, rank = parts.config, parts.groups.rank
    order = train_reader.order.ingredients
    state = checkpointer.load_latest(parts, order)
    if state is None:
        state = TrainState(data_fingerprint=order)
        if config.run.init_from is not None:
            source = stages.init_from(config, parts, checkpointer)
            notify("start_from", f"new stage: weights of {source}, all counters at 0")
        else:
            notify("start_from", f"starting from fresh weights, seed {config.run.seed}")
    skipped = skipped_ranges(config.data.skip_sequences)
    check_skip_list(state.skipped, skipped, state.consumed_sequences)
    state.skipped = skipped
    if rank == 0:
        if state.step < config.run.train_steps:
            folder.summary_file.unlink(missing_ok=True)  # of an earlier, shorter end of this run
        if config.monitoring.wandb.mode is not WandbMode.disabled:
            state.wandb_run_id = stable_run_id(folder.wandb_dir)
    return state
