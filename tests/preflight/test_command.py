"""The preflight as a command: one node in this process, two as processes of their own."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from phsa_megatron import cli
from phsa_megatron.config import compose
from phsa_megatron.config.run_folder import RunFolder
from phsa_megatron.preflight import checks
from phsa_megatron.preflight.all_reduce import run_workers
from phsa_megatron.preflight.command import main
from phsa_megatron.preflight.nodes import Nodes, Place

ROOT = Path(__file__).resolve().parents[2]
VARIABLES = ("PHSA_NODE_RANK", "PHSA_NUM_NODES", "PHSA_MASTER_ADDR", "PHSA_MASTER_PORT", "SLURMD_NODENAME")


@pytest.fixture(autouse=True)
def one_node(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def words(tmp_path):
    return ["recipe=phsa_demo_cpu", f"run.root_dir={tmp_path}", "health.min_write_mib_per_s=0.1"]


def test_a_good_node_exits_0_and_leaves_its_page(words, tmp_path, capsys):
    assert cli.main(["preflight", *words]) == 0
    folder = RunFolder(tmp_path / "phsa_demo_cpu")
    page = json.loads((folder.preflight_dir / f"{socket.gethostname()}.json").read_text())
    assert page["exit_code"] == 0 and page["facts"]["torch"]
    found = {check["name"]: check["status"] for check in page["checks"]}
    assert found["host memory"] == found["disk space"] == found["write speed"] == "ok"
    assert found["GPU count"] == found["clock"] == "not applicable"
    assert not folder.bad_nodes.exists() and not list(folder.path.glob(".preflight*"))
    out = capsys.readouterr().out
    assert "host memory" in out and "is good" in out


@pytest.mark.parametrize(
    ("setting", "name"),
    [
        ("health.min_free_memory_gib=1e6", "host memory"),
        ("health.min_free_disk_gib=1e6", "disk space"),
        ("health.min_write_mib_per_s=1e6", "write speed"),
    ],
)
def test_a_bad_node_exits_3_and_is_written_down_once(words, tmp_path, capsys, setting, name):
    key = setting.partition("=")[0]
    for _ in range(2):
        assert main([*(word for word in words if not word.startswith(key)), setting]) == 3
    (line,) = (tmp_path / "phsa_demo_cpu" / "bad_nodes").read_text().splitlines()
    host, reason = line.split("\t")
    assert host == socket.gethostname() and name in reason and key in reason
    assert "is BAD" in capsys.readouterr().out


def test_a_run_folder_that_cannot_be_written_is_bad(tmp_path, monkeypatch):
    def refuse(path):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(checks, "_write_speed", refuse)
    (found,) = checks.disk(tmp_path, "n1", compose.compose(["recipe=phsa_demo_cpu"]).config.health)
    assert found.status is checks.Status.bad and "No space left" in found.found


def test_a_container_with_little_memory_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(checks, "_CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text(f"{3 << 30}\n")
    (tmp_path / "memory.current").write_text(f"{(3 << 30) - (1 << 28)}\n")
    health = compose.compose(["recipe=phsa_demo_cpu"]).config.health
    assert checks.memory(health).status is checks.Status.bad
    (tmp_path / "memory.max").write_text("max\n")
    assert checks.memory(health).status is checks.Status.ok


def test_a_file_that_is_not_there_is_4(tmp_path, capsys):
    assert main([str(tmp_path / "config.yaml")]) == 4
    assert "config.yaml" in capsys.readouterr().err


def test_gpus_without_nvml_are_4_with_what_to_install(words, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert main([*words, "cluster.device=cuda"]) == 4
    assert "nvidia-ml-py" in capsys.readouterr().out


# A node whose clock is ahead and whose libraries are others: patched before the command runs.
ODD_NODE = """
import sys, time
from phsa_megatron.preflight import command, facts, nodes
rank, fault = int(sys.argv[2]), sys.argv[3]
if rank == 1 and fault == "clock":
    real = nodes.Nodes.clock_offsets_s
    nodes.Nodes.clock_offsets_s = lambda self: real(self, lambda: time.time() + 60.0)
if rank == 1 and fault == "version":
    collect = facts.collect
    facts.collect = lambda: collect() | {"torch": "0.0.1"}
sys.exit(command.main([sys.argv[1]]))
"""


def two_nodes(words, tmp_path, fault, ranks=(0, 1)):
    """Exit codes, what was printed, and the pages of two nodes."""
    config = compose.compose([*words, "cluster.num_nodes=2", "optim.micro_batch_sequences=1",
                              "health.preflight_timeout_s=60"]).config  # fmt: skip
    folder = RunFolder.of(config)
    folder.path.mkdir(parents=True, exist_ok=True)
    folder.config_file.write_text(compose.dump(config))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    path = os.pathsep.join(str(ROOT / part) for part in (".", "kernels", "launch"))
    shared = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PHSA_NUM_NODES": "2"}
    shared |= {"PHSA_MASTER_ADDR": "127.0.0.1", "PHSA_MASTER_PORT": str(port)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", ODD_NODE, str(folder.config_file), str(rank), fault],
            env=shared | {"PHSA_NODE_RANK": str(rank), "SLURMD_NODENAME": f"n{rank + 1}"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in ranks
    ]
    printed = [process.communicate(timeout=120)[0] for process in processes]
    pages = [json.loads((folder.preflight_dir / f"n{rank + 1}.json").read_text()) for rank in ranks]
    found = [{check["name"]: check for check in page["checks"]} for page in pages]
    return [process.returncode for process in processes], printed, found, folder


def test_two_good_nodes_compare_clocks_and_versions_and_time_an_all_reduce(words, tmp_path):
    codes, printed, found, folder = two_nodes(words, tmp_path, "none")
    assert codes == [0, 0], printed
    for checked in found:
        assert checked["clock"]["status"] == checked["versions"]["status"] == "ok"
        assert checked["all-reduce over all"]["status"] == "ok"
        assert " ms for 2 processes" in checked["all-reduce over all"]["found"]
    assert not folder.bad_nodes.exists()
    assert "host memory" in printed[0] and "host memory" not in printed[1], "one table is enough"


@pytest.mark.parametrize(("fault", "name"), [("clock", "clock"), ("version", "versions")])
def test_the_odd_node_of_two_is_bad_and_the_other_is_good(words, tmp_path, fault, name):
    codes, printed, found, folder = two_nodes(words, tmp_path, fault)
    assert codes == [0, 3], printed
    assert found[1][name]["status"] == "bad" and found[0][name]["status"] == "ok"
    assert folder.bad_nodes.read_text().startswith(f"n2\t{name}: ")
    assert "n2 did not pass" in found[0]["all-reduce over all"]["found"]


@pytest.mark.slow
def test_workers_of_a_node_try_both_groups_and_a_dead_one_is_named(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(str(ROOT / part) for part in (".", "kernels", "launch")))
    with Nodes(Place(0, 1, "127.0.0.1", 0), 60.0) as nodes:
        answers, failure = run_workers(nodes, 2, "cpu", 60.0)
        assert not failure and all(
            {"in_node_s", "over_all_s"} == answer.keys() for answer in answers.values()
        )
    with Nodes(Place(0, 1, "127.0.0.1", 0), 5.0) as nodes:
        answers, failure = run_workers(nodes, 1, "nonsense", 5.0)
        assert "local rank 0 ended with code 1" in failure and answers == {0: {}}
