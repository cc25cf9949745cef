"""The collectives of this process: which was the last, has it returned, and a door for who times them.

`install()` wraps the functions of torch.distributed once, before megatron is imported, which copies some of
them. A wrapper stores five fields and calls the original. On NCCL "returned" means that the collective was
queued, on gloo that it is done. Object collectives are recorded as one.

A listener (`communication_clock`) is handed every outermost call, and every wait for one that was started and
not waited for: what such a call returns is then a `_Watched` handle. Collectives that megatron coalesces
(gradients and weights of a data-parallel group) start, and block, where the coalescing ends.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch.distributed as dist
from torch.distributed import distributed_c10d

_TRACED = (
    "all_reduce", "all_gather", "all_gather_into_tensor", "reduce_scatter", "reduce_scatter_tensor",
    "all_to_all", "all_to_all_single", "broadcast", "reduce", "gather", "scatter", "barrier",
    "send", "recv", "batch_isend_irecv", "all_gather_object", "gather_object", "broadcast_object_list",
    "_all_gather_base", "_reduce_scatter_base",
)  # fmt: skip
_COMPARED_BY_IDENTITY = ("isend", "irecv")
"""torch looks whether an operation is one of these: they are replaced where it looks, too."""
_COALESCING = "_coalescing_manager"


class Listener(Protocol):
    """Who is handed the collectives of this process, to time them."""

    def timed(self, call: Callable[[], Any]) -> Any:
        """Return what `call` returns."""
        ...


class _Last:
    """The last collective that was called."""

    number = 0
    name = ""
    shape: tuple[int, ...] | None = None
    depth = 0
    """Calls that have not returned; a collective inside another one is part of it."""
    listener: Listener | None = None


_installed = False
_before_megatron = False


def install() -> None:
    """Wrap torch's collectives; a second call does nothing."""
    global _installed, _before_megatron
    if _installed:
        return
    _installed, _before_megatron = True, "megatron.core" not in sys.modules
    for name in (*_TRACED, *_COMPARED_BY_IDENTITY):
        original = getattr(dist, name, None)
        if original is None:
            continue
        wrapped = _traced(name, original)
        setattr(dist, name, wrapped)
        if name in _COMPARED_BY_IDENTITY:
            setattr(distributed_c10d, name, wrapped)
    # torch's own batches of messages keep the original: they are inside of a traced call.
    setattr(dist, _COALESCING, _coalesced(getattr(dist, _COALESCING)))


def is_complete() -> bool:
    """Whether every collective of this process is seen: megatron has copied no name that is not wrapped."""
    return _before_megatron


def listen(listener: Listener | None) -> None:
    """Hand collectives to a listener from now on, or to nobody."""
    _Last.listener = listener


@contextmanager
def unheard() -> Iterator[None]:
    """Hand no collective of the block to the listener: nothing happens there that takes time."""
    kept, _Last.listener = _Last.listener, None
    try:
        yield
    finally:
        _Last.listener = kept


def is_running() -> bool:
    """Whether the main thread is in a collective now."""
    return _Last.depth > 0


def number() -> int:
    """How many collectives this process has begun."""
    return _Last.number


def last() -> str:
    """The last collective, such as `all_reduce #118 [4096], not returned`; empty before the first."""
    if not _Last.number:
        return ""
    shape = "" if _Last.shape is None else f" {list(_Last.shape)}"
    return f"{_Last.name} #{_Last.number}{shape}, {'not returned' if _Last.depth else 'returned'}"


def _traced(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        listener = _Last.listener if _Last.depth == 0 else None
        if _Last.depth == 0:
            _Last.number += 1
            _Last.name = name
            _Last.shape = getattr(args[0], "shape", None) if args else None
        _Last.depth += 1
        try:
            if listener is None:
                return original(*args, **kwargs)
            return _watched(listener.timed(functools.partial(original, *args, **kwargs)))
        finally:
            _Last.depth -= 1

    return call


class _Watched:
    """A collective that was started: torch's handle, whose `wait` a listener hears of."""

    def __init__(self, work: Any) -> None:
        self._work = work

    def wait(self, *args: Any, **kwargs: Any) -> Any:
        """Wait as torch's handle does."""
        return _heard(functools.partial(self._work.wait, *args, **kwargs))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


def _watched(result: Any) -> Any:
    """Return the result of a call with its handles, if it has any, as watched ones."""
    if isinstance(result, dist.Work):
        return _Watched(result)
    if isinstance(result, list):  # of a batch of messages
        return [_watched(each) for each in result]
    return result


def _heard(call: Callable[[], Any]) -> Any:
    """Return what a wait returns; until then the last collective has not."""
    listener = _Last.listener if _Last.depth == 0 else None
    _Last.depth += 1
    try:
        return call() if listener is None else listener.timed(call)
    finally:
        _Last.depth -= 1


def _coalesced(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    @contextmanager
    def manager(*args: Any, **kwargs: Any) -> Iterator[Any]:
        context = original(*args, **kwargs)
        coalescing = context.__enter__()
        try:
            yield coalescing
        except BaseException as error:
            if not context.__exit__(type(error), error, error.__traceback__):
                raise
            return
        _heard(functools.partial(context.__exit__, None, None, None))
        wait = coalescing.wait
        coalescing.wait = lambda: _heard(wait)

    return manager
