import pytest

from phsa_megatron.config import keys
from phsa_megatron.config.errors import ConfigError
from phsa_megatron.config.resume_rules import RULES, check_new_stage, diff
from phsa_megatron.config.schema import AttentionKind, SourceConfig


def test_every_setting_has_a_rule_and_no_rule_is_left_over():
    assert set(RULES) == set(keys.fields())


def test_equal_configurations_differ_in_nothing(demo, changed):
    assert diff(demo, changed({})).changes == ()


@pytest.mark.parametrize(
    ("settings", "consequence"),
    [
        ({"model.num_layers": 5}, "another shape"),
        ({"model.rope_base": 5e5}, "another function"),
        ({"attention.kind": AttentionKind.dense}, "run.init_from"),
        ({"attention.train_topk": 4}, "two attentions"),
        ({"data.seq_len_tokens": 256}, "order of the data"),
        ({"run.seed": 5}, "repeated or left out"),
        ({"data.sources.english.weight": 2.0}, "order of the data"),
        ({"data.tokenizer_file": "other.json"}, "token ids"),
        ({"parallel.distributed_optimizer": False}, "optimizer state"),
        ({"run.init_from": "runs/x"}, "not used"),
    ],
)
def test_changes_that_break_a_run_are_refused_with_the_consequence(demo, changed, settings, consequence):
    changes = diff(demo, changed(settings))
    (key, value) = next(iter(settings.items()))
    assert [c.key for c in changes.refused] == [key]
    with pytest.raises(ConfigError) as caught:
        changes.require_resumable("runs/demo")
    message = str(caught.value)
    assert f"{key}: " in message
    assert f"-> {value}" in message
    assert consequence in message
    assert "runs/demo" in message


@pytest.mark.parametrize(
    "settings",
    [
        {"run.train_steps": 800},
        {"optim.global_batch_sequences": 16},
        {"optim.lr": 1e-4},
        {"parallel.tensor_size": 2, "cluster.processes_per_node": 2},
        {"monitoring.log_every_steps": 10},
        {"checkpoint.keep_last": 5},
        {"attention.infer_topk": 8},
        {"data.sources.english.valid_prefix": "other"},
    ],
)
def test_changes_that_a_run_survives_are_listed(demo, changed, settings):
    changes = diff(demo, changed(settings))
    assert {c.key for c in changes.changes} == set(settings)
    changes.require_resumable("runs/demo")
    for key, value in settings.items():
        assert f"{key}: " in changes.table()
        assert f"-> {value}  [allowed: " in changes.table()


def test_a_source_that_comes_or_goes_is_refused(demo, changed):
    more = changed({"data.sources.third": SourceConfig(1.0, "d", "p")})
    for changes in (diff(demo, more), diff(more, demo)):
        assert {c.key for c in changes.refused} >= {"data.sources.third.weight", "data.sources.third.domain"}
        assert "(absent)" in changes.table()


def test_a_new_stage_may_change_all_but_shapes(demo, changed):
    settings = {
        "attention.kind": AttentionKind.dense,
        "data.seq_len_tokens": 1024,
        "run.seed": 9,
        "model.rope_base": 5e6,
    }
    check_new_stage(demo, changed(settings))
    with pytest.raises(ConfigError, match="model.hidden_size: 192 -> 256"):
        check_new_stage(demo, changed({"model.hidden_size": 256}))
