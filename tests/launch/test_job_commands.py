"""status, logs, stop, requeue and submission, with stand-ins for Slurm's commands that note their calls.

The real Slurm is asked in test_slurm.py.
"""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path

import pytest

from phsa_launch import cli
from phsa_launch.job_script import job_name
from phsa_launch.run_progress import read_heartbeats, read_progress
from phsa_launch.run_status import words_for_seconds
from phsa_megatron.config.run_folder import RunFolder

SUBMIT = ["recipe=phsa_demo_cpu", "cluster=slurm_cpu", "optim.micro_batch_sequences=1"]


class FakeSlurm:
    """Commands on the PATH: what squeue shows is in a file, and every call is noted."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.queue = folder / "queue"
        self.queue.touch()
        self._command("squeue", f"cat {self.queue}")
        self._command(
            "sbatch", f"n=$(($(cat {folder}/n 2>/dev/null || echo 100) + 1)); echo $n | tee {folder}/n"
        )
        self._command("scancel", "")

    def _command(self, name: str, body: str) -> None:
        file = self.folder / name
        file.write_text(f'#!/bin/sh\necho {name} "$@" >>{self.folder}/calls\n{body}\n')
        file.chmod(0o755)

    def calls(self, name: str) -> list[str]:
        text = (self.folder / "calls").read_text() if (self.folder / "calls").exists() else ""
        return [line for line in text.splitlines() if line.split()[0] == name]


@pytest.fixture
def slurm(tmp_path, monkeypatch) -> FakeSlurm:
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("COLUMNS", "250")
    return FakeSlurm(folder)


@pytest.fixture
def run(slurm, tmp_path, capsys) -> RunFolder:
    """A run that was submitted as job 101."""
    assert cli.main([*SUBMIT, f"run.root_dir={tmp_path}", "cluster.environment.SECRET=x"]) == 0
    capsys.readouterr()
    return RunFolder(tmp_path / "phsa_demo_cpu")


def show(slurm: FakeSlurm, *jobs: tuple[str, str, str]) -> None:
    """Jobs as (number, state, nodes)."""
    slurm.queue.write_text("".join(f"{job}|{state}|None|{nodes}|1:00\n" for job, state, nodes in jobs))


def test_submitting_writes_all_that_the_job_needs(run, slurm):
    assert run.config_file.is_file()
    assert "SECRET=x" in run.job_script.read_text()
    assert (run.code_dir / "version").read_text().startswith("phsa-megatron ")
    assert run.job_ids_file.read_text() == "101\n"
    assert slurm.calls("sbatch") == [f"sbatch --parsable {run.job_script}"]


def test_a_chain_is_that_many_jobs(slurm, tmp_path, capsys):
    assert cli.main([*SUBMIT, f"run.root_dir={tmp_path}", "cluster.chain=3"]) == 0
    assert "submitted job 101, then 102, 103 one after another" in capsys.readouterr().out
    script = (tmp_path / "phsa_demo_cpu" / "job.sbatch").read_text()
    assert "#SBATCH --dependency=singleton" in script


def test_a_dry_run_prints_the_script_alone_and_writes_nothing(slurm, tmp_path, capsys):
    assert cli.main([*SUBMIT, f"run.root_dir={tmp_path}", "--dry-run"]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("#!/bin/bash\n")
    assert captured.out.endswith("esac\n")
    assert "tokens per step" in captured.err
    assert not (tmp_path / "phsa_demo_cpu").exists()
    assert slurm.calls("sbatch") == []


def test_without_slurm_the_message_says_where_to_go(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cli.main([*SUBMIT, f"run.root_dir={tmp_path}"]) == 2
    err = capsys.readouterr().err
    assert "is not here" in err
    assert "login node" in err
    assert list(tmp_path.iterdir()) == []


def test_a_second_job_of_a_run_is_refused(run, slurm, tmp_path, capsys):
    show(slurm, ("101", "RUNNING", "n1"))
    assert cli.main([*SUBMIT, f"run.root_dir={tmp_path}"]) == 2
    assert "has job 101 already (RUNNING)" in capsys.readouterr().err
    assert cli.main(["requeue", str(run.path)]) == 2
    assert len(slurm.calls("sbatch")) == 1


def test_requeue_forgets_failures_but_not_bad_nodes(run, slurm, capsys):
    run.gave_up.write_text("giving up\n")
    run.failures_file.write_text("3\n")
    run.bad_nodes.write_text("n7\tECC\nn3\tslow\nn7\tECC\n")
    assert cli.main(["requeue", str(run.path)]) == 0
    assert not run.gave_up.exists() and not run.failures_file.exists()
    assert "--exclude=n3,n7" in slurm.calls("sbatch")[-1]
    assert "without n3, n7" in capsys.readouterr().out
    assert run.job_ids_file.read_text() == "101\n102\n"


def test_stop_asks_the_running_job_and_cancels_those_that_wait(run, slurm, capsys):
    show(slurm, ("101", "RUNNING", "n1"), ("102", "PENDING", ""), ("99", "FAILED", ""))
    assert cli.main(["stop", str(run.path)]) == 0
    assert run.exit_request.exists()
    assert slurm.calls("scancel") == ["scancel 102"]
    assert cli.main(["stop", str(run.path), "--now"]) == 0
    assert slurm.calls("scancel")[1:] == ["scancel 102", "scancel 101"]
    show(slurm)
    assert cli.main(["stop", str(run.path)]) == 0
    assert "no job of" in capsys.readouterr().out


def write_records(run: RunFolder) -> float:
    """Two launches: steps 1 to 6, then from 5 on again to 8, each step 2 s; returns the time of the start."""
    start = time.time() - 100
    lines = [{"event": "start", "time": start}]
    lines += [{"step": s, "time": start + 2 * s, "values": {"perf/step_time_s": 2.0}} for s in range(1, 7)]
    lines += [{"event": "start", "time": start + 60}]
    lines += [
        {"step": s, "time": start + 55 + 2 * s, "values": {"perf/step_time_s": 2.0}} for s in range(5, 9)
    ]
    run.metrics_file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return start


def test_status_tells_state_step_time_left_restarts_and_goodput(run, slurm, capsys):
    start = int(write_records(run))
    attempt = {
        "job_id": 101,
        "attempt": 0,
        "nodes": "n[1-2]",
        "start_unix_s": start,
        "end_unix_s": start + 40,
    }
    attempt |= {
        "start_step": 0,
        "end_step": 4,
        "cause": "crash",
        "exit_code": 1,
        "failures": 0,
        "detail": "n2",
    }
    run.restarts_file.write_text(json.dumps(attempt) + "\n")
    run.attempt_file.write_text(f"101\t1\t{int(time.time()) - 40}\t4\tn[1-2]\t\n")
    step = run.checkpoints_dir / "step_00000004"
    step.mkdir(parents=True)
    (step / "COMMITTED.json").write_text("{}")
    show(slurm, ("101", "RUNNING", "n[1-2]"), ("102", "PENDING", ""))
    assert cli.main(["status", str(run.path)]) == 0
    out = capsys.readouterr().out
    assert "job 101 RUNNING on n[1-2] for 1:00; then 102" in out
    assert "8 of 350; step 4 is committed; last record" in out
    assert "11 min 24 s of training at 2 s a step" in out  # (350 - 8) x 2 s
    assert "1: 1 x crash" in out
    assert "crash, exit code 1, n2" in out
    # 8 steps x 2 s in 40 + 40 s; two steps were thrown away.
    share = re.search(r"([\d.]+)% of 1 min 2\d s at work went into steps that count", out)
    assert share is not None, out
    assert 17 < float(share[1]) <= 20
    assert "2 steps were run twice" in out
    # The same 16 s of the 100 s since the first launch: what perf/goodput_frac would say now.
    of_all = re.search(r"\(([\d.]+)% of 1 min \d+ s since the first launch\)", out)
    assert of_all is not None, out
    assert 14 < float(of_all[1]) <= 16


def test_status_of_a_run_that_gave_up_says_so(run, slurm, capsys):
    run.gave_up.write_text("giving up: 3 failures\n")
    assert cli.main(["status", str(run.path)]) == 0
    assert "giving up: 3 failures" in capsys.readouterr().out


def test_status_names_quiet_and_missing_ranks(run, slurm, capsys):
    run.heartbeats_dir.mkdir()
    beat = {"rank": 1, "host": "n2", "node_rank": 1, "pid": 5, "step": 7, "phase": "data"}
    beat |= {"last_collective": "all_reduce", "time_unix_s": time.time() - 120}
    (run.heartbeats_dir / "rank_1.json").write_text(json.dumps(beat))
    show(slurm, ("101", "RUNNING", "n[1-2]"))
    assert cli.main(["status", str(run.path)]) == 0
    out = capsys.readouterr().out
    assert "0 of 2 gave a sign of life" in out
    assert "quiet: rank 1 on n2 (step 7, data, 2 min" in out
    assert "never seen: 0" in out


def test_progress_counts_a_step_once(run):
    write_records(run)
    progress = read_progress(run)
    assert (progress.logged_step, progress.num_superseded_steps) == (8, 2)
    assert progress.goodput is not None and progress.goodput.new_step_s == 16.0


def test_a_damaged_heartbeat_is_named(tmp_path):
    (tmp_path / "rank_0.json").write_text("{")
    with pytest.raises(Exception, match=r"rank_0\.json is no heartbeat"):
        read_heartbeats(tmp_path)


def test_logs_shows_the_console_or_one_ranks_log(run, capsys):
    (run.path / "slurm-101.log").write_text("".join(f"line {i}\n" for i in range(100)))
    log = run.logs_dir / "node_001" / "rank_00001.log"
    log.parent.mkdir(parents=True)
    log.write_text("rank one\n")
    assert cli.main(["logs", str(run.path), "-n", "2"]) == 0
    assert capsys.readouterr().out == "line 98\nline 99\n"
    assert cli.main(["logs", str(run.path), "--rank", "1"]) == 0
    assert capsys.readouterr().out == "rank one\n"
    assert cli.main(["logs", str(run.path), "--list"]) == 0
    assert str(log) in capsys.readouterr().out
    assert cli.main(["logs", str(run.path), "--rank", "9"]) == 2
    assert "rank 9 has no log" in capsys.readouterr().err


def test_a_folder_that_is_no_run_is_refused(tmp_path, capsys):
    for command in cli.COMMANDS:
        assert cli.main([command, str(tmp_path)]) == 2
        assert "is no run folder" in capsys.readouterr().err


def test_a_local_run_is_asked_by_its_file_and_cannot_be_requeued(run, capsys):
    text = run.config_file.read_text()
    text = text.replace("scheduler: slurm", "scheduler: local")
    run.config_file.write_text(text)
    assert cli.main(["stop", str(run.path)]) == 0
    assert run.exit_request.exists()
    assert cli.main(["requeue", str(run.path)]) == 2
    assert "is no Slurm job" in capsys.readouterr().err
    assert cli.main(["status", str(run.path)]) == 0
    assert "started on one host" in capsys.readouterr().out


def test_the_help_names_every_command(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    out = capsys.readouterr().out
    assert all(f"phsa-launch {command} RUN" in out for command in cli.COMMANDS)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.4, "0 s"), (59, "59 s"), (61, "1 min 1 s"), (3600, "1 h"), (7265, "2 h 1 min"), (100000, "1 d 3 h")],
)
def test_durations_are_words(seconds, words):
    assert words_for_seconds(seconds) == words


def test_names_of_jobs_are_asked_for(run, slurm):
    show(slurm)
    cli.main(["status", str(run.path)])
    assert f"--name={job_name(run)}" in slurm.calls("squeue")[-1]
