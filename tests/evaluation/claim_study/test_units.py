from dataclasses import replace

import pytest

from phsa_megatron.config.errors import ConfigError
from phsa_megatron.config.schema import AttentionKind, KernelImpl, PunctuationLanguage
from phsa_megatron.evaluation.claim_study.units import (
    MAIN,
    TOPKS,
    VARIANTS,
    make_units,
    require_equal_budget,
    views_of,
)

CPU = ["cluster=local_cpu", "attention.impl=reference", "compute.norm=torch", "run.dtype=fp32"]


@pytest.fixture(scope="module")
def units(tmp_path_factory):
    """All variants at two seeds, for a GPU."""
    return make_units([*reversed(VARIANTS)], [4, 2], [], tmp_path_factory.mktemp("study"))


@pytest.fixture(scope="module")
def attentions(units):
    return {unit.variant.name: unit.config.attention for unit in units if unit.seed == 4}


def test_seeds_come_before_what_is_not_main(units):
    names = [(unit.variant.name, unit.seed) for unit in units]
    assert {name for name, _ in names[: len(MAIN)]} == set(MAIN) and {seed for _, seed in names[:9]} == {4}
    assert names[9:] == [(name, 2) for name, _ in names[:9]]


def test_units_differ_in_attention_alone(attentions):
    assert attentions["dense"].kind is AttentionKind.dense
    assert attentions["phsa"].punctuation_language is PunctuationLanguage.en
    for name in ("phsa_en_zh", "random_tokens"):
        assert attentions[name].punctuation_language is PunctuationLanguage.en_zh
    assert attentions["mean_pool"].mean_weight_frac == attentions["infllm_v2"].mean_weight_frac == 1
    assert [attentions[f"phsa_en_zh{k}"].train_topk for k in ("", "_k1", "_k4")] == [2, 1, 4]


def test_selectors_without_a_kernel_choose_eagerly_on_a_gpu(attentions):
    for name, attention in attentions.items():
        eager = name == "infllm_v2"
        assert attention.impl is KernelImpl.triton
        assert attention.select_impl is (KernelImpl.reference if eager else None)


def test_another_budget_is_refused(units):
    first, other = units[0].config, units[1].config
    require_equal_budget(units[1].variant, other, first)
    longer = replace(other, run=replace(other.run, train_steps=other.run.train_steps + 1))
    with pytest.raises(ConfigError, match="also changes run.train_steps"):
        require_equal_budget(units[1].variant, longer, first)
    wider = replace(other, attention=replace(other.attention, local_tokens=256))
    with pytest.raises(ConfigError, match="also changes attention.local_tokens"):
        require_equal_budget(units[1].variant, wider, first)


@pytest.mark.parametrize(
    ("names", "overrides", "words"),
    [
        (["fhsa"], [], r"Did you mean phsa(?! or phsa\?)"),
        (["phsa", "phsa"], [], "at most once"),
        (["phsa", "indexer"], [], "indexer trains more than the rest"),
        (["phsa"], ["attention.train_topk=4"], "the study sets it itself"),
    ],
)
def test_wrong_studies_are_refused(names, overrides, words, tmp_path):
    with pytest.raises(ConfigError, match=words):
        make_units(names, [0], [*CPU, *overrides], tmp_path)


def test_views_are_every_k_of_the_own_selector_or_of_all_for_a_dense_model(units):
    own = views_of(units[0], units)
    assert [view.name for view in own] == [*(f"k{k}" for k in TOPKS), "dense"]
    assert [view.is_dense for view in own] == [False] * len(TOPKS) + [True]
    dense = next(unit for unit in units if unit.variant.name == "dense")
    names = [view.name for view in views_of(dense, units)]
    assert names[0] == "dense" and "mean_pool/k16" in names and len(names) == len(set(names)) == 1 + 6 * 5
