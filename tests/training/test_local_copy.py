"""The copy on a node's own disk: read if it is the shared checkpoint, ignored with a message if it is not."""

from __future__ import annotations

import shutil

import pytest
import torch

from phsa_megatron.config.errors import CheckpointError
from phsa_megatron.training import checkpoint, local_copy
from tests.training.checkpoint_runs import Run, fingerprint, tiny_config


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """A config whose run has saved steps 1 and 2, what its state was, and where shards are read from."""
    read, real = [], checkpoint.shards.read

    def note(weights, folder):
        read.append(folder.parent)
        return real(weights, folder)

    monkeypatch.setattr(checkpoint.shards, "read", note)
    config = tiny_config(tmp_path / "runs", checkpoint={"local_copy_dir": str(tmp_path / "local")})
    with Run(config) as run:
        for _ in range(2):
            run.train(1)
            run.save()
            local_copy.wait_for_copies(60)
        expected = fingerprint(run.parts)
    (copies,) = (tmp_path / "local").iterdir()
    return config, expected, copies, read


def resume(config):
    with Run(config) as run:
        step = run.load().step
        return step, fingerprint(run.parts), run.events.text("local_copy")


def test_the_newest_copy_is_kept_and_read(saved):
    config, expected, copies, read = saved
    assert [path.name for path in copies.glob("step_*")] == ["step_00000002"]
    assert resume(config) == (2, expected, "1 of 1 nodes read their local copy of step_00000002")
    assert read == [copies / "step_00000002"]


def flip_a_byte(copy):
    shard = next(copy.glob("shards/*.distcp"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)


def lose_a_file(copy):
    next(copy.glob("shards/*.distcp")).unlink()


def another_checkpoint(copy):
    marker = copy / "COMMITTED.json"
    marker.write_text(marker.read_text().replace('"step": 2', '"step": 3'))


def another_list(copy):
    (copy / "COPIED.json").write_text("{}")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (flip_a_byte, "is damaged: shards/"),
        (lose_a_file, "cannot be read"),
        (another_checkpoint, "copy of another checkpoint"),
        (another_list, "lists other files"),
        (shutil.rmtree, "there is no copy"),
    ],
)
def test_a_copy_that_is_not_the_checkpoint_is_ignored_with_a_message(saved, capsys, damage, words):
    config, expected, copies, read = saved
    damage(copies / "step_00000002")
    step, found, told = resume(config)
    assert (step, found) == (2, expected) and told.startswith("0 of 1 nodes")
    assert read[-1].parent.name == "checkpoints"
    assert words in capsys.readouterr().err


def test_an_interrupted_copy_is_removed_and_nothing_is_copied_without_space(saved, monkeypatch, capsys):
    config, _, copies, _ = saved
    (copies / "step_00000003.partial").mkdir()
    with Run(config) as run:
        assert not list(copies.glob("*.partial"))
        run.load()
        monkeypatch.setattr(local_copy, "_SPARE_BYTES", 1 << 60)
        run.train(1)
        run.save()
        local_copy.wait_for_copies(60)
    assert "no local copy of step_00000003: it needs" in capsys.readouterr().err
    assert [path.name for path in copies.glob("step_*")] == ["step_00000002"]


def test_a_folder_that_cannot_be_written_is_refused(tmp_path, single_process_groups):
    (tmp_path / "file").write_text("")
    config = tiny_config(tmp_path / "runs", checkpoint={"local_copy_dir": str(tmp_path / "file" / "x")})
    with pytest.raises(
        CheckpointError, match=r"checkpoint.local_copy_dir=.*every node must be able to write"
    ):
        local_copy.LocalCopies(tmp_path, config, single_process_groups, print)


class Rank:
    """One of several processes: what `sum_over_world` answers is what all of them found."""

    device = torch.device("cpu")

    def __init__(self, rank, world_size, usable=()):
        self.rank, self.world_size, self.usable = rank, world_size, usable

    def any_true(self, flag):
        return flag

    def sum_over_world(self, tensor):
        return tensor + torch.tensor(self.usable) if self.usable else tensor


@pytest.mark.parametrize(
    ("rank", "usable", "reads_local"), [(1, (1, 0), True), (3, (1, 0), False), (3, (0, 1), True)]
)
def test_a_node_s_first_process_decides_for_its_node(tmp_path, rank, usable, reads_local):
    config = tiny_config(tmp_path / "runs", checkpoint={"local_copy_dir": str(tmp_path / "local")})
    config.cluster.num_nodes = config.cluster.processes_per_node = 2
    copies = local_copy.LocalCopies(tmp_path / "runs" / "tiny", config, Rank(rank, 4, usable), print)
    shared = tmp_path / "runs" / "tiny" / "checkpoints" / "step_00000002"
    chosen = copies.choose(shared)
    assert (chosen != shared) == reads_local and chosen.name == shared.name
    copies.take(shared)
    assert not list((tmp_path).glob("local/*/*")), "only the first process of a node copies"


def test_without_the_setting_nothing_is_copied(tmp_path, monkeypatch):
    monkeypatch.setattr(local_copy, "_copy_file", None)
    with Run(tiny_config(tmp_path)) as run:
        run.train(1)
        run.save()
        assert run.load().step == 1
        assert not run.events.text("local_copy")
