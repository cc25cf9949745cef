import pytest

from phsa_megatron.preflight import compare, facts
from phsa_megatron.preflight.checks import Status


def versions(*torch_versions):
    everyone = {rank: {"torch": version, "python": "3.11"} for rank, version in enumerate(torch_versions)}
    return [compare.versions(everyone, rank) for rank in everyone]


def test_equal_versions_pass():
    assert [check.status for check in versions("2.9", "2.9", "2.9")] == [Status.ok] * 3


def test_the_node_that_differs_from_most_is_bad_wherever_it_stands():
    found = versions("2.8", "2.9", "2.9")
    assert [check.status for check in found] == [Status.bad, Status.ok, Status.ok]
    assert found[0].reason() == "versions: torch 2.8, 2 of 3 nodes have 2.9; all nodes have the same"


def test_of_two_nodes_that_differ_node_0_counts():
    assert [check.status for check in versions("2.8", "2.9")] == [Status.ok, Status.bad]


def test_a_library_that_only_one_node_has_is_a_difference():
    everyone = {0: {"triton": "3.2"}, 1: {"triton": "3.2"}, 2: {}}
    assert compare.versions(everyone, 2).status is Status.bad


def test_one_node_has_nothing_to_compare():
    assert versions("2.9")[0].status is Status.not_applicable
    assert compare.clocks({0: 0.0}, 0, 1.0).status is Status.not_applicable


@pytest.mark.parametrize(
    ("offsets_s", "bad"),
    [
        ({0: 0.0, 1: 0.4, 2: -0.4}, []),
        ({0: 0.0, 1: 30.0, 2: 0.1}, [1]),
        ({0: 0.0, 1: -30.0, 2: -30.1}, [0]),
        ({0: 0.0, 1: 5.0}, [1]),
    ],
)
def test_the_clock_that_is_off_is_named(offsets_s, bad):
    found = [rank for rank in offsets_s if compare.clocks(offsets_s, rank, 2.0).status is Status.bad]
    assert found == bad


def test_facts_tell_code_apart_that_no_commit_does(tmp_path, monkeypatch):
    (tmp_path / "a.py").write_text("x = 1\n")
    monkeypatch.setattr(facts, "_root", lambda: tmp_path)
    before = facts.collect()
    assert {"python", "torch", "megatron-core", "triton", "driver", "phsa-megatron"} <= before.keys()
    assert "commit none" in before["phsa-megatron"]
    (tmp_path / "a.py").write_text("x = 2\n")
    after = facts.collect()
    assert before["phsa-megatron"] != after["phsa-megatron"] and before["torch"] == after["torch"]
