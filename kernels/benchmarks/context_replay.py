"""Context parallelism on one device: one process after the other, with what the others would have sent.

`Replay.record` runs every process up to its next collective, works out what each receives, and starts again
with that: after as many rounds as there are collectives every process has run to its end. `Replay.playing`
then runs one process alone, and its collectives give at once what was recorded: what is left to time is the
process's own work, with the project's own code from the chunk of queries to the gradients of own keys.

Nothing is imitated but the five functions of `phsa_megatron.parallel.exchange` that call torch.distributed.
"""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace
from unittest import mock

import torch

from phsa_megatron.parallel import exchange


class ReplayGroup:
    """What the layers ask of a process group: its size, and whose turn it is."""

    def __init__(self, replay):
        self._replay = replay

    def rank(self):
        return self._replay.rank

    def size(self):
        return self._replay.size


class _NotYet(Exception):
    """A collective whose result needs what other processes send."""


class Replay:
    """The collectives of `size` processes, in the order in which each calls them."""

    def __init__(self, size):
        self.size, self.rank = size, 0
        self._received = []  # of each collective: what every process gets
        self._waiting = None  # of the collective that is being recorded: what every process sends
        self._next = 0
        self._returned = {}
        self.sent_bytes = [0] * size
        """What each process sent to others in the recorded passes."""

    def collection(self):
        """Megatron's group collection, as far as context parallelism reads it."""
        return SimpleNamespace(cp=ReplayGroup(self), hcp=None)

    def record(self, work):
        """Return what `work()` gives on every process; it reads `self.rank` and runs many times."""
        self._received, self.sent_bytes = [], [0] * self.size
        with self._patched():
            while True:
                self._waiting, results = {}, []
                for rank in range(self.size):
                    self.rank, self._next = rank, 0
                    try:
                        results.append(work())
                    except _NotYet:
                        continue
                if not self._waiting:
                    self._waiting = None
                    return results
                assert len(self._waiting) == self.size, "processes call different collectives"
                for rank, (kind, sent) in self._waiting.items():
                    self.sent_bytes[rank] += _bytes_to_others(kind, sent, rank, self.size)
                self._received.append(_result(self._waiting))

    @contextmanager
    def playing(self, rank):
        """Yield a function that starts one more pass of process `rank`, whose collectives cost no time."""

        def start():
            self.rank, self._next = rank, 0

        with self._patched():
            yield start

    def _call(self, kind, sent):
        number, self._next = self._next, self._next + 1
        if number < len(self._received):
            return self._received[number][self.rank]
        if self._waiting is not None:
            self._waiting[self.rank] = (kind, sent)
            raise _NotYet
        return self._unrecorded(number, kind, sent)

    def _unrecorded(self, number, kind, sent):
        """A pass that goes beyond the recorded one (its backward pass): right shapes, no right values."""
        if kind == "reduce_scatter":
            return sent[self.rank]
        if kind == "reduce_scatter_from":
            return None  # what stands in the results is left there
        assert kind == "all_to_all", f"{kind} was not recorded"
        rows, _, num_received = sent
        key = (number, self.rank)
        if key not in self._returned:
            self._returned[key] = rows.new_zeros(sum(num_received), *rows.shape[1:])
        return self._returned[key]

    @contextmanager
    def _patched(self):
        done = SimpleNamespace(wait=lambda: None)

        def all_gather(sent, groups, group):
            return self._call("all_gather", sent), done

        def reduce_scatter(parts, groups, group):
            return self._call("reduce_scatter", parts.contiguous())

        def all_gather_to(sent, landing, groups):
            # The memory of the recorded pass, so that what arrives takes no time.
            return self._call("all_gather_to", (sent, landing)), done

        def reduce_scatter_from(parts, results, groups):
            sums = self._call("reduce_scatter_from", tuple(parts))
            if self._waiting is not None:
                for result, total in zip(results, sums, strict=True):
                    result.copy_(total)

        def all_to_all(sent, route, num_sent, num_received):
            return self._call("all_to_all", (sent, num_sent, num_received))

        replaced = {
            "_all_gather": all_gather, "_all_gather_to": all_gather_to, "_all_to_all": all_to_all,
            "_reduce_scatter": reduce_scatter, "_reduce_scatter_from": reduce_scatter_from,
        }  # fmt: skip
        with mock.patch.multiple(exchange, **replaced):
            yield


def _bytes_to_others(kind, sent, rank, size):
    """As `exchange.traffic` counts them."""
    if kind == "all_gather":
        return (size - 1) * sent.numel() * sent.element_size()
    if kind == "reduce_scatter":
        return (size - 1) * sent[0].numel() * sent.element_size()
    if kind == "all_gather_to":
        return sum(_bytes_to_others("all_gather", x, rank, size) for x in sent[0])
    if kind == "reduce_scatter_from":
        return sum(_bytes_to_others("reduce_scatter", x, rank, size) for x in sent)
    rows, num_sent, _ = sent
    to_others = sum(num_sent) - num_sent[rank]
    return to_others * rows[:1].numel() * rows.element_size()


def _result(sent):
    """What every process receives, of {process: (kind, what it sends)}."""
    ranks = range(len(sent))
    (kind,) = {kind for kind, _ in sent.values()}
    parts = [sent[rank][1] for rank in ranks]
    if kind == "all_gather":
        everyone = torch.stack(parts)  # one tensor for all: nobody writes to it
        return [everyone for _ in ranks]
    if kind == "all_gather_to":
        to = parts[0][1]()
        for place, received in enumerate(to.parts):
            torch.stack([sent[place] for sent, _ in parts], out=received)
        return [to for _ in ranks]
    if kind == "reduce_scatter_from":
        sums = [_result({r: ("reduce_scatter", part[i]) for r, part in enumerate(parts)})
                for i in range(len(parts[0]))]  # fmt: skip
        return [[total[rank] for total in sums] for rank in ranks]
    if kind == "reduce_scatter":
        wide = torch.promote_types(parts[0].dtype, torch.float32)
        return [sum(part[rank].to(wide) for part in parts).to(parts[0].dtype) for rank in ranks]
    pieces = [rows.split_with_sizes(list(num_sent)) for rows, num_sent, _ in parts]
    return [torch.cat([piece[rank] for piece in pieces]) for rank in ranks]
