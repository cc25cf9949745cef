"""The nodes of a run meet at a store of node 0: who does not come is named; clocks and reports go round."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from phsa_megatron.config.errors import ConfigError, DeviceError
from phsa_megatron.parallel.node_names import describe_node, node_names

_CLOCK_ROUNDS = 5
_LOOK_EVERY_S = 0.1
_REPORT_EVERY_S = 20.0
_KNOCK_TIMEOUT_S = 5.0
_LEAVE_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Place:
    """Where this node stands among all, from the environment of the batch script."""

    node_rank: int
    num_nodes: int
    address: str
    port: int
    """0 lets one node choose a free one."""

    @classmethod
    def from_environment(cls) -> Place:
        """Read PHSA_NODE_RANK, PHSA_NUM_NODES, PHSA_MASTER_ADDR, PHSA_MASTER_PORT; none is one node alone.

        Raises:
            ConfigError: only some are set, or one is no number.
        """
        names = ("PHSA_NODE_RANK", "PHSA_NUM_NODES", "PHSA_MASTER_ADDR", "PHSA_MASTER_PORT")
        missing = [name for name in names if not os.environ.get(name)]
        if len(missing) == len(names):
            return cls(0, 1, "127.0.0.1", 0)
        if missing:
            raise ConfigError(
                f"{', '.join(missing)} is not set, but other variables of the preflight are: set all of "
                f"{', '.join(names)}, or none for one node"
            )
        numbers = {}
        for name in ("PHSA_NODE_RANK", "PHSA_NUM_NODES", "PHSA_MASTER_PORT"):
            text = os.environ[name]
            if not text.isdecimal():
                raise ConfigError(f"{name}={text}: it is a whole number; the batch script sets it")
            numbers[name] = int(text)
        rank, count = numbers["PHSA_NODE_RANK"], numbers["PHSA_NUM_NODES"]
        if rank >= count:
            raise ConfigError(f"PHSA_NODE_RANK={rank}: it is less than PHSA_NUM_NODES={count}; count from 0")
        return cls(rank, count, os.environ["PHSA_MASTER_ADDR"], numbers["PHSA_MASTER_PORT"])


def own_name() -> str:
    """This node as the batch system calls it, or its host name."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


class MissingNodesError(DeviceError):
    """Nodes that did not come, or did not answer.

    Attributes:
        names: those whose name is known.
        reporter: the node rank that writes them down: the lowest that came.
    """

    def __init__(self, text: str, names: list[str], reporter: int) -> None:
        super().__init__(text)
        self.names = names
        self.reporter = reporter


class Nodes:
    """The meeting of all nodes; a context manager that node 0 leaves last, as it serves the store.

    Args:
        place: of this node.
        timeout_s: how long to wait for others, in each of the exchanges.
    """

    def __init__(self, place: Place, timeout_s: float) -> None:
        self.place = place
        self._timeout_s = timeout_s
        self._names = node_names()
        self._store: Any = None
        self._server: Any = None

    def __enter__(self) -> Nodes:
        place = self.place
        if place.node_rank > 0:
            self._wait_for_node_0()
        self._server = TCPStore(
            place.address,
            place.port,
            is_master=place.node_rank == 0,
            wait_for_workers=False,
            timeout=timedelta(seconds=self._timeout_s),
        )
        self._store = PrefixStore("preflight", self._server)
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(dist.DistError, RuntimeError, MissingNodesError):
            self._store.set(f"left/{self.place.node_rank}", "1")
            if self.place.node_rank == 0:
                self._gather("left", _LEAVE_TIMEOUT_S, quiet=True)
        self._store = self._server = None

    @property
    def port(self) -> int:
        """Where the store listens."""
        return int(self._server.port)

    def meet(self) -> list[str]:
        """Sign, wait for all others and return the names of all nodes by node rank.

        Raises:
            MissingNodesError: some did not come; the message names them.
        """
        self._set("here", own_name())
        return [name.decode() for name in self._gather("here", self._timeout_s)]

    def clock_offsets_s(self, now: Callable[[], float] = time.time) -> dict[int, float]:
        """How far every node's clock is ahead of node 0's.

        All nodes read their clocks when node 0 lets them go; of several rounds the median counts.

        Args:
            now: this node's clock.
        """
        rounds = []
        for i in range(_CLOCK_ROUNDS):
            self._set(f"ready/{i}", "1")
            if self.place.node_rank == 0:
                self._gather(f"ready/{i}", self._timeout_s)
                self._store.set(f"go/{i}", "1")
            with self._lost_store():
                self._store.wait([f"go/{i}"], timedelta(seconds=self._timeout_s))
            self._set(f"clock/{i}", repr(now()))
            values = [float(value) for value in self._gather(f"clock/{i}", self._timeout_s)]
            rounds.append([value - values[0] for value in values])
        columns = zip(*rounds, strict=True)
        return {rank: statistics.median(column) for rank, column in enumerate(columns)}

    def exchange(self, key: str, mine: Any) -> dict[int, Any]:
        """Give all nodes a JSON value and return those of all, by node rank.

        Raises:
            MissingNodesError: some did not answer.
        """
        self._set(key, json.dumps(mine))
        return {rank: json.loads(text) for rank, text in enumerate(self._gather(key, self._timeout_s))}

    def _set(self, key: str, value: str) -> None:
        with self._lost_store():
            self._store.set(f"{key}/{self.place.node_rank}", value)

    def _gather(self, key: str, timeout_s: float, *, quiet: bool = False) -> list[bytes]:
        """The values that all nodes set under a key."""
        give_up_at_s = time.monotonic() + timeout_s
        report_at_s = time.monotonic() + _REPORT_EVERY_S
        with self._lost_store():
            while missing := [
                r for r in range(self.place.num_nodes) if not self._store.check([f"{key}/{r}"])
            ]:
                now_s = time.monotonic()
                if now_s >= give_up_at_s:
                    raise self._missing(missing, timeout_s)
                if now_s >= report_at_s and not quiet:
                    self._say(f"waiting for {self._described(missing)}")
                    report_at_s = now_s + _REPORT_EVERY_S
                time.sleep(_LOOK_EVERY_S)
            return [self._store.get(f"{key}/{rank}") for rank in range(self.place.num_nodes)]

    def _missing(self, missing: list[int], timeout_s: float) -> MissingNodesError:
        came = [rank for rank in range(self.place.num_nodes) if rank not in missing]
        return MissingNodesError(
            f"{self._described(missing)} of {self.place.num_nodes} nodes did not answer within "
            f"{timeout_s:.0f} s: look into their logs, or raise health.preflight_timeout_s",
            [self._names[rank] for rank in missing if rank < len(self._names)],
            min(came, default=0),
        )

    def _described(self, ranks: list[int]) -> str:
        return ", ".join(describe_node(rank, self._names) for rank in ranks)

    def _wait_for_node_0(self) -> None:
        """Knock at node 0's store until it listens.

        Raises:
            MissingNodesError: it does not.
        """
        give_up_at_s = time.monotonic() + self._timeout_s
        report_at_s = time.monotonic() + _REPORT_EVERY_S
        address = (self.place.address, self.place.port)
        while True:
            try:
                socket.create_connection(address, timeout=_KNOCK_TIMEOUT_S).close()
                return
            except OSError as error:
                now_s = time.monotonic()
                if now_s >= give_up_at_s:
                    # Nobody knows which other nodes live without node 0: node 1 writes it down.
                    raise MissingNodesError(
                        f"{self._described([0])} does not answer at {address[0]}:{address[1]} within "
                        f"{self._timeout_s:.0f} s ({error}): it has not started its preflight, or the "
                        "port is closed",
                        self._names[:1],
                        1,
                    ) from error
                if now_s >= report_at_s:
                    self._say(f"waiting for {self._described([0])} at {address[0]}:{address[1]} ({error})")
                    report_at_s = now_s + _REPORT_EVERY_S
            time.sleep(_LOOK_EVERY_S)

    @contextlib.contextmanager
    def _lost_store(self) -> Iterator[None]:
        """Turns the end of node 0 into a message that says so."""
        try:
            yield
        except (dist.DistError, RuntimeError) as error:
            raise DeviceError(
                f"{self._described([0])}, which serves the meeting of the nodes, has ended: {error}"
            ) from error

    def _say(self, text: str) -> None:
        print(f"preflight on {own_name()}: {text}", file=sys.stderr, flush=True)
