"""The durable commit of a checkpoint folder, without torch."""

import errno
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from phsa_megatron.config.errors import CheckpointError
from phsa_megatron.training import commit
from phsa_megatron.training.commit import CheckpointStore

# Saves for ever, each step in three files that all say the step; starts from the newest committed one.
WRITER = """
import sys
from pathlib import Path
from phsa_megatron.training.commit import CheckpointStore
run = Path(sys.argv[1])
store = CheckpointStore(run / "checkpoints", run / "committed_step")
cleaned = store.clean_leftovers()
start = store.newest().newest or 0
if start:
    for name in ("model.bin", "optimizer.bin", "rng/rank_00000.pt"):
        text = (store.path(start) / name).read_text()
        assert set(text.split()) == {str(start)}, (name, text[:40])
print("start", start, len(cleaned), flush=True)
for step in range(start + 1, start + 1000):
    folder = store.begin(step)
    (folder / "rng").mkdir()
    for name in ("model.bin", "optimizer.bin", "rng/rank_00000.pt"):
        (folder / name).write_text(f"{step} " * 20000)
    store.commit(step)
    store.prune(2)
    print("committed", step, flush=True)
"""


@pytest.fixture
def store(tmp_path):
    return CheckpointStore(tmp_path / "checkpoints", tmp_path / "committed_step")


def save(store: CheckpointStore, step: int, content: bytes = b"weights") -> Path:
    folder = store.begin(step)
    (folder / "rng").mkdir()
    (folder / "model.bin").write_bytes(content * 10)
    (folder / "rng" / "rank_00000.pt").write_bytes(b"state")
    store.commit(step, {"megatron_core": "0.16.1"}, {"world_size": 1})
    return store.path(step)


def test_a_commit_leaves_the_folder_the_marker_and_both_pointers(store):
    folder = save(store, 120)
    marker = commit.verify(folder)
    assert marker.step == 120
    assert marker.made_with == {"megatron_core": "0.16.1"}
    assert marker.about == {"world_size": 1}
    assert set(marker.files) == {"model.bin", "rng/rank_00000.pt"}
    assert marker.total_bytes == 75
    assert (store.checkpoints_dir / "latest").resolve() == folder.resolve()
    assert store.recorded_step() == 120
    assert store.scan().newest == 120
    assert not store.partial_path(120).exists()


def test_pointers_move_after_the_folder_has_its_final_name(store, monkeypatch):
    save(store, 1)
    events = []
    rename, replace = Path.rename, Path.replace
    monkeypatch.setattr(Path, "rename", lambda a, b: (events.append(Path(b).name), rename(a, b))[1])
    monkeypatch.setattr(Path, "replace", lambda a, b: (events.append(Path(b).name), replace(a, b))[1])
    save(store, 2)
    assert events == ["COMMITTED.json", "step_00000002", "latest", "committed_step"]


def test_every_file_and_folder_is_synced_before_the_final_name_appears(store, monkeypatch):
    synced = []
    real = commit.fsync_path
    monkeypatch.setattr(commit, "fsync_path", lambda path: (synced.append(path), real(path))[1])
    partial, final = store.partial_path(5), store.path(5)
    save(store, 5)
    before = synced[: synced.index(store.checkpoints_dir)]
    assert {partial / "model.bin", partial / "rng" / "rank_00000.pt", partial / "rng", partial} <= set(before)
    assert final not in before


def test_a_partial_folder_is_never_found_and_is_removed_at_the_next_start(store):
    save(store, 10)
    folder = store.begin(20)
    (folder / "model.bin").write_bytes(b"half")
    assert store.newest().newest == 10
    lines = store.clean_leftovers()
    assert len(lines) == 1 and "step_00000020.partial" in lines[0] and "interrupted" in lines[0]
    assert not folder.exists()
    assert store.newest() == commit.Scan(10, ())


def test_only_a_partial_folder_means_that_nothing_was_ever_committed(store):
    store.begin(20)
    assert store.newest() == commit.Scan(None, ())


def test_latest_is_only_a_hint(store):
    save(store, 10)
    save(store, 20)
    (store.checkpoints_dir / "latest").unlink()
    (store.checkpoints_dir / "latest").symlink_to("step_00000010")
    store.committed_step_file.unlink()
    assert store.newest().newest == 20


def break_truncate(folder):
    (folder / "model.bin").write_bytes(b"short")


def break_flip(folder):
    (folder / "rng" / "rank_00000.pt").write_bytes(b"stata")


def break_missing(folder):
    (folder / "model.bin").unlink()


def break_marker_missing(folder):
    (folder / "COMMITTED.json").unlink()


def break_marker_json(folder):
    (folder / "COMMITTED.json").write_text('{"step": 20, "fi')


def break_marker_keys(folder):
    (folder / "COMMITTED.json").write_text('{"step": 20, "format_version": 1, "files": [1]}')


def break_renamed(folder):
    values = json.loads((folder / "COMMITTED.json").read_text())
    (folder / "COMMITTED.json").write_text(json.dumps({**values, "step": 19}))


DAMAGE = {
    break_truncate: "has 5 bytes, 70 were committed",
    break_flip: "another content",
    break_missing: "model.bin is missing",
    break_marker_missing: "its save never finished",
    break_marker_json: "cannot be read",
    break_marker_keys: "unknown or missing entries",
    break_renamed: "holds step 19",
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_a_damaged_checkpoint_is_skipped_with_its_reason(store, damage):
    save(store, 10)
    damage(save(store, 20))
    found = store.newest()
    assert found.newest == 10
    assert [name for name, _ in found.skipped] == ["step_00000020"]
    assert DAMAGE[damage] in found.skipped[0][1]


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_a_restart_from_zero_is_refused_when_the_only_checkpoint_is_damaged(store, damage):
    damage(save(store, 20))
    with pytest.raises(CheckpointError) as error:
        store.newest()
    message = str(error.value)
    assert DAMAGE[damage] in message and "step 0" in message and "run.name" in message


def test_a_restart_from_zero_is_refused_when_all_checkpoints_are_gone(store):
    folder = save(store, 20)
    (folder).rename(folder.with_name("elsewhere"))
    with pytest.raises(CheckpointError, match="says that step 20 was committed"):
        store.newest()


def test_a_lost_newest_checkpoint_is_named(store):
    save(store, 10)
    save(store, 20).rename(store.checkpoints_dir / "elsewhere")
    assert store.newest() == commit.Scan(10, (("step_00000020", "it was committed, but is not there"),))


def test_a_newer_format_is_refused_and_not_skipped(store):
    save(store, 10)
    folder = save(store, 20)
    values = json.loads((folder / "COMMITTED.json").read_text())
    (folder / "COMMITTED.json").write_text(json.dumps({**values, "format_version": 99, "new": 1}))
    with pytest.raises(CheckpointError, match="format_version is 99"):
        store.newest()


def test_pruning_keeps_the_newest_k_and_never_the_last_one_or_a_partial(store):
    for step in (1, 2, 3, 4):
        save(store, step)
    store.begin(5)
    unmarked = store.checkpoints_dir / "step_00000000"
    unmarked.mkdir()
    assert store.prune(2) == [1, 2]
    assert store.steps() == [0, 3, 4]
    assert store.prune(0) == [3]
    assert store.steps() == [0, 4]
    assert store.partial_path(5).is_dir()


def test_a_damaged_checkpoint_of_the_same_step_is_kept_aside(store):
    save(store, 10)
    break_truncate(save(store, 20))
    save(store, 20, b"again")
    assert store.scan() == commit.Scan(20, ())
    assert (store.checkpoints_dir / "step_00000020.damaged" / "model.bin").read_bytes() == b"short"
    assert store.clean_leftovers() == []


def test_a_full_disk_at_any_point_of_a_commit_leaves_the_previous_one_usable(store, monkeypatch):
    save(store, 10)
    real = os.fsync
    total = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: (total.append(descriptor), real(descriptor))[1])
    save(store, 20)
    num_syncs = len(total)
    assert num_syncs >= 8
    for failing in range(num_syncs):
        step = 30 + failing
        calls = iter(range(num_syncs))

        def fsync(descriptor, calls=calls, failing=failing):
            if next(calls) == failing:
                raise OSError(errno.ENOSPC, "No space left on device")
            real(descriptor)

        monkeypatch.setattr(os, "fsync", fsync)
        with pytest.raises(OSError, match="No space left"):
            save(store, step)
        monkeypatch.setattr(os, "fsync", real)
        store.abandon(step)
        # Either this step was already visible under its final name, or the previous one still is.
        newest = store.newest().newest
        assert newest == step or newest in (20, step - 1)
        assert commit.verify(store.path(newest)).step == newest


def test_kill_9_at_twenty_random_moments_always_leaves_something_to_resume(tmp_path):
    generator = random.Random(20260102)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    last_committed, num_inside_a_save = 0, 0
    for _ in range(20):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True, env=environment
        )
        assert process.stdout is not None
        first = process.stdout.readline().split()
        assert first and first[0] == "start", "the writer could not resume"
        # What was announced as committed before the kill is never lost.
        assert int(first[1]) >= last_committed
        num_inside_a_save += int(first[2]) > 0
        last_committed = max(last_committed, int(first[1]))
        for _ in range(generator.randrange(1, 4)):
            last_committed = int(process.stdout.readline().split()[1])
        try:
            process.wait(timeout=generator.uniform(0.0, 0.01))
        except subprocess.TimeoutExpired:
            process.kill()
        rest, _ = process.communicate()
        for line in rest.splitlines(keepends=True):
            if line.endswith("\n"):  # the kill may cut the last one
                last_committed = int(line.split()[1])
    store = CheckpointStore(tmp_path / "checkpoints", tmp_path / "committed_step")
    num_inside_a_save += bool(store.clean_leftovers())
    newest = store.newest().newest
    assert newest is not None and newest >= last_committed >= 20
    assert num_inside_a_save >= 5, "too few kills hit a save: the test would show nothing"


def test_the_mechanics_do_not_load_torch():
    code = "import sys, phsa_megatron.training.commit; sys.exit('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
