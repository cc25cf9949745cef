from pathlib import Path
from typing import get_origin

import pytest
from omegaconf import OmegaConf

from phsa_megatron.config import keys
from phsa_megatron.config.compose import OriginKind, compose, compose_tree
from phsa_megatron.config.errors import ConfigError
from phsa_megatron.config.recipes_path import recipes_dir
from phsa_megatron.config.schema import AttentionKind, PunctuationLanguage

DEMO = "recipe=phsa_demo_cpu"


def error_of(*overrides: str, recipes_dir: Path | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        compose(list(overrides), recipes_dir)
    return str(caught.value)


def written(file: str, key: str) -> object:
    """What a built-in file itself sets."""
    return OmegaConf.select(OmegaConf.load(recipes_dir() / file), key)


def test_later_layers_win_over_earlier_ones():
    recipe = "recipe/phsa_demo_cpu.yaml"
    of_recipe, of_group = (
        written(recipe, "attention.local_tokens"),
        written("attention/phsa.yaml", "local_tokens"),
    )
    topk = written(recipe, "attention.train_topk") + 1
    config = compose([DEMO, f"attention.train_topk={topk}"]).config
    assert config.run.seed == 1234  # schema
    assert config.model.num_layers == written("model/demo_tiny.yaml", "num_layers")
    assert config.attention.punctuation_language is PunctuationLanguage.en_zh  # phsa_en_zh over phsa
    assert config.attention.local_tokens == of_recipe != of_group  # the recipe over attention/phsa.yaml
    assert config.attention.train_topk == topk  # the command line over the recipe


def test_command_line_group_choice_wins_over_the_recipes():
    composed = compose([DEMO, "attention=dense"])
    assert composed.config.attention.kind is AttentionKind.dense
    assert composed.choices["attention"] == "dense"


def test_provenance_names_schema_file_with_line_and_argument():
    composed = compose([DEMO, "optim.lr=0.5"])
    provenance = composed.provenance
    assert provenance["run.seed"].kind is OriginKind.schema
    assert str(provenance["optim.lr"]) == "command line optim.lr=0.5"
    where = str(provenance["attention.local_tokens"])
    path, line = where.split(":")
    assert path == "recipes/recipe/phsa_demo_cpu.yaml"
    named = f"local_tokens: {composed.config.attention.local_tokens}"
    assert Path(path).read_text().splitlines()[int(line) - 1].strip() == named
    # A value from a file that another file of the group includes.
    assert str(provenance["attention.kind"]).startswith("recipes/attention/phsa.yaml:")
    assert str(provenance["attention.punctuation_language"]).startswith("recipes/attention/phsa_en_zh.yaml:")


def test_provenance_covers_every_setting_and_agrees_with_the_files():
    tree = compose_tree([DEMO])
    for key, origin in tree.provenance.items():
        field = keys.find(key)
        assert field is not None, key
        value = OmegaConf.select(tree.tree, key)
        if origin.kind is OriginKind.schema:
            assert value == field.default, key
        else:
            path, line = str(origin).split(":")
            assert key.rsplit(".", 1)[-1] in Path(path).read_text().splitlines()[int(line) - 1]


def _sample_value(field: keys.Field) -> tuple[str, object]:
    """An allowed value other than the default, as typed and as read."""
    if field.choices:
        name = next(c for c in reversed(field.choices))
        return name, name
    return {
        int: ("7", 7),
        float: ("0.125", 0.125),
        bool: ("true", True),
        str: ("some/text", "some/text"),
        list[int]: ("[3,4]", [3, 4]),
    }.get(field.plain_type, ("[one,two]", ["one", "two"]))


def test_every_schema_field_is_reachable_by_an_override():
    patterns = {k: f for k, f in keys.fields().items() if get_origin(f.plain_type) is not dict}
    samples = {k.replace("*", "english"): _sample_value(f) for k, f in patterns.items()}
    tree = compose_tree([DEMO, *(f"{key}={typed}" for key, (typed, _) in samples.items())])
    for key, (_, expected) in samples.items():
        assert OmegaConf.select(tree.tree, key) == expected, key
        assert tree.provenance[key].kind is OriginKind.command_line, key


def test_every_optional_field_takes_null():
    optional = [k.replace("*", "english") for k, f in keys.fields().items() if f.optional]
    assert len(optional) > 5
    tree = compose_tree([DEMO, *(f"{key}=null" for key in optional)])
    assert all(OmegaConf.select(tree.tree, key) is None for key in optional)


@pytest.mark.parametrize(
    ("typo", "meant"),
    [
        ("run.train_step=3", "run.train_steps"),
        ("model.hiden_size=3", "model.hidden_size"),
        ("attention.block_tokenz=32", "attention.block_tokens"),
        ("data.seq_len=3", "data.seq_len_tokens"),
        ("data.sources.english.wieght=3", "data.sources.english.weight"),
        ("parallel.tensor_sise=3", "parallel.tensor_size"),
        ("optim.learning_rate=3", "optim.lr"),
        ("checkpoint.save_every_step=3", "checkpoint.save_every_steps"),
        ("evaluate.every_step=3", "evaluate.every_steps"),
        ("cluster.peak_tflop=3", "cluster.peak_tflops"),
        ("monitoring.wandb.mod=online", "monitoring.wandb.mode"),
        ("lr=3", "optim.lr"),
        ("modle=qwen3_8b", "model=NAME"),
        ("reciep=phsa_demo_cpu", "recipe=NAME"),
    ],
)
def test_a_typo_on_the_command_line_is_answered_with_the_right_name(typo, meant):
    message = error_of(DEMO, typo)
    assert f"unknown key '{typo.split('=')[0]}'" in message
    assert f"Did you mean {meant}" in message
    assert "+" not in message


@pytest.mark.parametrize(
    ("choice", "meant"),
    [
        ("recipe=phsa_demo", "phsa_demo_cpu"),
        ("model=qwen3_0.6b", "qwen3_0p6b"),
        ("attention=phsa_zh", "phsa_en_zh"),
        ("data=phsa_papers", "phsa_paper"),
        ("parallel=singel", "single"),
        ("optim=wsdd", "wsd"),
        ("cluster=local_cpus", "local_cpu"),
        ("monitoring=quite", "quiet"),
    ],
)
def test_an_unknown_choice_lists_the_choices_and_the_nearest(choice, meant):
    group, name = choice.split("=")
    message = error_of(choice)
    assert f"unknown {group} '{name}'. Did you mean {meant}" in message
    assert "There are: " in message


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optim.lr=fast", ["optim.lr='fast'", "expected a number", "the text 'fast'"]),
        ("run.train_steps=1.5", ["run.train_steps=1.5", "expected a whole number", "got a number"]),
        ("run.train_steps=null", ["run.train_steps=None", "expected a whole number", "got null"]),
        ("model.qk_norm=perhaps", ["model.qk_norm", "expected true or false"]),
        ("attention.impl=tritn", ["expected one of reference, triton", "Did you mean triton?"]),
        ("run.sample_prompts=hello", ["expected a list of texts"]),
        ("parallel.virtual_pipeline_size=x", ["expected a whole number or null"]),
        ("run=3", ["'run' is a group of settings", "run.name=..."]),
        ("data.sources.english=3", ["group of settings", "data.sources.english.weight"]),
        ("optim.lr.x=3", ["unknown key 'optim.lr.x'"]),
        ("model={num_layers: 3}", ["give the name of a file in recipes/model", "model.KEY=VALUE"]),
    ],
)
def test_a_wrong_type_names_field_value_and_expected_type(override, words):
    message = error_of(DEMO, override)
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("+optim.lr=1", "without '+'"),
        ("++optim.lr=1", "without '+'"),
        ("+optim.lrate=1", "without '+'"),
        ("~optim.lr", "cannot be removed"),
        ("~data.sources.english", "set its weight to 0"),
        ("optim.lr=1,2", "several values"),
        ("hydra.run.dir=x", "--recipes-dir"),
        ("model@x=qwen3_8b", "'@' is not used here"),
        ("optim.lr", "is not KEY=VALUE"),
        ("run.name=a(b", "cannot be read"),
        ("optim.lr=???", "sets nothing"),
    ],
)
def test_other_forms_of_arguments_are_refused_with_advice(override, words):
    message = error_of(DEMO, override)
    assert words in message
    assert "append to your" not in message


def test_the_same_key_twice_is_refused():
    assert "optim.lr is given twice" in error_of(DEMO, "optim.lr=1", "optim.lr=2")


def test_all_wrong_arguments_are_reported_together():
    message = error_of(DEMO, "optim.lrr=1", "model=nope", "run.seed=x")
    assert len(message.splitlines()) == 3


def test_missing_values_are_listed_in_our_own_words():
    message = error_of()
    assert "choose a model: model=demo_tiny|" in message
    assert "set run.name=... (a text)" in message
    assert "set optim.lr=... (a number): Peak learning rate." in message
    assert "???" not in message


def test_missing_values_of_the_papers_mixture_are_all_listed():
    message = error_of("recipe=phsa_8b_pretrain_8gpu_h100_bf16_4k")
    assert message.count(".weight=...") == 6
    assert message.count(".train_prefix=...") == 6


def test_a_new_source_can_be_added_on_the_command_line():
    source = "data.sources.mine={weight: 2, domain: d, train_prefix: p}"
    sources = compose([DEMO, source]).config.data.sources
    assert list(sources) == ["english", "chinese", "mine"]
    assert sources["mine"].weight == 2.0
    assert "set data.sources.mine.domain" in error_of(DEMO, "data.sources.mine.weight=2")


def test_interpolation_is_resolved_and_a_broken_one_is_reported():
    assert compose([DEMO, "optim.lr=0.25", "optim.min_lr=${optim.lr}"]).config.optim.min_lr == 0.25
    assert "optim.min_lr" in error_of(DEMO, "optim.min_lr=${optim.nothing}")
    assert "expected a whole number" in error_of(DEMO, "run.seed=${run.name}")


class TestOwnRecipes:
    def write(self, folder: Path, name: str, text: str) -> Path:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    def test_a_recipe_of_ones_own_may_build_on_a_built_in_one(self, tmp_path):
        text = "# @package _global_\ndefaults: [phsa_demo_cpu, _self_]\nrun:\n  name: mine\n"
        path = self.write(tmp_path, "recipe/mine.yaml", text)
        composed = compose(["recipe=mine"], tmp_path)
        assert composed.config.run.name == "mine"
        assert composed.config.model.name == "demo_tiny"
        assert str(composed.provenance["run.name"]) == f"{path}:4"

    def test_a_typo_in_a_file_names_file_line_and_the_right_key(self, tmp_path):
        text = "# @package _global_\ndefaults: [phsa_demo_cpu, _self_]\noptim:\n  learn_rate: 1\n  lr: x\n"
        path = self.write(tmp_path, "recipe/mine.yaml", text)
        message = error_of("recipe=mine", recipes_dir=tmp_path)
        assert f"{path}:4: unknown key 'optim.learn_rate'" in message
        assert f"{path}:5: optim.lr='x': expected a number" in message

    def test_a_typo_in_a_group_file_is_found_under_its_group(self, tmp_path):
        self.write(tmp_path, "optim/mine.yaml", "wieght_decay: 1\n")
        message = error_of(DEMO, "optim=mine", recipes_dir=tmp_path)
        assert "unknown key 'optim.wieght_decay'. Did you mean optim.weight_decay?" in message

    def test_an_unknown_choice_in_a_file_is_answered_with_the_nearest(self, tmp_path):
        text = "# @package _global_\ndefaults:\n  - override /model: demo_tinny\n"
        self.write(tmp_path, "recipe/mine.yaml", text)
        message = error_of("recipe=mine", recipes_dir=tmp_path)
        assert "unknown model 'demo_tinny'. Did you mean demo_tiny?" in message

    def test_an_unknown_group_in_a_file_is_answered_with_the_nearest(self, tmp_path):
        text = "# @package _global_\ndefaults:\n  - override /modle: demo_tiny\n"
        self.write(tmp_path, "recipe/mine.yaml", text)
        message = error_of("recipe=mine", recipes_dir=tmp_path)
        assert "Did you mean model?" in message
        assert "+" not in message

    def test_broken_yaml_names_the_line(self, tmp_path):
        self.write(tmp_path, "recipe/mine.yaml", "# @package _global_\nrun:\n  name: [a\n")
        message = error_of("recipe=mine", recipes_dir=tmp_path)
        assert "not valid YAML" in message
        assert "mine.yaml" in message

    def test_a_file_that_is_no_mapping_is_refused(self, tmp_path):
        self.write(tmp_path, "optim/mine.yaml", "- a\n- b\n")
        assert "mine" in error_of(DEMO, "optim=mine", recipes_dir=tmp_path)

    def test_a_built_in_name_cannot_be_shadowed(self, tmp_path):
        self.write(tmp_path, "model/qwen3_8b.yaml", "name: x\n")
        assert "has the name of a built-in recipe" in error_of(DEMO, recipes_dir=tmp_path)

    def test_a_missing_or_empty_folder_is_refused(self, tmp_path):
        assert "no such folder" in error_of(DEMO, recipes_dir=tmp_path / "none")
        assert "holds none of the groups" in error_of(DEMO, recipes_dir=tmp_path)
