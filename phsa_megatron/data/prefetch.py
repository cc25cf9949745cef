"""Reads ahead in one thread, so that the training loop finds its next batch ready."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Generic, TypeVar

Key = TypeVar("Key")
Item = TypeVar("Item")

_POLL_EVERY_S = 0.2
_ABANDON_AFTER_S = 2.0


class _Failure:
    def __init__(self, error: BaseException) -> None:
        self.error = error


class _End:
    pass


class Prefetcher(Generic[Key, Item]):
    """An iterator over `read(key)` for each key, read ahead by a thread, in order.

    The order of the results is the order of the keys, so reading ahead changes nothing but time. An error of
    `read` is raised by the `next` that would have returned its result; after it the iteration is over.

    Use it as a context manager, or call `close()`: it stops the thread.
    """

    def __init__(
        self,
        read: Callable[[Key], Item],
        keys: Iterable[Key],
        depth: int = 4,
        poll: Callable[[], None] | None = None,
    ) -> None:
        """Start reading.

        Args:
            read: called in the thread, for one key after the other.
            keys: what to read; may be endless.
            depth: results kept ready at most.
            poll: called in the caller's thread about five times a second while `next` waits. An exception of
                it leaves `next`, and the result it waited for is the next one's.

        Raises:
            ValueError: a depth below 1.
        """
        if depth < 1:
            raise ValueError(f"depth={depth}: at least one result must fit")
        self._read = read
        self._keys = iter(keys)
        self._poll = poll
        self._results: queue.Queue[Item | _Failure | _End] = queue.Queue(maxsize=depth)
        self._closing = threading.Event()
        self._finished = False
        self._thread = threading.Thread(target=self._run, name="prefetch", daemon=True)
        self._thread.start()

    def __iter__(self) -> Prefetcher[Key, Item]:
        return self

    def __next__(self) -> Item:
        """Return the next result; waits for it and polls meanwhile.

        Raises:
            StopIteration: no key is left, or the prefetcher was closed.
        """
        if self._finished:
            raise StopIteration
        while True:
            try:
                result = self._results.get(timeout=_POLL_EVERY_S)
            except queue.Empty:
                if self._poll is not None:
                    self._poll()
                continue
            if isinstance(result, _End):
                self.close()
                raise StopIteration
            if isinstance(result, _Failure):
                self.close()
                raise result.error
            return result

    def close(self) -> None:
        """Stop the thread and drop what it has read. A second call does nothing.

        A read that does not return (a network file system that hangs) is left alone after two seconds:
        whoever closes wants to leave, and the thread is a daemon that ends with its read.
        """
        self._finished = True
        self._closing.set()
        give_up_at_s = time.monotonic() + _ABANDON_AFTER_S
        while self._thread.is_alive() and time.monotonic() < give_up_at_s:
            self._drop_results()
            self._thread.join(timeout=_POLL_EVERY_S)
        self._drop_results()

    def __enter__(self) -> Prefetcher[Key, Item]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(self) -> None:
        try:
            for key in self._keys:
                if self._closing.is_set():
                    return
                self._put(self._read(key))
            self._put(_End())
        except BaseException as error:  # whatever it is, it is raised again in the caller's thread
            self._put(_Failure(error))

    def _put(self, result: Item | _Failure | _End) -> None:
        while not self._closing.is_set():
            try:
                self._results.put(result, timeout=_POLL_EVERY_S)
                return
            except queue.Full:
                continue

    def _drop_results(self) -> None:
        while True:
            try:
                self._results.get_nowait()
            except queue.Empty:
                return
