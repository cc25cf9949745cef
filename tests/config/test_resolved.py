import pytest
import yaml
from omegaconf import OmegaConf

from phsa_megatron.config import keys
from phsa_megatron.config.compose import dump, load
from phsa_megatron.config.errors import ConfigError
from phsa_megatron.config.resolved import write_atomically
from phsa_megatron.config.yaml_file import leaves


@pytest.fixture
def resolved(tmp_path, demo):
    path = tmp_path / "config.yaml"
    path.write_text(dump(demo))
    return path


def test_a_dumped_file_is_read_back_equal(resolved, demo):
    assert load(resolved) == demo


def test_a_dumped_file_has_exactly_the_schemas_keys(resolved):
    found = [key for key, _ in leaves(yaml.safe_load(resolved.read_text()))]
    patterns = {keys.find(key).key for key in found}
    # A mapping is there by its names, or as an empty one.
    assert patterns == set(keys.fields()) - {"data.sources", "cluster.environment.*", "cluster.sbatch.*"}


def test_numbers_survive_to_the_last_bit(tmp_path, changed):
    config = changed({"optim.lr": 0.1 + 0.2, "model.norm_eps": 1e-6, "optim.adam_eps": 1e-8})
    path = tmp_path / "config.yaml"
    path.write_text(dump(config))
    assert load(path).optim.lr == 0.1 + 0.2
    assert load(path) == config


def edit(path, key, value):
    tree = OmegaConf.load(path)
    OmegaConf.update(tree, key, value)
    OmegaConf.save(tree, path)


def test_an_unknown_key_in_a_file_is_refused_with_the_right_name(resolved):
    edit(resolved, "optim.lrr", 1)
    with pytest.raises(ConfigError, match=r"line \d+: unknown key 'optim.lrr'. Did you mean optim.lr"):
        load(resolved)


def test_a_wrong_type_in_a_file_is_refused(resolved):
    edit(resolved, "run.train_steps", "many")
    with pytest.raises(ConfigError, match="run.train_steps='many': expected a whole number"):
        load(resolved)


def test_a_file_without_a_required_setting_is_refused(tmp_path):
    (tmp_path / "c.yaml").write_text("run:\n  seed: 1\n")
    with pytest.raises(ConfigError, match="is not a resolved file: it lacks .*run.name"):
        load(tmp_path / "c.yaml")


def test_a_setting_newer_than_the_file_takes_its_default(resolved, demo):
    tree = OmegaConf.load(resolved)
    del tree.optim["clip_grad_norm"]
    OmegaConf.save(tree, resolved)
    assert load(resolved) == demo


@pytest.mark.parametrize(
    ("text", "words"), [("a: [", "not valid YAML"), ("- 1\n", "must hold a mapping"), ("", "it lacks")]
)
def test_a_damaged_file_is_refused(tmp_path, text, words):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words):
        load(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.yaml cannot be read: No such file"):
        load(tmp_path / "none.yaml")


def test_an_atomic_write_leaves_the_new_text_and_nothing_else(tmp_path):
    path = tmp_path / "f"
    path.write_text("old")
    write_atomically(path, "new")
    assert path.read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["f"]
