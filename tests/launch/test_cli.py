import socket
import sys
from pathlib import Path

import pytest

from phsa_launch import cli, local
from phsa_megatron.config.compose import compose, load

TWO = ["cluster.processes_per_node=2"]
# Numbers that the tests below name, whatever the demo is tuned to.
DEMO = [
    "recipe=phsa_demo_cpu",
    "run.train_steps=400",
    "data.seq_len_tokens=512",
    "optim.global_batch_sequences=8",
    "optim.micro_batch_sequences=4",
    "optim.warmup_steps=40",
    "optim.decay_steps=100",
]


class Replaced(Exception):
    """Stands for the process that torchrun has taken over."""


@pytest.fixture
def execs(monkeypatch):
    calls = []

    def execvpe(file, command, environment):
        calls.append((file, command, environment))
        raise Replaced

    monkeypatch.setattr(local.os, "execvpe", execvpe)
    return calls


def demo_in(folder: Path) -> list[str]:
    return [*DEMO, f"run.root_dir={folder}"]


def test_it_composes_once_and_starts_all_processes_with_the_resolved_file(execs, tmp_path, capsys):
    with pytest.raises(Replaced):
        cli.main([*demo_in(tmp_path), *TWO, "run.num_threads=3"])
    ((file, command, environment),) = execs
    path = tmp_path / "phsa_demo_cpu" / "config.yaml"
    assert file == command[0] == sys.executable
    assert command[1:5] == ["-m", "torch.distributed.run", "--nnodes=1", "--nproc-per-node=2"]
    assert command[-3:] == ["-m", "phsa_megatron.train", str(path)]
    assert "--master-addr=127.0.0.1" in command
    assert load(path) == compose([*demo_in(tmp_path), *TWO, "run.num_threads=3"]).config
    assert environment["CUDA_VISIBLE_DEVICES"] == ""
    assert environment["OMP_NUM_THREADS"] == "3"
    assert "starting from scratch" in capsys.readouterr().out


def test_a_dry_run_prints_command_and_file_and_writes_nothing(execs, tmp_path, capsys):
    assert cli.main([*demo_in(tmp_path), *TWO, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert f"{tmp_path}/phsa_demo_cpu/config.yaml" in out
    assert "-m torch.distributed.run" in out
    assert "CUDA_VISIBLE_DEVICES=''" in out
    assert "tokens per step = 8 sequences x 512 tokens = 4,096" in out
    assert execs == []
    assert list(tmp_path.iterdir()) == []


def test_several_hosts_are_refused(execs, tmp_path, capsys):
    assert cli.main([*demo_in(tmp_path), "cluster.num_nodes=2"]) == 2
    err = capsys.readouterr().err
    assert "cluster.num_nodes=2" in err
    assert "choose a Slurm cluster" in err
    assert list(tmp_path.iterdir()) == []


def test_broken_rules_stop_before_anything_is_written(execs, tmp_path, capsys):
    assert cli.main([*demo_in(tmp_path), "attention.train_topk=0"]) == 2
    assert capsys.readouterr().err.startswith("phsa-launch: attention.train_topk=0")
    assert list(tmp_path.iterdir()) == []


def test_a_machine_without_torch_may_check_but_not_start(execs, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(local.importlib.util, "find_spec", lambda name: None)
    assert cli.main([*demo_in(tmp_path), "--dry-run"]) == 0
    assert cli.main(demo_in(tmp_path)) == 2
    assert "torch is not installed" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_finished_run_is_not_started(execs, tmp_path, capsys):
    with pytest.raises(Replaced):
        cli.main(demo_in(tmp_path))
    folder = tmp_path / "phsa_demo_cpu"
    (folder / "checkpoints" / "step_00000400").mkdir(parents=True)
    (folder / "checkpoints" / "step_00000400" / "COMMITTED.json").write_text("{}")
    (folder / "done").touch()
    assert cli.main(demo_in(tmp_path)) == 0
    assert "is finished" in capsys.readouterr().out
    assert len(execs) == 1


def test_the_port_is_free():
    port = local.free_port()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", port))


def test_a_gpu_run_keeps_its_gpus(execs, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")
    with pytest.raises(Replaced):
        cli.main([*demo_in(tmp_path), "cluster=local_gpu", "run.num_threads=0"])
    assert execs[0][2]["CUDA_VISIBLE_DEVICES"] == "5"
