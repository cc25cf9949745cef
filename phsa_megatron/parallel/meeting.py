"""The start of several processes: all sign one store, and who does not come is named meanwhile."""

from __future__ import annotations

import itertools
import os
import socket
import sys
import time
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from phsa_megatron.config.errors import DeviceError
from phsa_megatron.parallel.node_names import describe_node, node_names

REPORT_EVERY_S = 20.0
"""Who is missing is said this often: well within the minute in which a person looks."""
_MAX_NAMED = 16
_KNOCK_TIMEOUT_S = 5.0
_KNOCK_EVERY_S = 0.2

_starts = itertools.count()


def meet(rank: int, world_size: int, processes_per_node: int, timeout_s: float) -> Store:
    """Return the store that all processes share, once every one of them has signed it.

    Args:
        rank: number of this process.
        world_size: how many sign.
        processes_per_node: says on which node a missing process should be.
        timeout_s: how long to wait for the last one.

    Raises:
        DeviceError: a process did not appear in time; the message names it.
    """
    give_up_at_s = time.monotonic() + timeout_s
    server = _connect(rank, world_size, give_up_at_s, timeout_s)
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    # A prefix of its own for every start: what an earlier one left in the store would be taken for news.
    store = PrefixStore(f"phsa/attempt_{attempt}/start_{next(_starts)}", server)
    signatures = [f"here/{other}" for other in range(world_size)]
    store.set(signatures[rank], socket.gethostname())
    began_s = time.monotonic()
    while True:
        left_s = give_up_at_s - time.monotonic()
        try:
            store.wait(signatures, timedelta(seconds=max(0.1, min(REPORT_EVERY_S, left_s))))
            return store
        except (dist.DistError, RuntimeError) as error:
            missing = _missing(store, signatures, error, rank)
            if not missing:
                return store
            if time.monotonic() >= give_up_at_s:
                raise DeviceError(
                    f"processes {_shortened(missing)} of {world_size} did not start within {timeout_s:.0f} s "
                    f"({_places(missing, processes_per_node)}): look into their logs "
                    f"(WORLD_SIZE={world_size}, MASTER_ADDR={os.environ['MASTER_ADDR']}, "
                    f"MASTER_PORT={os.environ['MASTER_PORT']}), or raise health.start_timeout_s"
                ) from error
            if rank == min(set(range(world_size)) - set(missing)):
                waited_s = time.monotonic() - began_s
                _say(
                    f"waiting for processes {_shortened(missing)} of {world_size}, not started after "
                    f"{waited_s:.0f} s: {_places(missing, processes_per_node)}"
                )


def _connect(rank: int, world_size: int, give_up_at_s: float, timeout_s: float) -> TCPStore:
    """Serve the store (process 0, unless torchrun does) or reach it."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    # torchrun's agent already serves a store at this address.
    is_master = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    where = f"process {rank} of {world_size} could not reach process 0 at {address}:{port}"
    if not is_master:
        _wait_for_listener(address, port, where, give_up_at_s, timeout_s)
    try:
        return TCPStore(
            address,
            port,
            world_size=world_size,
            is_master=is_master,
            timeout=timedelta(seconds=timeout_s),
            wait_for_workers=False,
        )
    except (dist.DistError, RuntimeError, ValueError) as error:
        raise DeviceError(f"{where} (MASTER_ADDR, MASTER_PORT): {error}") from error


def _wait_for_listener(address: str, port: int, where: str, give_up_at_s: float, timeout_s: float) -> None:
    """Knock until somebody listens; torch's own retries say nothing for long, and then print a C++ trace."""
    report_at_s = time.monotonic() + REPORT_EVERY_S
    while True:
        try:
            socket.create_connection((address, port), timeout=_KNOCK_TIMEOUT_S).close()
            return
        except OSError as error:
            now_s = time.monotonic()
            if now_s >= give_up_at_s:
                raise DeviceError(
                    f"{where} (MASTER_ADDR, MASTER_PORT) within {timeout_s:.0f} s: {error}. It has not "
                    "started, or the address or port is wrong or closed; look into its log, or raise "
                    "health.start_timeout_s"
                ) from error
            if now_s >= report_at_s:
                _say(f"{where} yet ({error}): it has not started, or the address or port is closed")
                report_at_s = now_s + REPORT_EVERY_S
        time.sleep(_KNOCK_EVERY_S)


def _missing(store: Store, signatures: list[str], cause: Exception, rank: int) -> list[int]:
    """The processes that have not signed."""
    try:
        return [other for other, signature in enumerate(signatures) if not store.check([signature])]
    except (dist.DistError, RuntimeError):
        raise DeviceError(
            f"process {rank} lost the store at MASTER_ADDR={os.environ['MASTER_ADDR']} while it waited for "
            f"others to start: process 0, or the launcher that served it, has ended ({cause})"
        ) from cause


def _shortened(ranks: list[int]) -> str:
    more = f" and {len(ranks) - _MAX_NAMED} more" if len(ranks) > _MAX_NAMED else ""
    return f"{ranks[:_MAX_NAMED]}{more}"


def _places(ranks: list[int], processes_per_node: int) -> str:
    """Where processes should be, a node at a time."""
    names, by_node = node_names(), dict[int, list[int]]()
    for rank in ranks:
        by_node.setdefault(rank // processes_per_node, []).append(rank % processes_per_node)
    places = [
        describe_node(node, names)
        + (
            ", all of it"
            if len(local) == processes_per_node > 1
            else f", local rank {_shortened(local)[1:-1]}"
        )
        for node, local in by_node.items()
    ]
    return "; ".join(places[:_MAX_NAMED])


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
