import dataclasses
import math

import pytest

from phsa_megatron.config import keys, validate
from phsa_megatron.config.errors import ConfigError
from phsa_megatron.config.ranges import EXPLAINED_ELSEWHERE, RANGES, Range
from phsa_megatron.config.schema import (
    AttentionKind,
    Device,
    GroupScore,
    KernelImpl,
    LrSchedule,
    Scheduler,
    SourceConfig,
)

SLURM: dict[str, object] = {"cluster.scheduler": Scheduler.slurm}

# rule -> settings that break it and nothing else, and what its message must say: field and value, rule, fix.
BROKEN = [
    ("_run_name", {"run.name": "a/b"}, ["run.name='a/b'", "names a folder", "choose another"]),
    ("_run_name", {"run.name": ""}, ["run.name=''", "names a folder"]),
    ("_topk", {"attention.train_topk": 0}, ["attention.train_topk=0", "attention.kind=dense"]),
    ("_topk", {"attention.infer_topk": 0}, ["attention.infer_topk=0", "at least one block"]),
    ("_heads_divide", {"model.num_query_heads": 7}, ["num_query_heads=7", "num_kv_heads=2", "use 6 or 8"]),
    ("_head_group", {"model.num_query_heads": 34}, ["num_kv_heads=2", "groups of 17", "at least 3"]),
    ("_head_dim_even", {"model.head_dim": 33}, ["model.head_dim=33", "pairs", "even number"]),
    ("_windows", {"attention.init_tokens": 24}, ["attention.init_tokens=24", "block_tokens=16", "16 or 32"]),
    ("_windows", {"attention.local_tokens": 72}, ["attention.local_tokens=72", "64 or 80"]),
    ("_windows", {"attention.local_tokens": 8}, ["local_tokens=8", "current block", "at least 16"]),
    (
        "_sequence_and_block",
        {"data.seq_len_tokens": 8},
        ["seq_len_tokens=8", "block_tokens=16", "at least 16"],
    ),
    (
        "_max_documents",
        {"data.max_documents_per_sequence": 513},
        ["max_documents_per_sequence=513", "seq_len_tokens=512", "use at most 512"],
    ),
    ("_sources", {"data.sources": {}, "evaluate.every_steps": 0}, ["data.sources=0 sources", "data=NAME"]),
    (
        "_sources",
        {"data.sources.english.weight": 0.0, "data.sources.chinese.weight": 0.0},
        ["positive weight"],
    ),
    (
        "_validation_text",
        {"data.sources.english.valid_prefix": None, "data.sources.chinese.valid_prefix": None},
        ["evaluate.every_steps=100", "valid_prefix", "evaluate.every_steps=0"],
    ),
    (
        "_context_parallel",
        {"parallel.context_size": 2, "cluster.processes_per_node": 2, "data.seq_len_tokens": 520},
        ["data.seq_len_tokens=520", "2 x 2 x attention.block_tokens=16 = 64", "use 512 or 576"],
    ),
    (
        "_context_parallel",
        {
            "parallel.context_size": 4,
            "cluster.processes_per_node": 4,
            "attention.kind": AttentionKind.dense,
            "data.seq_len_tokens": 516,
        },
        ["data.seq_len_tokens=516", "multiple of 2 x 4 = 8", "use 512 or 520"],
    ),
    (
        "_context_parallel",
        {"parallel.context_size": 2, "cluster.processes_per_node": 2, "model.mtp_num_layers": 1},
        ["model.mtp_num_layers=1", "not verified with parallel.context_size=2", "set model.mtp_num_layers=0"],
    ),
    (
        "_processes_divide",
        {"parallel.tensor_size": 2, "cluster.processes_per_node": 3},
        ["processes_per_node=3", "2 tensor x 1 pipeline x 1 context = 2", "a multiple of 2"],
    ),
    (
        "_batch_divides",
        {"optim.micro_batch_sequences": 3},
        ["global_batch_sequences=8", "micro_batch_sequences=3 x 1", "use 6 or 9"],
    ),
    (
        "_layers_divide",
        {"parallel.pipeline_size": 3, "cluster.processes_per_node": 3},
        ["model.num_layers=4", "pipeline_size=3", "change the pipeline sizes"],
    ),
    (
        "_virtual_pipeline",
        {"parallel.virtual_pipeline_size": 2},
        ["virtual_pipeline_size=2", "pipeline_size of at least 2", "virtual_pipeline_size=null"],
    ),
    (
        "_virtual_pipeline",
        {
            "parallel.virtual_pipeline_size": 2,
            "parallel.pipeline_size": 2,
            "cluster.processes_per_node": 2,
        },
        ["groups of pipeline_size=2", "a step has 1", "a multiple of 16"],
    ),
    (
        "_tensor_parallel",
        {"parallel.tensor_size": 4, "cluster.processes_per_node": 4},
        ["model.num_kv_heads=2", "tensor_size=4", "divides 2"],
    ),
    (
        "_sequence_parallel",
        {"parallel.sequence_parallel": True},
        ["sequence_parallel=True", "tensor_size is 1", "sequence_parallel=false"],
    ),
    (
        "_sequence_parallel",
        {
            "parallel.sequence_parallel": True,
            "parallel.tensor_size": 2,
            "cluster.processes_per_node": 2,
            "data.seq_len_tokens": 511,
        },
        ["seq_len_tokens=511", "multiple of the tensor size"],
    ),
    (
        "_overlap",
        {
            "parallel.overlap_param_gather": True,
            "parallel.overlap_grad_reduce": True,
            "parallel.distributed_optimizer": False,
        },
        ["overlap_param_gather=True", "distributed_optimizer=true"],
    ),
    ("_overlap", {"parallel.overlap_param_gather": True}, ["overlap_grad_reduce=true"]),
    (
        "_device_and_impl",
        {"attention.impl": KernelImpl.triton},
        ["attention.impl=triton", "cluster.device is cpu", "attention.impl=reference"],
    ),
    (
        "_schedule_lengths",
        {"optim.warmup_steps": 301},
        ["warmup_steps=301", "decay_steps=100", "train_steps=400", "more steps"],
    ),
    (
        "_cosine",
        {"optim.schedule": LrSchedule.cosine},
        ["decay_steps=100", "schedule=cosine", "decay_steps=0"],
    ),
    ("_learning_rates", {"optim.min_lr": 1.0}, ["min_lr=1.0", "optim.lr=0.003", "lower it"]),
    (
        "_slurm_only",
        {"cluster.partition": "h100"},
        ["cluster.partition=h100", "scheduler is local", "cluster="],
    ),
    ("_slurm_only", {"cluster.chain": 2}, ["cluster.chain=2", "only Slurm"]),
    ("_time_limit", SLURM | {"cluster.time_limit": "86400"}, ["time_limit='86400'", "HH:MM:SS", "quotes"]),
    (
        "_time_limit",
        SLURM | {"cluster.time_limit": "00:05:00"},
        ["stop_lead_s=300", "00:05:00, which is 300 s"],
    ),
    (
        "_gpus",
        SLURM | {"cluster.gpus_per_node": 8},
        ["gpus_per_node=8", "device=cpu hides", "set it to null"],
    ),
    (
        "_gpus",
        SLURM
        | {
            "cluster.gpus_per_node": 4,
            "cluster.device": Device.cuda,
            "cluster.processes_per_node": 8,
            "optim.micro_batch_sequences": 1,
        },
        ["gpus_per_node=4", "processes_per_node=8", "ask for 8"],
    ),
    (
        "_sbatch_options",
        SLURM | {"cluster.sbatch": {"nodes": 3}},
        ["sbatch.nodes=3", "set cluster.num_nodes"],
    ),
    ("_sbatch_options", SLURM | {"cluster.sbatch": {"--mem": 3}}, ["sbatch.--mem=3", "without --"]),
    ("_one_line", SLURM | {"cluster.account": "a\nb"}, ["cluster.account='a\\nb'", "on one line"]),
    ("_environment", {"cluster.environment": {"A-B": "1"}}, ["cluster.environment.A-B='1'", "letters"]),
    ("_environment", {"cluster.environment": {"RANK": "1"}}, ["cluster.environment.RANK='1'", "its own"]),
    (
        "_containers",
        SLURM | {"cluster.container_mounts": ["/a:/a"]},
        ["container_mounts=['/a:/a']", "set cluster.container_image"],
    ),
]


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
