from dataclasses import replace

import pytest

from phsa_megatron.config.compose import compose, options
from phsa_megatron.config.derive import world_size
from phsa_megatron.config.errors import ConfigError
from phsa_megatron.config.planning.machine import Machine
from phsa_megatron.config.planning.reasons import layout_text, reasons
from phsa_megatron.config.planning.run_to_plan import run_to_plan
from phsa_megatron.config.planning.search import Estimator, Layout, layouts, make_plan
from phsa_megatron.config.planning.sweep import best_point, gpu_counts, runs_by_context, runs_by_gpus
from phsa_megatron.config.schema import KernelImpl, Recompute
from phsa_megatron.config.validate import validate

RECIPE = "phsa_8b_pretrain_8gpu_h100_bf16_32k"


@pytest.fixture(scope="module")
def plan():
    config = run_to_plan([f"recipe={RECIPE}"])
    return make_plan(config, Machine.of(config))


@pytest.mark.parametrize("recipe", [name for name in options()["recipe"] if "pretrain" in name])
def test_every_recipe_fits_its_gpus_as_written(recipe):
    config = run_to_plan([f"recipe={recipe}"])
    machine = Machine.of(config)
    assert machine.memory_gib == 80
    estimate = Estimator(config, machine).estimate(config)
    assert estimate.fits, f"{recipe} needs {estimate.over_gib:.1f} GiB more than there is"


def test_every_listed_layout_keeps_the_rules_and_uses_all_gpus(plan):
    assert len(plan.fitting) > 50
    for estimate in plan.fitting[::10]:
        config = estimate.layout.apply(plan.config)
        validate(config)
        sizes = estimate.layout
        assert (
            sizes.tensor_size * sizes.pipeline_size * sizes.context_size * estimate.data_size
            == world_size(config)
        )


def test_layouts_that_break_a_rule_are_counted_with_its_message(plan):
    count, message = plan.refused["model.num_layers"]
    tried = [layout.apply(plan.config) for layout in layouts(plan.config, plan.machine)]
    broken = 0
    for config in tried:
        try:
            validate(config)
        except ConfigError as error:
            broken += str(error).startswith("model.num_layers")
    assert count == broken > 0
    assert "layers divide evenly" in message
    assert len(Recompute) * (len(tried) - sum(n for n, _ in plan.refused.values())) == len(plan.by_layout())


def test_the_best_are_the_fastest_that_fit_one_of_each_tp_pp_cp(plan):
    speeds = [estimate.tokens_per_s for estimate in plan.fitting]
    assert speeds == sorted(speeds, reverse=True)
    best = plan.best(4)
    assert best[0] is plan.fitting[0]
    sizes = [(e.layout.tensor_size, e.layout.pipeline_size, e.layout.context_size) for e in best]
    assert len(set(sizes)) == 4
    assert all(e.memory.total_gib <= 75 for e in best)
    assert all(e.over_gib == e.memory.total_gib - 75 > 0 for e in plan.best_too_big(4))


def test_the_settings_of_a_layout_compose_to_it(plan):
    best = plan.fitting[0]
    again = run_to_plan([f"recipe={RECIPE}", *best.layout.settings()])
    assert again == best.layout.apply(plan.config)
    assert Estimator(again, plan.machine).estimate(again) == best


def test_reasons_name_what_a_change_would_do(plan):
    best = plan.fitting[0]
    lines = reasons(best, plan)
    assert f"takes {best.memory.total_gib:.1f} GiB" in lines[0]
    other = next(e for e in plan.too_big if e.layout == replace(best.layout, tensor_size=1))
    faster = other.tokens_per_s / best.tokens_per_s - 1
    assert f"TP 1 instead: {faster:.0%} faster, and {other.over_gib:.1f} GiB more than there is" in lines
    # Nothing that fits is faster than the best.
    assert not any("faster, with" in line for line in lines)
    for slower in plan.best(3)[1:]:
        assert len(reasons(slower, plan)) > 2


def test_less_memory_never_gives_a_faster_layout():
    config = run_to_plan([f"recipe={RECIPE}"])
    speeds = [
        make_plan(config, Machine.of(config, reserve_gib=reserve)).fitting[0].tokens_per_s
        for reserve in (1, 10, 30, 50)
    ]
    assert speeds == sorted(speeds, reverse=True)
    assert speeds[0] > speeds[-1]


def test_a_layout_as_written_that_does_not_fit_is_said():
    config = run_to_plan([f"recipe={RECIPE}", "parallel=data_parallel", "parallel.recompute=none"])
    written = make_plan(config, Machine.of(config)).as_written
    assert not written.fits
    assert written.over_gib > 100


def test_no_layout_at_all_says_which_rules_refuse():
    # Neither heads, layers, chunks of the sequence nor the batch can be cut.
    odd = ["model.num_kv_heads=7", "model.num_query_heads=28", "model.num_layers=35"]
    config = run_to_plan([f"recipe={RECIPE}", *odd, "data.seq_len_tokens=32752"])
    config = replace(config, optim=replace(config.optim, global_batch_sequences=3))
    with pytest.raises(ConfigError, match=r"(?s)no layout of 8 processes.*global_batch_sequences=3"):
        make_plan(config, Machine.of(config))


def test_a_cpu_run_and_the_reference_are_refused():
    config = compose(["recipe=phsa_demo_cpu"]).config
    with pytest.raises(ConfigError, match="cluster=h100_8gpu"):
        Machine.of(config)
    config = run_to_plan([f"recipe={RECIPE}"])
    config = replace(config, attention=replace(config.attention, impl=KernelImpl.reference))
    with pytest.raises(ConfigError, match="attention.impl=triton"):
        make_plan(config, Machine.of(config))
    aligned = run_to_plan([f"recipe={RECIPE}"])
    aligned = replace(aligned, attention=replace(aligned.attention, align_coeff=10.0))
    with pytest.raises(ConfigError, match="attention.align_coeff=10: the plan knows no"):
        make_plan(aligned, Machine.of(aligned))


def test_text_is_filled_in_only_where_nobody_gave_it(paper_overrides):
    empty = run_to_plan([f"recipe={RECIPE}"])
    assert empty.data.sources["dclm"].train_prefix == "not-read-by-the-plan"
    given = run_to_plan([f"recipe={RECIPE}", *paper_overrides])
    assert given.data.sources["dclm"].train_prefix == "prepared/dclm"
    with pytest.raises(ConfigError, match="required values are missing"):
        run_to_plan(["model=qwen3_8b"])


def test_thousands_of_gpus_and_a_million_tokens_are_planned():
    config = run_to_plan(
        [
            f"recipe={RECIPE}",
            "cluster.num_nodes=512",
            "data.seq_len_tokens=1048576",
            "optim.global_batch_sequences=64",
        ]
    )
    best = make_plan(config, Machine.of(config)).fitting[0]
    assert best.layout.context_size > 1 or best.layout.pipeline_size > 1
    assert best.memory.total_gib <= 75


def test_points_of_the_plot():
    config = run_to_plan([f"recipe={RECIPE}"])
    machine = Machine.of(config)
    assert gpu_counts(config, 100) == [8, 16, 32, 64]
    assert [(run.attention.kind, world_size(run)) for run in runs_by_gpus(config, 16)] == [
        ("phsa", 8), ("dense", 8), ("phsa", 16), ("dense", 16),
    ]  # fmt: skip
    lengths = runs_by_context(config)
    assert [run.data.seq_len_tokens for run in lengths[::2]] == [32768 << i for i in range(6)]
    assert {run.data.seq_len_tokens * run.optim.global_batch_sequences for run in lengths} == {32 * 32768}
    point, dense = (best_point(run, machine) for run in lengths[:2])
    plan = make_plan(config, machine)
    assert point.tokens_per_s == plan.fitting[0].tokens_per_s > dense.tokens_per_s
    assert point.gpu_hours_per_billion == pytest.approx(8 / 3600 / point.tokens_per_s * 1e9)
    assert point.layout == layout_text(plan.fitting[0])
    one = replace(config, cluster=replace(config.cluster, processes_per_node=1))
    nothing = best_point(one, machine)
    assert nothing.tokens_per_s is None
    assert "no layout fits" in nothing.layout


def test_layout_text_names_what_is_not_one():
    config = run_to_plan([f"recipe={RECIPE}", "cluster.num_nodes=4"])
    layout = Layout(2, 4, 3, 2, 1, Recompute.selective)
    estimate = Estimator(config, Machine.of(config)).estimate(layout.apply(config))
    assert layout_text(estimate) == "TP2 PP4 CP2 VPP3 DP2, micro-batch 1, recompute selective"
