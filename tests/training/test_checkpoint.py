"""Whole checkpoints of a tiny model: exact resume, background saves, settings that changed, kept formats."""

import copy
import json
import os
import signal
import tarfile
from pathlib import Path

import pytest
import torch

from phsa_megatron.config.errors import CheckpointError, ConfigError
from phsa_megatron.config.schema import Dtype
from phsa_megatron.parallel import mcore_checkpointing
from phsa_megatron.training import checkpoint_files
from phsa_megatron.training.commit import FORMAT_VERSION
from phsa_megatron.training.state import TrainState, capture_rng, rng_digest
from tests.training.checkpoint_runs import (
    Run,
    fingerprint,
    format_config,
    hashes,
    tiny_config,
)


@pytest.mark.parametrize("in_background", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("distributed", [True, False], ids=["sharded_optimizer", "whole_optimizer"])
@pytest.mark.parametrize("dtype", [Dtype.fp32, Dtype.bf16])
def test_a_resume_is_the_run_that_was_never_stopped(tmp_path, dtype, distributed, in_background):
    config = tiny_config(
        tmp_path,
        run={"dtype": dtype},
        parallel={"distributed_optimizer": distributed},
        checkpoint={"async_save": in_background},
    )
    with Run(config) as straight:
        straight.train(3)
        straight.save()
        before = straight.train(4)  # while the writer may still be at work
        straight.checkpointer.wait()
        expected = fingerprint(straight.parts)
        assert straight.checkpointer.latest_committed() == 3
    with Run(config) as resumed:
        fresh = fingerprint(resumed.parts)
        state = resumed.load()
        assert state == TrainState(step=3, consumed_sequences=6)
        after = resumed.train(4)
        found = fingerprint(resumed.parts)
    assert [norm.hex() for norm in after] == [norm.hex() for norm in before]
    assert {key for key in expected if found.get(key) != expected[key]} == set()
    assert found.keys() == expected.keys()
    assert fresh["rng"] != expected["rng"] and fresh["scheduler"] != expected["scheduler"]


def test_without_the_saved_generators_the_resume_would_differ(tmp_path, monkeypatch):
    """Negative control of the test above: it can see a lost random state."""
    config = tiny_config(tmp_path)
    with Run(config) as straight:
        straight.train(2)
        straight.save()
        before = straight.train(1)
    monkeypatch.setattr(checkpoint_files.training_state, "restore_rng", lambda rng: None)
    with Run(config) as resumed:
        resumed.load()
        assert resumed.train(1) != before


def test_requested_and_committed_are_two_events_and_a_background_save_commits_only_when_polled(tmp_path):
    config = tiny_config(tmp_path, checkpoint={"async_save": True})
    with Run(config) as run:
        run.train(1)
        assert run.save()
        assert run.events.kinds() == ["checkpoint_requested"]
        assert run.folder.committed_steps() == []
        for _ in range(10_000):
            run.checkpointer.poll()
            if run.events.kinds() != ["checkpoint_requested"]:
                break
            os.sched_yield()
        run.checkpointer.wait()
        assert run.events.kinds() == ["checkpoint_requested", "checkpoint_committed"]
        assert run.folder.committed_steps() == [1]
        run.train(1)
        run.save(must_succeed=True)  # the last save of a process stays until it is committed
        assert run.folder.committed_steps() == [1, 2]
        assert run.folder.committed_step.read_text() == "2\n"


def test_a_background_save_holds_the_values_of_the_moment_it_was_asked_for(tmp_path):
    config = tiny_config(tmp_path, checkpoint={"async_save": True})
    with Run(config) as run:
        run.train(1)
        expected = fingerprint(run.parts)
        run.save()
        run.train(5)
        run.checkpointer.wait()
    with Run(config) as resumed:
        resumed.load()
        found = fingerprint(resumed.parts)
    assert {key for key in expected if found[key] != expected[key]} == set()


def test_keep_last_and_a_second_save_of_the_same_step(tmp_path):
    with Run(tiny_config(tmp_path, checkpoint={"keep_last": 2})) as run:
        for _ in range(4):
            run.train(1)
            run.save()
        assert run.folder.committed_steps() == [3, 4]
        marker = (run.folder.checkpoints_dir / "latest" / "COMMITTED.json").stat().st_mtime_ns
        num_events = len(run.events)
        assert run.save()
        assert (run.folder.checkpoints_dir / "latest" / "COMMITTED.json").stat().st_mtime_ns == marker
        assert len(run.events) == num_events


def test_nothing_to_resume_from_is_none_and_leftovers_are_removed_with_a_line(tmp_path):
    with Run(tiny_config(tmp_path)) as run:
        (run.folder.checkpoints_dir / "step_00000009.partial").mkdir(parents=True)
        assert run.load() is None
        assert run.events.kinds() == ["checkpoint_cleaned"]
        assert "step_00000009.partial" in run.events.text("checkpoint_cleaned")


def test_another_data_order_is_refused_with_the_consequence(tmp_path):
    with Run(tiny_config(tmp_path)) as run:
        run.state.data_fingerprint = {"run.seed": 1, "data.sources.a.weight": 1.0}
        run.train(1)
        run.save()
        assert run.load(data_fingerprint={"run.seed": 1, "data.sources.a.weight": 1.0}).step == 1
        with pytest.raises(CheckpointError, match=r"(?s)run.seed: 1 in the checkpoint, 2 now.*never see"):
            run.load(data_fingerprint={"run.seed": 2, "data.sources.a.weight": 1.0})


def test_changed_settings_are_listed_or_refused(tmp_path):
    with Run(tiny_config(tmp_path)) as run:
        run.train(1)
        run.save()
    with Run(tiny_config(tmp_path, optim={"lr": 2e-2})) as run:
        assert run.load().step == 1
        assert "optim.lr: 0.01 -> 0.02" in run.events.text("resume")
    with (
        Run(tiny_config(tmp_path, attention={"train_topk": 3})) as run,
        pytest.raises(ConfigError, match="train_topk"),
    ):
        run.load()
    with (
        Run(tiny_config(tmp_path, parallel={"distributed_optimizer": False})) as run,
        pytest.raises(ConfigError, match="distributed_optimizer"),
    ):
        run.load()


def test_a_checkpoint_of_a_newer_megatron_is_refused(tmp_path):
    with Run(tiny_config(tmp_path)) as run:
        run.train(1)
        run.save()
        path = run.folder.checkpoints_dir / "latest" / "COMMITTED.json"
        values = json.loads(path.read_text())
        values["made_with"]["megatron_core"] = "0.99.0"
        path.write_text(json.dumps(values))
        with pytest.raises(CheckpointError, match=r"megatron-core 0\.99\.0.*older versions cannot read"):
            run.load()


@pytest.mark.parametrize("version", range(1, FORMAT_VERSION + 1))
def test_a_kept_checkpoint_of_each_format_is_readable_with_every_megatron(tmp_path, version):
    """Written once by megatron-core 0.16.1, and not again when the format stays."""
    kept = Path(__file__).parent / "kept_checkpoints" / f"format_{version}"
    config = format_config(tmp_path)
    with Run(config) as run:
        run.folder.checkpoints_dir.mkdir()
        with tarfile.open(kept.with_suffix(".tar.gz")) as archive:
            archive.extractall(run.folder.checkpoints_dir, filter="data")
        assert run.load() == TrainState(step=2, consumed_sequences=4)
        assert hashes(run.parts) == json.loads(kept.with_suffix(".json").read_text())
        run.train(1)
        assert run.save(must_succeed=True)


def test_weights_only_takes_the_weights_and_nothing_else(tmp_path):
    config = tiny_config(tmp_path, run={"dtype": Dtype.bf16})
    with Run(config) as run:
        run.train(2)
        run.save()
        saved = fingerprint(run.parts)
    other = copy.deepcopy(config)
    other.run.name, other.run.seed = "other", 5
    with Run(other) as fresh:
        rng = rng_digest(capture_rng())
        fresh.checkpointer.load_from(run.folder.checkpoints_dir / "latest", fresh.parts, weights_only=True)
        found = fingerprint(fresh.parts)
        assert rng_digest(capture_rng()) == rng
        for key, value in saved.items():
            if key.startswith("weight"):
                assert found[key] == value
        for name, parameter in fresh.parts.named_parameters():
            main = parameter.main_param
            assert main is not None and torch.equal(main.view(-1), parameter.detach().float().view(-1)), name
        assert not any(key.startswith("exp_avg") for key in found)


def test_a_checkpoint_outside_of_the_sequence(tmp_path):
    with Run(tiny_config(tmp_path)) as run:
        run.train(2)
        run.checkpointer.save_to(run.folder.replay_dir / "before_step_3", run.parts, run.state)
        expected = fingerprint(run.parts)
        assert run.checkpointer.latest_committed() is None
        run.train(1)
        state = run.checkpointer.load_from(run.folder.replay_dir / "before_step_3", run.parts)
        assert state.step == 2
        assert fingerprint(run.parts) == expected


def test_another_model_is_refused_with_the_folder_named(tmp_path):
    with Run(tiny_config(tmp_path)) as run:
        run.train(1)
        run.save()
    with (
        Run(tiny_config(tmp_path, model={"ffn_hidden_size": 64})) as run,
        pytest.raises(CheckpointError, match="cannot be read into this model"),
    ):
        run.checkpointer.load_from(run.folder.checkpoints_dir / "latest", run.parts)


def test_the_process_that_collects_results_ignores_stop_signals(tmp_path):
    """A batch system signals every process of the job, this one too; the save must still work."""
    with Run(tiny_config(tmp_path)) as run:
        run.train(1)
        run.save()
        manager = mcore_checkpointing._result_manager
        assert manager is not None
        os.kill(manager._process.pid, signal.SIGTERM)
        os.kill(manager._process.pid, signal.SIGUSR1)
        run.train(1)
        assert run.save()
        assert run.folder.committed_steps() == [1, 2]
