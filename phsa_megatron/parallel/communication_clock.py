"""How long a process stands in communication that its step waits for, without waiting for the device.

What counts, each once:

- a blocking collective (tensor parallelism, gradients, losses and norms), from its call to its return;
- of one that runs beside computation (exchange of keys, overlapped reduction and gathering, neighbours of the
  pipeline), the wait for it alone: what computation hides costs the step nothing.

Waiting for a slower process is part of both. On a CPU the host's clock measures. On a GPU the host only
enqueues: an event goes into the current stream before and after, and the time between both is what the
stream stood still. Events are read once the device has passed them.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from phsa_megatron.parallel import collective_trace


class CommunicationClock:
    """Times the collectives of `collective_trace` while `running`.

    Args:
        device: of the process.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._spans: deque[tuple[Any, Any]] = deque()
        self._spare: list[Any] = []
        self._seconds = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Time what this process communicates inside of the block; nothing outside of it."""
        collective_trace.listen(self)
        try:
            yield
        finally:
            collective_trace.listen(None)

    def timed(self, call: Callable[[], Any]) -> Any:
        """Return what `call` returns, and count the time that it takes (the stream, on a GPU)."""
        begin = self._mark()
        try:
            return call()
        finally:
            self._spans.append((begin, self._mark()))

    def take(self) -> float:
        """Return the seconds since the last call, as far as the device has come."""
        while self._spans:
            begin, end = self._spans[0]
            if self._on_gpu and not end.query():
                break
            self._spans.popleft()
            if self._on_gpu:
                self._seconds += begin.elapsed_time(end) / 1e3
                self._spare += [begin, end]
            else:
                self._seconds += end - begin
        taken, self._seconds = self._seconds, 0.0
        return taken

    def _mark(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        # Events are used again: a step may have thousands of collectives.
        event = self._spare.pop() if self._spare else torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event
