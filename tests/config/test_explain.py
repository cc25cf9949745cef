import io

import pytest
from rich.console import Console

from phsa_megatron.config import keys
from phsa_megatron.config.compose import compose_tree
from phsa_megatron.config.errors import ConfigError
from phsa_megatron.config.explain import explain, explain_overview
from phsa_megatron.config.recipes_path import recipes_dir


@pytest.fixture(scope="module")
def tree():
    return compose_tree(["recipe=phsa_demo_cpu", "optim.lr=0.001"])


def shown(key, composed) -> str:
    console = Console(file=io.StringIO(), width=200)
    explain(key, composed, console)
    return console.file.getvalue()


def test_a_setting_is_explained_with_value_unit_meaning_origin_and_dependents(tree):
    text = shown("attention.local_tokens", tree)
    lines = (recipes_dir() / "recipe" / "phsa_demo_cpu.yaml").read_text().splitlines()
    (number, value) = next((n, t.split()[1]) for n, t in enumerate(lines, 1) if "local_tokens:" in t)
    assert f"│ {value} " in text
    assert "│ tokens " in text
    assert "Local window: the current block" in text
    assert f"recipes/recipe/phsa_demo_cpu.yaml:{number} " in text
    assert "may not change" in text
    assert "sparsity_mean_frac = " in text
    assert "flops_per_token_selected" in text
    assert "parameters.total" not in text


def test_the_command_line_is_named_as_origin_and_nothing_is_derived_from_lr(tree):
    text = shown("optim.lr", tree)
    assert "command line optim.lr=0.001" in text
    assert "none: it must be set" in text
    assert "derived from it │ nothing" in text


def test_an_enumeration_lists_its_values(tree):
    assert "one of exact, exact_any, strip_any" in shown("attention.punctuation_match", tree)


def test_a_group_lists_its_settings(tree):
    text = shown("optim", tree)
    for key in keys.keys_under("optim"):
        assert f"│ {key.removeprefix('optim.')} " in text


def test_the_sources_of_a_mixture_are_listed_by_name(tree):
    text = shown("data.sources", tree)
    assert "english.weight" in text
    assert "chinese.train_prefix" in text


def test_settings_nobody_gave_are_explained_too():
    text = shown("model.num_layers", compose_tree([]))
    assert "not set" in text
    assert "nobody yet" in text
    assert "choose a recipe" in text


def test_an_unknown_key_is_answered_with_the_right_one(tree):
    with pytest.raises(ConfigError, match=r"unknown key 'optim.lrr'. Did you mean optim.lr"):
        shown("optim.lrr", tree)


@pytest.mark.parametrize("pattern", [*keys.fields(), *keys.groups()])
def test_every_setting_and_group_can_be_explained(tree, pattern):
    text = shown(pattern.replace("*", "english"), tree)
    assert len(text.splitlines()) > 4


def test_every_setting_has_a_meaning():
    assert [key for key, field in keys.fields().items() if not field.meaning.endswith((".", "]."))] == []


def test_the_overview_lists_every_group(tree):
    console = Console(file=io.StringIO(), width=200)
    explain_overview(tree, console)
    assert all(f"│ {group} " in console.file.getvalue() for group in keys.groups())


@pytest.mark.parametrize(
    ("key", "unit"),
    [
        ("run.train_steps", "steps"),
        ("cluster.memory_gib", "GiB"),
        ("attention.mean_weight_frac", "fraction, 0 to 1"),
        ("optim.global_batch_sequences", "sequences"),
        ("model.num_layers", "count"),
        ("optim.lr", "none"),
    ],
)
def test_units_come_from_names(key, unit):
    assert keys.fields()[key].unit == unit
