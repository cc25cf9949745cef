"""Reads the micro-batches of the next steps in a thread, so that a step seldom waits for the disk."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

from phsa_megatron.config.schema import TrainConfig
from phsa_megatron.data.batches import Batch, BatchReader
from phsa_megatron.parallel.groups import Groups
from phsa_megatron.training.faults import Faults


def micro_batch_starts(config: TrainConfig, groups: Groups, consumed_sequences: int) -> list[int]:
    """Returns the first sequence of each micro-batch of this process in the step after `consumed_sequences`.

    Micro-batches go round the data-parallel processes, so that step n has the same sequences, in the same
    order of summation over micro-batches, whatever the number of processes.
    """
    size = config.optim.micro_batch_sequences
    num_micro_batches = config.optim.global_batch_sequences // (size * groups.data_size)
    return [
        consumed_sequences + (i * groups.data_size + groups.data_rank) * size
        for i in range(num_micro_batches)
    ]


class Prefetcher:
    """The batches of consecutive steps, read ahead in one thread.

    What a step gets is a pure function of its number; the thread only moves the reading earlier. Nothing
    that is read ahead is part of a checkpoint.

    Args:
        reader: the training set.
        starts: maps a step number (the first step is 1) to the first sequence of each of its micro-batches.
        micro_batch_sequences: sequences of one micro-batch.
        first_step: number of the first step to read.
        last_step: number of the last step to read.
        faults: injected faults.
        num_steps_ahead: steps kept ready.
    """

    def __init__(
        self,
        reader: BatchReader,
        starts: Callable[[int], list[int]],
        micro_batch_sequences: int,
        first_step: int,
        last_step: int,
        faults: Faults,
        num_steps_ahead: int = 2,
    ) -> None:
        self._reader = reader
        self._starts = starts
        self._count = micro_batch_sequences
        self._faults = faults
        self._steps = range(first_step, last_step + 1)
        self._queue: queue.Queue[list[Batch] | BaseException] = queue.Queue(maxsize=num_steps_ahead)
        self._next: list[Batch] | BaseException | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._read_ahead, name="prefetch", daemon=True)
        self._thread.start()

    def ready(self, timeout_s: float) -> bool:
        """Waits at most `timeout_s` for the next step's batches; returns whether they (or an error) are there."""
        if self._next is None:
            try:
                self._next = self._queue.get(timeout=timeout_s)
            except queue.Empty:
                return False
        return True

    def take(self) -> list[Batch]:
        """Returns the micro-batches of the next step, in order. Call only when `ready`.

        Raises:
            DataError: (or whatever the reader raised) the batches could not be read.
        """
        taken, self._next = self._next, None
        if isinstance(taken, BaseException):
            raise taken
        if taken is None:
            raise RuntimeError("Prefetcher.take() was called before ready() returned true")
        return taken

    def close(self) -> None:
        """Ends the thread."""
        self._closed.set()
        self._thread.join(timeout=5.0)

    def _read_ahead(self) -> None:
        for step in self._steps:
            item: list[Batch] | BaseException
            try:
                if self._faults.happens("hang_data", step):
                    self._closed.wait()
                    return
                item = [self._reader.micro_batch(first, self._count) for first in self._starts(step)]
            except BaseException as error:  # handed to the training thread, which raises it
                item = error
            while not self._closed.is_set():
                try:
                    self._queue.put(item, timeout=0.2)
                    break
                except queue.Full:
                    continue
            if self._closed.is_set() or isinstance(item, BaseException):
                return
