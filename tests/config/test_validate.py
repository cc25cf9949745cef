import dataclasses
import math

import pytest
from broken_rules import BROKEN

from phsa_megatron.config import keys, validate
from phsa_megatron.config.errors import ConfigError
from phsa_megatron.config.ranges import EXPLAINED_ELSEWHERE, RANGES, Range
from phsa_megatron.config.schema import (
    AttentionKind,
    Device,
    GroupScore,
    KernelImpl,
    LrSchedule,
    Selector,
    SourceConfig,
    TopkSchedule,
)


@pytest.mark.parametrize(("rule", "settings", "words"), BROKEN)
def test_a_broken_rule_names_field_value_rule_and_fix(changed, rule, settings, words):
    config = changed(settings)
    messages = [m for r in validate.RULES if r.__name__ == rule for m in r(config)]
    assert len(messages) == 1
    for word in words:
        assert word in messages[0]
    with pytest.raises(ConfigError) as caught:
        validate.validate(config)
    # Nothing else is broken by these settings.
    assert str(caught.value) == messages[0]


@pytest.mark.parametrize(
    ("settings", "fix"),
    [({"optim.global_batch_sequences": 4}, "; use 8"), ({"model.num_query_heads": 1}, "; use 2 query heads")],
)
def test_a_number_below_the_first_multiple_is_answered_with_one_number(changed, settings, fix):
    with pytest.raises(ConfigError) as caught:
        validate.validate(changed(settings))
    assert str(caught.value).endswith(fix)


def test_every_rule_has_a_test():
    assert {rule.__name__ for rule in validate.RULES} == {rule for rule, *_ in BROKEN}


def test_the_demo_breaks_no_rule(demo):
    validate.validate(demo)


@pytest.mark.parametrize(
    "settings",
    [
        {"attention.kind": AttentionKind.dense, "attention.local_tokens": 8},
        {"attention.kind": AttentionKind.dense, "model.num_query_heads": 34},
        {"attention.impl": KernelImpl.triton, "cluster.device": Device.cuda},
        {"attention.init_tokens": 0},
        {
            "attention.impl": KernelImpl.triton,
            "attention.selector": Selector.max_norm,
            "cluster.device": Device.cuda,
        },
        {"attention.selector": Selector.mean_pool, "attention.mean_weight_frac": 1.0},
        {"attention.dense_layers": [1, 3]},
        {"attention.topk_schedule": TopkSchedule.random_layer, "attention.topk_choices": [1, 4]},
        {"model.num_query_heads": 32},  # R = 16, the largest group
        {"attention.group_score": GroupScore.raw_sum},
        {"optim.schedule": LrSchedule.cosine, "optim.decay_steps": 0},
        {"data.sources.chinese.weight": 0.0},
    ],
)
def test_settings_next_to_a_rule_are_allowed(changed, settings):
    validate.validate(changed(settings))


def test_all_broken_rules_are_reported_together(changed):
    config = changed({"attention.init_tokens": 24, "optim.min_lr": 1.0, "run.name": "a b"})
    with pytest.raises(ConfigError) as caught:
        validate.validate(config)
    assert len(str(caught.value).splitlines()) == 3


def _is_number(field: keys.Field) -> bool:
    return field.plain_type in (int, float)


NUMBERS = [key for key, field in keys.fields().items() if _is_number(field)]


def test_every_number_of_the_schema_has_a_range_or_a_rule():
    assert set(NUMBERS) == set(RANGES) | EXPLAINED_ELSEWHERE


@pytest.mark.parametrize("pattern", sorted(RANGES))
def test_a_number_out_of_range_is_refused_with_its_range(changed, pattern):
    key, allowed = pattern.replace("*", "english"), RANGES[pattern]
    wrong = allowed.low if allowed.above else allowed.low - 1
    with pytest.raises(ConfigError) as caught:
        validate.validate(changed({key: wrong}))
    assert str(caught.value).startswith(f"{key}={wrong}: it must be {allowed};")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_and_infinity_are_refused(changed, value):
    with pytest.raises(ConfigError, match=r"optim\.lr="):
        validate.validate(changed({"optim.lr": value}))


def test_ranges_know_their_borders():
    assert Range(0, 1, below=True).holds(0)
    assert not Range(0, 1, below=True).holds(1)
    assert not Range(0, above=True).holds(0)
    assert str(Range(0, 1)) == "at least 0 and at most 1"


def test_each_source_is_checked_under_its_own_name(changed):
    source = SourceConfig(weight=-1.0, domain="d", train_prefix="p")
    sources = dataclasses.replace(changed({}).data, sources={"mine": source, "other": source}).sources
    with pytest.raises(ConfigError) as caught:
        validate.validate(changed({"data.sources": sources}))
    assert "data.sources.mine.weight=-1.0" in str(caught.value)
    assert "data.sources.other.weight=-1.0" in str(caught.value)
