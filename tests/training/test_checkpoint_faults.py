"""Damage, full disks, refused writes and kill -9: what a checkpoint survives, and what it says."""

import errno
import os
import shutil
from pathlib import Path

import pytest

from phsa_megatron.config.errors import CheckpointError
from phsa_megatron.parallel import mcore_checkpointing
from phsa_megatron.training import checkpoint
from tests.training.checkpoint_runs import (
    SCRIPT_PROLOGUE,
    Run,
    fingerprint,
    run_script,
    tiny_config,
)


def truncate_largest(folder: Path) -> None:
    largest = max(folder.glob("shards/*.distcp"), key=lambda path: path.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)


def remove_marker(folder: Path) -> None:
    (folder / "COMMITTED.json").unlink()


def break_state(folder: Path) -> None:
    (folder / "train_state.json").write_text("{")


@pytest.mark.parametrize("damage", [truncate_largest, remove_marker, break_state])
def test_a_damaged_checkpoint_is_skipped_and_refused_when_it_is_the_only_one(tmp_path, damage):
    config = tiny_config(tmp_path)
    with Run(config) as run:
        for _ in range(2):
            run.train(1)
            run.save()
        damage(run.folder.checkpoints_dir / "step_00000002")
        assert run.load().step == 1
        assert "step_00000002" in run.events.text("checkpoint_skipped")
        run.train(1)
        run.save()  # the damaged one is moved aside
        assert run.load().step == 2
        shutil.rmtree(run.folder.checkpoints_dir / "step_00000001")
        damage(run.folder.checkpoints_dir / "step_00000002")
        with pytest.raises(CheckpointError, match="Starting again from step 0"):
            run.load()


def test_too_little_space_is_seen_before_anything_is_written(tmp_path, monkeypatch):
    with Run(tiny_config(tmp_path)) as run:
        run.train(1)
        run.save()
        run.train(1)
        before = fingerprint(run.parts)
        monkeypatch.setattr(checkpoint, "_free_bytes", lambda folder: 1000)
        assert not run.save()
        text = run.events.text("checkpoint_failed")
        assert "step_00000002.partial" in text and "1000 are free" in text
        assert "the checkpoint of step 1 is intact" in text
        assert fingerprint(run.parts) == before
        run.train(1)
        with pytest.raises(CheckpointError, match="2 save.s. failed in a row"):
            run.save()
        monkeypatch.undo()
        assert run.save(), "the third save finds room and the run could have gone on"
        assert run.folder.committed_steps() == [1, 3]


def test_a_run_that_is_asked_to_leave_before_its_first_step_can_save(tmp_path):
    config = tiny_config(tmp_path)
    with Run(config) as run:
        run.save(must_succeed=True)
        expected = run.train(2), fingerprint(run.parts)
    with Run(config) as run:
        assert run.load().step == 0
        assert (run.train(2), fingerprint(run.parts)) == expected


def test_a_last_save_that_fails_is_an_error_at_once(tmp_path, monkeypatch):
    with Run(tiny_config(tmp_path)) as run:
        monkeypatch.setattr(checkpoint, "_free_bytes", lambda folder: 0)
        with pytest.raises(CheckpointError, match="there is no earlier one"):
            run.save(must_succeed=True)


# The kernel refuses to let any file grow past a limit, as it refuses on a full disk.
FULL_DISK = (
    SCRIPT_PROLOGUE
    + """
    import resource
    unlimited = resource.RLIM_INFINITY

    def fill_the_disk(name, in_background, limit):
        checkpoint = {{"async_save": in_background}}
        with t.Run(t.tiny_config(Path({root!r}), run={{"name": name}}, checkpoint=checkpoint)) as run:
            run.train(1)
            run.save(must_succeed=True)
            run.train(1)
            before = t.fingerprint(run.parts)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, unlimited))
            run.save()
            run.checkpointer.wait()
            resource.setrlimit(resource.RLIMIT_FSIZE, (unlimited, unlimited))
            assert run.events.kinds()[-1] == "checkpoint_failed", run.events
            text = run.events.text("checkpoint_failed")
            assert "step_00000002.partial" in text and "the checkpoint of step 1 is intact" in text, text
            assert not run.folder.checkpoints_dir.joinpath("step_00000002.partial").exists()
            assert t.fingerprint(run.parts) == before
            run.save(must_succeed=True)
            assert run.folder.committed_steps() == [1, 2]
        print("survived", name, text)

    # 1,000 bytes refuse even the first small file, 40,000 only the shards.
    fill_the_disk("foreground", False, 40_000)
    fill_the_disk("background", True, 40_000)
    fill_the_disk("at_once", True, 1_000)
"""
)


def test_a_write_that_the_kernel_refuses_harms_nothing(tmp_path):
    output = run_script(tmp_path, FULL_DISK)
    assert (
        "survived foreground" in output and "survived background" in output and "survived at_once" in output
    )


@pytest.mark.parametrize("in_background", [False, True], ids=["sync", "async"])
def test_a_refusal_while_megatron_plans_its_files_harms_nothing(tmp_path, monkeypatch, in_background):
    def refuse(*args, **options):
        raise OSError(errno.ENOSPC, "No space left on device", "common.pt")

    with Run(tiny_config(tmp_path, checkpoint={"async_save": in_background})) as run:
        run.train(1)
        monkeypatch.setattr(mcore_checkpointing.dist_checkpointing, "save", refuse)
        assert run.save() is False
        assert "No space left on device" in run.events.text("checkpoint_failed")
        monkeypatch.undo()
        assert run.save(must_succeed=True)
        assert run.folder.committed_steps() == [1]


# One import for all lives: each life is a fork that trains and saves until it is killed.
LIVES = (
    SCRIPT_PROLOGUE
    + """
    import os, random, select, signal, time
    config = t.tiny_config(Path({root!r}), run={{"train_steps": 100000}})

    def live(out):
        with t.Run(config) as run:
            if run.load() is None:
                run.state = t.TrainState()
            out.write(f"start {{run.state.step}}\\n")
            while True:
                run.train(1)
                out.write(f"saving {{run.state.step}}\\n")
                run.save()
                out.write(f"committed {{run.state.step}}\\n")

    generator, committed, num_partials = random.Random(7), 0, 0
    for life in range(4):
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.setsid()
            live(os.fdopen(writing, "w", buffering=1))
        os.close(writing)
        lines = os.fdopen(reading)
        step = int(lines.readline().split()[1])
        assert step >= committed, (step, committed)
        for _ in range(2):
            assert lines.readline().startswith("saving")
            began_s = time.monotonic()
            committed = int(lines.readline().split()[1])
            save_s = time.monotonic() - began_s
        assert lines.readline().startswith("saving")
        if life % 2:  # every other time surely inside: not before the staging folder is there
            while not any(Path({root!r}).glob("tiny/checkpoints/*.partial")):
                time.sleep(0.001)
        select.select([lines], [], [], generator.uniform(0.0, save_s / 2))  # returns early if the save ends
        os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
        for line in lines:
            word, step = line.split()
            committed = int(step) if word == "committed" else committed
        num_partials += any(Path({root!r}).glob("tiny/checkpoints/*.partial"))
    print("committed", committed, "partial", num_partials)
"""
)


@pytest.mark.slow
def test_kill_9_in_real_saves_always_leaves_something_to_resume(tmp_path):
    words = run_script(tmp_path, LIVES).split()
    committed, num_partials = int(words[1]), int(words[3])
    assert num_partials >= 1, "too few kills hit a save: the test would show nothing"
    with Run(tiny_config(tmp_path / "runs", run={"train_steps": 100000})) as run:
        assert run.load().step >= committed >= 8
