"""The collectives of context parallelism: everything that a layer sends goes through this file.

- `start_all_gather` gives every process all parts; `reduce_scatter` is what its backward pass needs.
- `start_all_gather_to` writes parts where they belong, and `reduce_scatter_from` reads them where they lie:
  what they save are passes over all keys, which no more processes make smaller.
- `send_rows` gives every process the rows that it asked for, and their gradients back to the owners.

Over several nodes (`ContextGroups.across`) each goes in two steps, so that what several processes of a node
need crosses to that node once: first between processes of the same place on all nodes, then inside the node;
gradients are summed inside the node before they cross. The bytes that are sent are counted by formula in
`config/context_volume.py`, and as they are sent in `traffic`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _coalescing_manager


@dataclass(frozen=True)
class ContextGroups:
    """The processes that hold parts of the same sequences, and how they lie on nodes.

    Process n * inside.size() + i of `whole` is process i of node n.
    """

    whole: dist.ProcessGroup
    across: dist.ProcessGroup | None = None
    """The processes of this one's place i, on all nodes in order; None if nodes make no difference."""
    inside: dist.ProcessGroup | None = None
    """The processes of this node, in order; None if nodes make no difference."""

    @classmethod
    def of(cls, collection: Any) -> ContextGroups:
        """Return the groups of megatron's process-group collection, as `parallel.groups` made it."""
        levels = getattr(collection, "hcp", None)
        if not levels:
            return cls(collection.cp)
        inside, across = levels
        return cls(collection.cp, across, inside)

    def rank(self) -> int:
        """Return the place of this process in `whole`."""
        return int(self.whole.rank())

    def size(self) -> int:
        """Return the number of processes of `whole`."""
        return int(self.whole.size())

    def levels(self) -> tuple[dist.ProcessGroup, ...]:
        """Return the groups that keys pass through, in order: across nodes, then inside; or all at once."""
        return (self.whole,) if self.across is None or self.inside is None else (self.across, self.inside)


class Traffic:
    """Bytes that this process has sent to others of its context group since the last look."""

    def __init__(self) -> None:
        self._bytes = [0, 0]

    def add(self, sent_bytes: int, groups: ContextGroups, group: dist.ProcessGroup) -> None:
        """Count what was sent over one of the groups of `groups.levels()`."""
        self._bytes[0] += sent_bytes
        self._bytes[1] += sent_bytes if group is groups.across else 0

    def take(self) -> tuple[int, int]:
        """Return (all bytes, those of them that went to other nodes by `across`), and start again."""
        total, across = self._bytes
        self._bytes = [0, 0]
        return total, across

    @contextmanager
    def apart(self, sent: list[int]) -> Iterator[None]:
        """Put what is sent inside of the block into `sent` instead of counting it."""
        kept, self._bytes = self._bytes, [0, 0]
        try:
            yield
        finally:
            sent[:], self._bytes = self._bytes, kept

    def again(self, sent: list[int]) -> None:
        """Count what `apart` put aside."""
        self._bytes = [a + b for a, b in zip(self._bytes, sent, strict=True)]


traffic = Traffic()
"""Of this process. Only for reports: no result depends on it."""


@dataclass(frozen=True)
class Gathering:
    """An all-gather that is under way.

    Attributes:
        sent: this process's tensor, kept alive until the others have read it.
        received: [processes of the first level, *sent.shape]; not to be read before `parts`.
        work: of the first level.
        groups: whose parts are gathered.
    """

    sent: Tensor
    received: Tensor
    work: Any
    groups: ContextGroups

    def parts(self) -> list[Tensor]:
        """Return all processes' tensors in order; on a GPU the current stream waits, not the host."""
        self.work.wait()
        if len(self.groups.levels()) == 1:
            return list(self.received.unbind(0))
        # Only the way across nodes was under way: the way inside the node starts here.
        inside = self.groups.levels()[1]
        everyone, work = _all_gather(self.received, self.groups, inside)
        work.wait()
        return [everyone[i, n] for n in range(len(self.received)) for i in range(inside.size())]

    def joined(self) -> Tensor:
        """Return all processes' tensors in order, [CP, *sent.shape]: without a copy unless nodes matter."""
        if len(self.groups.levels()) > 1:
            return torch.stack(self.parts())
        self.work.wait()
        return self.received


def start_all_gather(tensor: Tensor, groups: ContextGroups) -> Gathering:
    """Start to gather `tensor`, of one shape on all processes, and return at once."""
    sent = tensor.contiguous()
    received, work = _all_gather(sent, groups, groups.levels()[0])
    return Gathering(sent, received, work, groups)


def _all_gather(sent: Tensor, groups: ContextGroups, group: dist.ProcessGroup) -> tuple[Tensor, Any]:
    received = sent.new_empty(group.size(), *sent.shape)
    work = dist.all_gather_into_tensor(received.view(-1), sent.view(-1), group=group, async_op=True)
    traffic.add((group.size() - 1) * sent.numel() * sent.element_size(), groups, group)
    return received, work


@dataclass(frozen=True)
class Landing:
    """Memory for parts of all processes, whose owner knows what they are together.

    Attributes:
        whole: tensors that the parts lie in, and whatever else the owner reads afterwards.
        parts: for each tensor that is sent, [processes, *its shape], contiguous.
    """

    whole: tuple[Tensor, ...]
    parts: tuple[Tensor, ...]


@dataclass(frozen=True)
class LandingGathering:
    """An all-gather under way to where its parts belong; `landing` is not to be read before `work.wait()`."""

    sent: tuple[Tensor, ...]
    landing: Landing
    work: Any


def start_all_gather_to(
    tensors: Sequence[Tensor], landing: Callable[[], Landing], groups: ContextGroups
) -> LandingGathering:
    """Start to gather each of `tensors` into its part of `landing()`, all in one collective of one level.

    Raises:
        ValueError: the groups have two levels: parts then arrive in the order of places, not of processes.
    """
    if len(groups.levels()) > 1:
        raise ValueError(
            "parts that pass two levels do not arrive in the order of processes: gather, then copy"
        )
    sent = tuple(tensor.contiguous() for tensor in tensors)
    return LandingGathering(sent, *_all_gather_to(sent, landing, groups))


def _all_gather_to(
    sent: tuple[Tensor, ...], landing: Callable[[], Landing], groups: ContextGroups
) -> tuple[Landing, Any]:
    to, group = landing(), groups.whole
    with _coalescing_manager(group, async_ops=True) as work:
        for part, received in zip(sent, to.parts, strict=True):
            dist.all_gather_into_tensor(received.view(-1), part.view(-1), group=group, async_op=True)
            traffic.add((group.size() - 1) * part.numel() * part.element_size(), groups, group)
    return to, work


def reduce_scatter_from(parts: Sequence[Tensor], results: Sequence[Tensor], groups: ContextGroups) -> None:
    """Write the sum over processes of `parts[i][r]` to `results[i]` on process r, in one collective.

    Args:
        parts: each [size, ...], contiguous.
        results: each contiguous, of the shape of `parts[i][0]`.
        groups: of one level.
    """
    if len(groups.levels()) > 1:
        raise ValueError("sums inside a node come first: use reduce_scatter")
    _reduce_scatter_from(parts, results, groups)


def _reduce_scatter_from(parts: Sequence[Tensor], results: Sequence[Tensor], groups: ContextGroups) -> None:
    group = groups.whole
    with _coalescing_manager(group, async_ops=True) as work:
        for part, result in zip(parts, results, strict=True):
            dist.reduce_scatter_tensor(result.view(-1), part.view(-1), group=group, async_op=True)
            traffic.add((group.size() - 1) * result.numel() * result.element_size(), groups, group)
    work.wait()


def reduce_scatter(parts: Tensor, groups: ContextGroups) -> Tensor:
    """Return the sum over processes of `parts[r]`, on process r. `parts` is [size, ...]."""
    if len(groups.levels()) == 1:
        return _reduce_scatter(parts, groups, groups.whole)
    across, inside = groups.levels()
    by_place = parts.view(across.size(), inside.size(), *parts.shape[1:]).transpose(0, 1)
    return _reduce_scatter(_reduce_scatter(by_place, groups, inside), groups, across)


def _reduce_scatter(parts: Tensor, groups: ContextGroups, group: dist.ProcessGroup) -> Tensor:
    sent = parts.contiguous()
    result = sent.new_empty(sent.shape[1:])
    dist.reduce_scatter_tensor(result.view(-1), sent.view(-1), group=group)
    traffic.add((group.size() - 1) * result.numel() * result.element_size(), groups, group)
    return result


def sum_over_context(tensor: Tensor, groups: ContextGroups) -> Tensor:
    """Return the sum of `tensor` over the processes of `groups`.

    For measurements alone: `traffic` counts what a layer sends, and leaves this out.
    """
    total = tensor.clone()
    dist.all_reduce(total, group=groups.whole)
    return total


@dataclass(frozen=True)
class Route:
    """Which rows of a tensor every process of one group gets from this one, and how many come back.

    Attributes:
        groups: of the layer.
        group: one of `groups.levels()`.
        rows: int64, the rows for process 0 of `group`, then those for process 1, ...; each process's are
            different from each other. A process may send to itself.
        num_sent: how many of `rows` each process gets.
        num_received: how many each process sends to this one.
    """

    groups: ContextGroups
    group: dist.ProcessGroup
    rows: Tensor
    num_sent: tuple[int, ...]
    num_received: tuple[int, ...]


def send_rows(x: Tensor, route: Route) -> Tensor:
    """Return the rows that the processes of `route.group` sent here, process after process.

    Differentiable: gradients return to the rows' owner and are summed there in fp32 (fp64 for fp64), in the
    order of the processes.
    """
    received: Tensor = _SendRows.apply(x, route)  # type: ignore[no-untyped-call]
    return received


class _SendRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, route: Route) -> Tensor:
        ctx.route, ctx.num_rows = route, len(x)
        return _all_to_all(x.index_select(0, route.rows), route, route.num_sent, route.num_received)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        route: Route = ctx.route
        returned = _all_to_all(grad.contiguous(), route, route.num_received, route.num_sent)
        wide = torch.float64 if grad.dtype == torch.float64 else torch.float32
        total = grad.new_zeros(ctx.num_rows, *grad.shape[1:], dtype=wide)
        # One process after the other: rows of one are different, so that the order of sums is fixed.
        sizes = list(route.num_sent)
        for rows, part in zip(
            route.rows.split_with_sizes(sizes), returned.split_with_sizes(sizes), strict=True
        ):
            total.index_add_(0, rows, part.to(wide))
        return total.to(grad.dtype), None


def _all_to_all(
    sent: Tensor, route: Route, num_sent: tuple[int, ...], num_received: tuple[int, ...]
) -> Tensor:
    received = sent.new_empty(sum(num_received), *sent.shape[1:])
    dist.all_to_all_single(received, sent, list(num_received), list(num_sent), group=route.group)
    to_others = sum(num_sent) - num_sent[route.group.rank()]
    row_bytes = sent[:1].numel() * sent.element_size() if len(sent) else 0
    traffic.add(to_others * row_bytes, route.groups, route.group)
    return received
