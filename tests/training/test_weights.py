"""A trained run opened without an optimizer: which checkpoint, and that its weights are the run's."""

import pytest
import torch

from phsa_megatron.config.errors import CheckpointError
from phsa_megatron.config.run_folder import RunFolder
from phsa_megatron.parallel import mcore_checkpointing as shards
from phsa_megatron.training.checkpoint import Checkpointer
from phsa_megatron.training.commit import CheckpointStore
from phsa_megatron.training.optimizer import build_parts
from phsa_megatron.training.state import TrainState
from phsa_megatron.training.weights import find_checkpoint, load_model


@pytest.fixture
def folder(tmp_path):
    """A run folder with committed checkpoints of steps 2 and 4, without weights."""
    folder = RunFolder(tmp_path / "run")
    store = CheckpointStore(folder.checkpoints_dir, folder.committed_step)
    for step in (2, 4):
        (store.begin(step) / "content").write_text(f"{step}")
        store.commit(step, shards.written_by())
    return folder


def test_the_newest_or_the_asked_checkpoint_is_found(folder, capsys):
    assert find_checkpoint(folder).name == "step_00000004"
    assert find_checkpoint(folder, 2).name == "step_00000002"
    assert capsys.readouterr().err == ""


def test_a_damaged_checkpoint_is_skipped_aloud_and_refused_by_number(folder, capsys):
    (folder.checkpoints_dir / "step_00000004" / "content").write_text("5")
    assert find_checkpoint(folder).name == "step_00000002"
    assert "skipped step_00000004: " in capsys.readouterr().err
    with pytest.raises(CheckpointError, match="has another content than was committed"):
        find_checkpoint(folder, 4)
    (folder.checkpoints_dir / "step_00000002" / "content").unlink()
    with pytest.raises(CheckpointError, match=r"(?s)holds no committed.*step_00000004: .*step_00000002: "):
        find_checkpoint(folder)


def test_what_is_not_there_is_refused(folder, tmp_path):
    with pytest.raises(CheckpointError, match=r"no committed checkpoint of step 3; it has: 2, 4$"):
        find_checkpoint(folder, 3)
    empty = RunFolder(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="elsewhere holds no committed checkpoint: train it first"):
        find_checkpoint(empty)
    with pytest.raises(CheckpointError, match="of step 3; it has: none; train it first"):
        find_checkpoint(empty, 3)


def test_loaded_weights_are_those_of_the_run_and_of_no_other_model(tiny_config, open_groups):
    config = tiny_config()
    folder = RunFolder.of(config)
    folder.path.mkdir(parents=True)
    groups = open_groups(config)
    parts = build_parts(config, groups)
    for parameter in parts.modules[0].parameters():
        parameter.data += 1.0
    checkpoint = folder.checkpoints_dir / "step_00000004"
    Checkpointer(folder, config, groups).save_to(checkpoint, parts, TrainState(step=4))
    model = load_model(find_checkpoint(folder), config, groups)
    saved = dict(parts.modules[0].named_parameters())
    assert not model.training and saved.keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(value, saved[name]) for name, value in model.named_parameters())
    config.model.num_layers += 1
    with pytest.raises(CheckpointError, match="cannot be read into this model"):
        load_model(checkpoint, config, groups)
