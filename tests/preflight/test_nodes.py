"""Nodes that meet: threads stand for nodes, each with a store client of its own."""

from __future__ import annotations

import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from phsa_megatron.config.errors import ConfigError, DeviceError
from phsa_megatron.preflight import nodes
from phsa_megatron.preflight.nodes import MissingNodesError, Nodes, Place


@pytest.fixture
def place():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return lambda rank, count: Place(rank, count, "127.0.0.1", port)


def on_nodes(place, ranks, count, work, timeout_s=20.0):
    """The results of `work(nodes)` on the given nodes, an exception as itself."""

    def one(rank):
        try:
            with Nodes(place(rank, count), timeout_s) as meeting:
                return work(meeting)
        except DeviceError as error:
            return error

    with ThreadPoolExecutor(len(ranks)) as pool:
        return list(pool.map(one, ranks))


def test_nodes_exchange_names_clocks_and_reports(place):
    def work(meeting):
        rank = meeting.place.node_rank
        assert len(meeting.meet()) == 3
        offsets_s = meeting.clock_offsets_s(lambda: time.time() + (40.0 if rank == 2 else 0.0))
        return offsets_s, meeting.exchange("report", {"rank": rank})

    found = on_nodes(place, [0, 1, 2], 3, work)
    for offsets_s, reports in found:
        assert offsets_s[0] == 0.0 and abs(offsets_s[1]) < 2.0 and abs(offsets_s[2] - 40.0) < 2.0
        assert reports == {rank: {"rank": rank} for rank in range(3)}
    assert found[0] == found[1] == found[2], "all nodes judge by the same numbers"


def test_a_missing_node_is_named_within_the_timeout(place, monkeypatch):
    monkeypatch.setattr(nodes, "node_names", lambda: ["n1", "n2", "n3"])
    monkeypatch.setattr(nodes, "_LEAVE_TIMEOUT_S", 0.5)
    began_s = time.monotonic()
    found = on_nodes(place, [0, 2], 3, lambda meeting: meeting.meet(), timeout_s=1.0)
    assert time.monotonic() - began_s < 20
    for error in found:
        assert isinstance(error, MissingNodesError)
        assert "node rank 1 (n2) of 3 nodes did not answer within 1 s" in str(error)
        assert (error.names, error.reporter) == (["n2"], 0)


def test_a_missing_node_0_is_named_by_the_others(place, monkeypatch):
    monkeypatch.setattr(nodes, "node_names", lambda: ["n1", "n2"])
    (error,) = on_nodes(place, [1], 2, lambda meeting: meeting.meet(), timeout_s=0.5)
    assert "node rank 0 (n1) does not answer at 127.0.0.1:" in str(error)
    assert (error.names, error.reporter) == (["n1"], 1)


def test_waiting_says_for_whom(place, monkeypatch, capfd):
    monkeypatch.setattr(nodes, "_REPORT_EVERY_S", 0.2)
    monkeypatch.setattr(nodes, "_LEAVE_TIMEOUT_S", 0.1)
    on_nodes(place, [0], 2, lambda meeting: meeting.meet(), timeout_s=0.7)
    assert "waiting for node rank 1" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"PHSA_NODE_RANK": "0"}, "PHSA_NUM_NODES, PHSA_MASTER_ADDR, PHSA_MASTER_PORT is not set"),
        ({"PHSA_NODE_RANK": "x"}, "PHSA_NODE_RANK=x: it is a whole number"),
        ({"PHSA_NODE_RANK": "2"}, "PHSA_NODE_RANK=2: it is less than PHSA_NUM_NODES=2"),
    ],
)
def test_half_an_environment_is_refused(monkeypatch, variables, words):
    whole = {"PHSA_NUM_NODES": "2", "PHSA_MASTER_ADDR": "n1", "PHSA_MASTER_PORT": "7"}
    for name in ("PHSA_NODE_RANK", *whole):
        monkeypatch.delenv(name, raising=False)
    for name, value in (variables | (whole if "is not set" not in words else {})).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=words):
        Place.from_environment()


def test_no_environment_is_one_node(monkeypatch):
    for name in ("PHSA_NODE_RANK", "PHSA_NUM_NODES", "PHSA_MASTER_ADDR", "PHSA_MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert Place.from_environment() == Place(0, 1, "127.0.0.1", 0)
