import json

import pytest

from phsa_megatron.config.compose import dump, load
from phsa_megatron.config.errors import ConfigError
from phsa_megatron.config.lineage import read_lineage
from phsa_megatron.config.prepare_run import Start, inspect_run_folder, prepare_run_folder
from phsa_megatron.config.run_folder import RunFolder


@pytest.fixture
def make(tmp_path, changed):
    """The demo in a folder of its own, with some settings replaced."""

    def config(**settings):
        named = {key.replace("__", "."): value for key, value in settings.items()}
        return changed({"run.root_dir": str(tmp_path / "runs"), **named})

    return config


def commit(folder: RunFolder, step: int) -> None:
    path = folder.checkpoints_dir / f"step_{step:08d}"
    path.mkdir(parents=True)
    (path / folder.COMMIT_MARKER).write_text("{}")
    folder.committed_step.write_text(f"{step}\n")


def refusal(config) -> str:
    with pytest.raises(ConfigError) as caught:
        prepare_run_folder(config)
    return str(caught.value)


def test_the_folder_has_a_fixed_name(make, tmp_path):
    assert RunFolder.of(make()).path == tmp_path / "runs" / "phsa_demo_cpu"


def test_a_new_run_starts_from_scratch_and_leaves_its_settings(make):
    prepared = prepare_run_folder(make())
    assert prepared.start is Start.scratch
    assert load(prepared.folder.config_file) == make()
    assert not prepared.folder.lineage_file.exists()


def test_inspecting_writes_nothing(make, tmp_path):
    assert inspect_run_folder(make()).start is Start.scratch
    assert list(tmp_path.iterdir()) == []


def test_a_run_without_checkpoint_may_start_again_with_other_settings(make):
    prepare_run_folder(make())
    assert prepare_run_folder(make(model__hidden_size=256)).start is Start.scratch


def test_a_committed_checkpoint_is_resumed(make):
    folder = prepare_run_folder(make()).folder
    commit(folder, 20)
    commit(folder, 100)
    prepared = prepare_run_folder(make())
    assert prepared.start is Start.resume
    assert prepared.messages == (f"resuming {folder.path} from step 100",)


def test_a_commit_that_was_not_yet_recorded_is_found(make):
    folder = prepare_run_folder(make()).folder
    commit(folder, 20)
    folder.committed_step.unlink()
    assert prepare_run_folder(make()).start is Start.resume


def test_allowed_changes_are_listed_and_written(make):
    folder = prepare_run_folder(make()).folder
    commit(folder, 20)
    prepared = prepare_run_folder(make(optim__lr=1e-4))
    assert "optim.lr: 0.003 -> 0.0001  [allowed" in "\n".join(prepared.messages)
    assert load(folder.config_file).optim.lr == 1e-4


def test_a_change_that_cannot_be_resumed_is_refused_and_nothing_is_written(make):
    folder = prepare_run_folder(make()).folder
    commit(folder, 20)
    before = folder.config_file.read_text()
    message = refusal(make(attention__train_topk=4))
    assert "attention.train_topk: 2 -> 4" in message
    assert "run.init_from=RUN" in message
    assert folder.config_file.read_text() == before


@pytest.mark.parametrize("name", ["step_00000020", "step_00000020.damaged", "something"])
def test_checkpoints_without_a_commit_are_not_silently_started_over(make, name):
    folder = prepare_run_folder(make()).folder
    (folder.checkpoints_dir / name).mkdir(parents=True)
    message = refusal(make())
    assert name in message
    assert "step 0" in message
    assert "choose another run.name" in message


def test_a_recorded_commit_without_its_checkpoint_is_refused(make):
    folder = prepare_run_folder(make()).folder
    folder.committed_step.write_text("20\n")
    assert "step 20 was committed, and no checkpoint is there" in refusal(make())


@pytest.mark.parametrize("name", ["step_00000020.partial", "step_00000020.pruned", ".latest.tmp"])
def test_a_first_save_that_was_killed_may_start_over(make, name):
    folder = prepare_run_folder(make()).folder
    (folder.checkpoints_dir / name).mkdir(parents=True)
    assert prepare_run_folder(make()).start is Start.scratch


def test_a_finished_run_says_so_and_is_left_alone(make):
    folder = prepare_run_folder(make()).folder
    commit(folder, 400)
    folder.done.touch()
    prepared = prepare_run_folder(make())
    assert prepared.start is Start.finished
    assert "is finished: step 400 of 400" in prepared.messages[0]
    assert "run.train_steps to more than 400" in prepared.messages[0]
    assert folder.done.exists()


def test_a_finished_run_is_extended_by_more_steps(make):
    folder = prepare_run_folder(make()).folder
    commit(folder, 400)
    folder.done.touch()
    assert prepare_run_folder(make(run__train_steps=500)).start is Start.resume
    assert not folder.done.exists()


def test_old_requests_do_not_stop_a_new_start(make):
    folder = prepare_run_folder(make()).folder
    folder.exit_request.touch()
    folder.save_request.touch()
    messages = "\n".join(prepare_run_folder(make()).messages)
    assert f"removed an old request: {folder.exit_request}" in messages
    assert not folder.exit_request.exists()
    assert not folder.save_request.exists()


def test_a_folder_that_cannot_be_made_is_named(make, tmp_path):
    (tmp_path / "runs").write_text("a file in the way")
    assert "run.root_dir=" in refusal(make())


class TestNewStage:
    def parent(self, make) -> RunFolder:
        folder = prepare_run_folder(make(run__name="parent")).folder
        commit(folder, 300)
        return folder

    def test_the_lineage_holds_the_whole_chain(self, make):
        parent = self.parent(make)
        child = prepare_run_folder(make(run__name="child", run__init_from=str(parent.path), run__seed=7))
        assert child.start is Start.scratch
        assert "weights of" in child.messages[0]
        commit(child.folder, 10)
        third = prepare_run_folder(make(run__name="third", run__init_from=str(child.folder.path)))
        chain = read_lineage(third.folder.lineage_file)
        assert [entry["step"] for entry in chain] == [10, 300]
        assert [entry["kind"] for entry in chain] == ["run", "run"]
        assert chain[1]["init_from"] == str(parent.path.resolve())

    def test_resuming_a_stage_does_not_look_at_its_source_again(self, make):
        parent = self.parent(make)
        config = make(run__name="child", run__init_from=str(parent.path))
        commit(prepare_run_folder(config).folder, 10)
        parent.config_file.unlink()
        assert prepare_run_folder(config).start is Start.resume

    def test_weights_of_another_shape_are_refused(self, make):
        parent = self.parent(make)
        config = make(run__name="child", run__init_from=str(parent.path), model__num_layers=8)
        assert "model.num_layers: 4 -> 8" in refusal(config)

    def test_a_source_without_checkpoint_is_refused(self, make):
        parent = prepare_run_folder(make(run__name="parent")).folder
        message = refusal(make(run__name="child", run__init_from=str(parent.path)))
        assert "has no committed checkpoint" in message

    def test_a_folder_that_is_neither_is_refused(self, make, tmp_path):
        message = refusal(make(run__init_from=str(tmp_path / "nowhere")))
        assert "neither a run folder" in message
        assert "check the path" in message

    def test_a_hugging_face_folder_is_recognized(self, make, tmp_path):
        source = tmp_path / "hf"
        source.mkdir()
        (source / "config.json").write_text("{}")
        (source / "model.safetensors").write_bytes(b"")
        prepared = prepare_run_folder(make(run__init_from=str(source)))
        (entry,) = json.loads(prepared.folder.lineage_file.read_text())
        assert entry["kind"] == "huggingface"
        assert entry["step"] is None

    def test_a_damaged_lineage_is_said(self, make):
        parent = self.parent(make)
        parent.lineage_file.write_text("{")
        assert "lineage.json is damaged" in refusal(make(run__name="c", run__init_from=str(parent.path)))


def test_dumped_settings_of_a_prepared_run_are_the_composed_ones(make):
    folder = prepare_run_folder(make()).folder
    assert folder.config_file.read_text() == dump(make())
