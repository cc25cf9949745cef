"""Runs survive what happens to them on a real Slurm of four nodes, and end where the uninterrupted run ends.

After each disaster the loss curve equals the uninterrupted run's to the last bit, and no step is missing or
there twice. Ranks are held still while a disaster is arranged, so that nothing depends on the speed.
"""

from __future__ import annotations

import os
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch.slurm_cluster import SlurmCluster, wait_until, why_not
from tests.launch.slurm_runs import SAVE_EVERY, SETTINGS, STEPS, SlurmRun, Workplace

pytestmark = [pytest.mark.slow, pytest.mark.slurm]
# Half a minute to two minutes each: `make slurm` runs them all, CI the others.
NIGHT = pytest.mark.night


@pytest.fixture(scope="module")
def place() -> Iterator[Workplace]:
    reason = why_not()
    if reason is not None:
        # .ci/slurm_leg has installed Slurm: there, a cluster that cannot start is a failure.
        assert "PHSA_REQUIRE_SLURM" not in os.environ, reason
        pytest.skip(reason)
    with tempfile.TemporaryDirectory(prefix="slurm-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "cluster").mkdir()
        (folder / "work").mkdir()
        with SlurmCluster(folder / "cluster") as cluster:
            yield Workplace(cluster, folder / "work")


@pytest.fixture(scope="module")
def straight(place: Workplace) -> SlurmRun:
    """Two nodes, nothing happens."""
    run = place.submit("straight")
    assert run.wait()["JobState"] == "COMPLETED", run.console
    return run


@pytest.fixture(scope="module")
def straight_on_four(place: Workplace) -> SlurmRun:
    run = place.submit("straight_on_four", "cluster.num_nodes=4")
    assert run.wait()["JobState"] == "COMPLETED", run.console
    return run


def assert_recovered(run: SlurmRun, straight: SlurmRun, causes: list[str]) -> None:
    assert run.causes == causes, run.console
    assert run.folder.done.exists(), run.console
    assert run.curve() == straight.curve()


def test_two_nodes(place, straight):
    assert straight.causes == ["done"]
    assert straight.records().num_superseded_steps == 0
    assert len(straight.curve()["train/loss_nats"]) == STEPS
    assert "0: done: 30 steps" in straight.console
    assert "step 1/" not in (straight.folder.logs_dir / "node_001" / "rank_00001.log").read_text()
    assert (straight.folder.code_dir / "version").exists()
    status = place.launch("status", "runs/straight")
    assert "│ done" in status
    assert f"{STEPS} of {STEPS}; step {STEPS} is committed" in status
    assert "went into steps that count" in status
    assert "n[1-2]" in status
    assert "done: 30 steps" in place.launch("logs", "runs/straight")
    assert "== job" in place.launch("logs", "runs/straight", "--rank", "1")
    assert "is finished: step 30" in place.launch(*SETTINGS, "run.name=straight")


@NIGHT
def test_four_nodes_have_ranks_in_slurms_order(straight_on_four, straight):
    for rank in range(4):
        log = straight_on_four.folder.logs_dir / f"node_{rank:03d}" / f"rank_{rank:05d}.log"
        assert f"on n{rank + 1} at" in log.read_text()
    # The same first batch, summed in another order; training then makes much of the last bits.
    ours, theirs = (run.curve()["train/loss_nats"][0] for run in (straight_on_four, straight))
    assert ours == pytest.approx(theirs, rel=1e-5)


@NIGHT
def test_time_limit(place, straight):
    run = place.submit("time_limit", "cluster.time_limit=00:10:00", "cluster.stop_lead_s=60")
    (job_id,) = run.job_ids
    with run.held_after(SAVE_EVERY):
        # Not ten minutes from the start, but one to two from now.
        hours, minutes, _ = place.cluster.job(job_id)["RunTime"].split(":")
        limit = 60 * int(hours) + int(minutes) + 2
        place.cluster.run("scontrol", "update", f"JobId={job_id}", f"TimeLimit={limit}")
        run.wait_for_console("the time limit is near")
        place.cluster.run("scontrol", "update", f"JobId={job_id}", "TimeLimit=10")
    job = run.wait()
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), run.console
    assert_recovered(run, straight, ["time_limit", "done"])
    assert run.records().num_superseded_steps == 0


@NIGHT
def test_preemption_does_not_end_as_failed_and_may_save_for_longer_than_torchrun_waits(
    place, straight_on_four
):
    run = place.submit("preempted", "cluster.num_nodes=4", "cluster.partition=low")
    with run.held_after(SAVE_EVERY):
        place.cluster.run(
            "sbatch", "-p", "high", "-N4", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 1"
        )
        wait_until(run.folder.exit_request.exists, 60, "nobody asked the run to leave")
        time.sleep(33)  # torchrun kills what is left of its workers after 30 s
        assert len(run.rank_processes()) == 4
    job = run.wait()
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), run.console
    assert_recovered(run, straight_on_four, ["preempted", "done"])
    assert run.attempts[0]["end_step"] >= SAVE_EVERY
    assert run.records().num_superseded_steps == 0


@NIGHT
@pytest.mark.parametrize(("node", "cause"), [("n2", ("crash", "node_failure")), ("n1", ("lost",))])
def test_a_node_that_dies_with_all_its_processes(place, straight, node, cause):
    """n1 holds the batch script too: then nobody is left to note anything, and Slurm requeues by itself."""
    run = place.submit(f"without_{node}")
    with run.held_after(SAVE_EVERY):
        assert place.cluster.kill_node(node) > 3
    job = run.wait()
    place.cluster.start_node(node)
    place.cluster.wait_until_idle()
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), run.console
    assert node not in run.attempts[-1]["nodes"].replace("[", "").replace("]", "").split(",")
    assert run.causes[0] in cause
    assert_recovered(run, straight, [run.causes[0], "done"])


def test_a_crashed_process(place, straight):
    run = place.submit("crashed")
    with run.held_after(SAVE_EVERY):
        os.kill(run.rank_processes()[1], signal.SIGKILL)
    assert run.wait()["JobState"] == "COMPLETED", run.console
    assert_recovered(run, straight, ["crash", "done"])
    assert run.attempts[0]["exit_code"] != 0
    assert "back into the queue" in run.console


def test_a_hopeless_failure_gives_up_with_the_exit_code(place):
    run = place.submit(
        # One node fails, and srun ends the other one's task, whose code is higher.
        "hopeless",
        "cluster.setup_lines=['[ \"$SLURM_NODEID\" = 1 ] && sleep 20; exit 7']",
        "cluster.max_failures_without_progress=2",
    )
    job = run.wait()
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("FAILED", "7:0", "1"), run.console
    assert run.causes == ["crash", "crash"]
    assert [attempt["failures"] for attempt in run.attempts] == [1, 2]
    assert "giving up: 2 failures in a row" in run.folder.gave_up.read_text()
    assert "giving up: 2 failures in a row" in place.launch("status", "runs/hopeless")
    assert "2 x crash" in place.launch("status", "runs/hopeless")


@NIGHT
def test_a_chain_goes_on_where_requeueing_is_forbidden(place, straight):
    run = place.submit("chain", "cluster.chain=3", "cluster.requeue=false")
    first, second, third = run.job_ids
    assert place.cluster.job(third)["JobState"] == "PENDING"
    with run.held_after(SAVE_EVERY):
        os.kill(run.rank_processes()[0], signal.SIGKILL)
    job = place.cluster.wait_for_job(first)
    assert (job["JobState"], job["Restarts"]) == ("FAILED", "0"), run.console
    assert place.cluster.wait_for_job(second)["JobState"] == "COMPLETED", run.console
    assert place.cluster.wait_for_job(third)["JobState"] in ("CANCELLED", "COMPLETED")
    assert_recovered(run, straight, ["crash", "done"])


@NIGHT
def test_stop_requeue_and_scancel(place, straight):
    run = place.submit("stopped")
    refused = place.launch(*SETTINGS, "run.name=stopped", succeeds=False)
    assert f"has job {run.job_ids[0]} already" in refused
    with run.held_after(SAVE_EVERY):
        assert "asked job" in place.launch("stop", "runs/stopped")
        assert "RUNNING on n[1-2]" in place.launch("status", "runs/stopped")
    job = run.wait()
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "0"), run.console
    assert run.causes == ["stopped"]
    assert run.records().num_superseded_steps == 0

    assert "submitted job" in place.launch("requeue", "runs/stopped")
    with run.held_after(2 * SAVE_EVERY):
        place.cluster.run("scancel", run.job_ids[1])
        wait_until(lambda: place.cluster.job(run.job_ids[1])["JobState"] == "CANCELLED", 30, "not cancelled")
    wait_until(lambda: len(run.attempts) == 2 or not run.rank_processes(), 60, "it goes on")
    job = run.wait()
    assert (job["JobState"], job["Restarts"]) == ("CANCELLED", "0")

    place.cluster.wait_until_idle()
    place.launch("requeue", "runs/stopped")
    assert run.wait()["JobState"] == "COMPLETED", run.console
    assert run.causes[1] in ("cancelled", "lost")
    assert_recovered(run, straight, ["stopped", run.causes[1], "done"])


@NIGHT
def test_a_node_that_the_preflight_finds_bad_is_left_out(place, straight, tmp_path):
    """Stands in for the check itself: n1 is bad, the others are good."""
    python = tmp_path / "python"
    python.write_text(
        "#!/bin/bash\n"
        'if [ "$2" != phsa_megatron.preflight ]; then exec "$REAL_PYTHON" "$@"; fi\n'
        'echo "checked node $PHSA_NODE_RANK of $PHSA_NUM_NODES: $PHSA_MASTER_ADDR:$PHSA_MASTER_PORT"\n'
        '[ "$(hostname)" = n1 ] || exit 0\n'
        'printf "n1\\tlost a GPU\\n" >>"${3%/*}/bad_nodes"\nexit 3\n'
    )
    python.chmod(0o755)
    place.environment["REAL_PYTHON"] = os.sys.executable
    tmp_path.chmod(0o755)
    run = place.submit("bad_node", "cluster.preflight=true", f"cluster.python={python}")
    job = run.wait()
    assert (job["JobState"], job["Restarts"], job["ExcNodeList"]) == ("COMPLETED", "1", "n1"), run.console
    assert_recovered(run, straight, ["bad_node", "done"])
    assert run.attempts[1]["nodes"] == "n[2-3]"
    assert run.attempts[0]["failures"] == 0
    assert "checked node 1 of 2: n2:2" in run.console


def test_what_slurm_cannot_do_is_refused_in_its_words(place):
    base = [*SETTINGS, "run.name=refused"]
    for setting, words in (
        ("cluster.partition=nosuch", "invalid partition"),
        ("cluster.sbatch.nodelist=n9", "Invalid node name"),
        ("cluster.sbatch.container-nosuch=1", "unrecognized option"),
    ):
        for flag in ([], ["--test-only"]):
            assert words in place.launch(*base, setting, *flag, succeeds=False)
    said = place.launch(*base, "cluster.num_nodes=5", "optim.global_batch_sequences=20", succeeds=False)
    assert "Node count specification" in said or "node configuration is not available" in said
    assert not (place.folder / "runs" / "refused" / "job_ids").exists()


def test_the_h100_example_is_accepted_by_slurm(place):
    settings = [*SETTINGS, "run.name=h100", "cluster=slurm_h100", "optim.global_batch_sequences=16"]
    chosen = {text.split("=", 1)[0]: text for text in settings}
    assert "to start at" in place.launch(*chosen.values(), "--test-only")
    assert not (place.folder / "runs" / "h100").exists()
    too_many = place.launch(*chosen.values(), "cluster.gpus_per_node=9", "--test-only", succeeds=False)
    assert "node configuration is not available" in too_many


@NIGHT
def test_a_sweep_is_one_job_and_folder_each(place):
    short = ("run.name=sweep", "run.train_steps=4", "optim.warmup_steps=1", "optim.decay_steps=0")
    chosen = {text.split("=", 1)[0]: text for text in (*SETTINGS, *short, "cluster.num_nodes=1")}
    table = place.launch(*chosen.values(), "--multirun", "optim.lr=1e-3,2e-3")
    runs = [place.run(f"sweep-lr_{value}") for value in ("0.001", "0.002")]
    for run, lr in zip(runs, (1e-3, 2e-3), strict=True):
        assert run.wait()["JobState"] == "COMPLETED", run.console
        assert run.records().series("optim/lr")[1][-1] == pytest.approx(lr)
        assert run.job_ids[0] in table
    assert runs[0].job_ids != runs[1].job_ids
