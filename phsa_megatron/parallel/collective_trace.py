"""The last collective of this process: which one, how manieth, of what shape, and whether it has returned.

`install()` wraps the functions of torch.distributed once, before megatron is imported, which copies some of
them. A wrapper stores five fields and calls the original. On NCCL "returned" means that the collective was
queued, on gloo that it is done. Object collectives are recorded as one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

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


class _Last:
    """The last collective that was called."""

    number = 0
    name = ""
    shape: tuple[int, ...] | None = None
    depth = 0
    """Calls that have not returned; a collective inside another one is part of it."""


_installed = False


def install() -> None:
    """Wrap torch's collectives; a second call does nothing."""
    global _installed
    if _installed:
        return
    _installed = True
    for name in (*_TRACED, *_COMPARED_BY_IDENTITY):
        original = getattr(dist, name, None)
        if original is None:
            continue
        wrapped = _traced(name, original)
        setattr(dist, name, wrapped)
        if name in _COMPARED_BY_IDENTITY:
            setattr(distributed_c10d, name, wrapped)


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
        if _Last.depth == 0:
            _Last.number += 1
            _Last.name = name
            _Last.shape = getattr(args[0], "shape", None) if args else None
        _Last.depth += 1
        try:
            return original(*args, **kwargs)
        finally:
            _Last.depth -= 1

    return call
