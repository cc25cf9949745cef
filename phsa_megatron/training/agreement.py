"""Decisions that process 0 takes for all, errors included, so that no process waits for one that gave up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch.distributed as dist

from phsa_megatron.parallel.groups import Groups

_T = TypeVar("_T")


def decide(groups: Groups, call: Callable[[], _T]) -> _T:
    """The result of a call on process 0, on all processes. Every process must call it.

    Args:
        groups: process groups.
        call: runs on process 0 only; its result must be picklable.

    Raises:
        Exception: what the call raised, on all processes.
    """
    if groups.world_size == 1:
        return call()
    box: list[Any] = [None, None]
    if groups.rank == 0:
        try:
            box[0] = call()
        except Exception as error:
            box[1] = error
    dist.broadcast_object_list(box, src=0, device=groups.device)
    if box[1] is not None:
        raise box[1]
    return cast(_T, box[0])


def attempt(groups: Groups, call: Callable[[], Any]) -> str | None:
    """Run on process 0; None, or on all processes what the operating system refused."""

    def try_it() -> str | None:
        try:
            call()
        except OSError as error:
            return str(error)
        return None

    return decide(groups, try_it)


def attempt_everywhere(groups: Groups, call: Callable[[], Any]) -> str | None:
    """Run on every process; None, or on all processes that at least one of them was refused."""
    mine = ""
    try:
        call()
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        mine = repr(error)
    if groups.any_true(bool(mine)):
        return mine or "another process could not write (see its log)"
    return None
