from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from phsa_megatron.config.derive import derive
from phsa_megatron.config.planning.machine import Kind, Machine
from phsa_megatron.config.planning.run_to_plan import run_to_plan
from phsa_megatron.config.planning.search import Estimator, Layout, broken_rule
from phsa_megatron.config.schema import Recompute

BASE = run_to_plan(["recipe=phsa_8b_pretrain_8gpu_h100_bf16_32k", "optim.global_batch_sequences=256"])
SIZES = st.sampled_from([1, 2, 4, 8])
LAYOUTS = st.builds(
    Layout,
    tensor_size=SIZES,
    pipeline_size=st.sampled_from([1, 2, 4]),
    virtual_pipeline_size=st.sampled_from([None, 3, 9]),
    context_size=SIZES,
    micro_batch_sequences=st.sampled_from([1, 2, 4]),
    recompute=st.sampled_from(list(Recompute)),
).filter(lambda layout: layout.virtual_pipeline_size is None or layout.pipeline_size > 1)


def on(nodes: int, layout: Layout):
    return layout.apply(replace(BASE, cluster=replace(BASE.cluster, num_nodes=nodes)))


def estimate(config, **machine: float):
    return Estimator(config, Machine.of(config, **machine)).estimate(config)


def test_parts_add_up_and_shares_are_those_of_the_step():
    time = estimate(on(8, Layout(2, 2, None, 2, 1, Recompute.full))).time
    parts = {name: value for name, value in vars(time).items() if name != "step_s"}
    assert sum(parts.values()) == pytest.approx(time.step_s)
    assert min(parts.values()) >= 0
    assert sum(time.shares().values()) == pytest.approx(1)


def test_products_take_the_flops_of_the_weights_at_the_stated_speed():
    config = on(1, Layout(1, 1, None, 1, 1, Recompute.none))
    machine = Machine.of(config, product_frac=1.0)
    weights = derive(config).parameters.active_in_products
    seconds = 6 * weights * 32768 * 256 / 8 / 798e12
    assert Estimator(config, machine).estimate(config).time.products_s == pytest.approx(seconds)


def test_the_bubble_is_that_of_the_schedule():
    """PP 4 with 8 micro-batches: 3 of 8 more; with 3 virtual stages a third of it."""
    for virtual, extra in ((None, 3 / 8), (3, 1 / 8)):
        config = on(16, Layout(1, 4, virtual, 1, 1, Recompute.none))
        assert derive(config).micro_batches_per_step == 8
        time = estimate(config).time
        working = time.step_s - time.bubble_s - time.data_s - time.optimizer_s
        assert time.bubble_s == pytest.approx(extra * working)


def test_full_recomputation_costs_a_forward_pass_of_the_layers():
    none, selective, mlp, full = (estimate(on(1, Layout(1, 1, None, 1, 1, mode))).time for mode in Recompute)
    assert none.recompute_s == 0 < selective.recompute_s < full.recompute_s
    assert 0 < mlp.recompute_s < full.recompute_s - selective.recompute_s
    # Of a layer: a third of its products and elementwise passes, and all of the forward attention.
    assert full.recompute_s > selective.recompute_s + none.elementwise_s / 4


def test_a_given_input_replaces_the_assumed_one_and_says_so():
    machine = Machine.of(BASE, network_gb_s=12.0)
    assert machine.inputs()["network_gb_s"].source == "given"
    assert machine.inputs()["network_gb_s"].value == 12.0
    kinds = {name: value.kind for name, value in Machine.of(BASE).inputs().items()}
    assert kinds["attention_rows"] == kinds["copy_gb_s"] == kinds["product_tflops"] == Kind.measured
    assert kinds["nvlink_gb_s"] == kinds["network_gb_s"] == kinds["product_frac"] == Kind.assumed
    other = replace(BASE, cluster=replace(BASE.cluster, peak_tflops=494.5))
    assert Machine.of(other).product_tflops.kind == Kind.assumed
    assert Machine.of(other).product_tflops.value == 399.0


def test_groups_over_hosts_share_their_adapters():
    machine = Machine.of(BASE)
    assert machine.bytes_per_s(8, 1) == 350e9
    assert machine.bytes_per_s(16, 1) == min(350e9, 8 * 40e9)
    assert machine.bytes_per_s(16, 2) == 4 * 40e9
    assert machine.bytes_per_s(2, 8) == 40e9
    assert machine.latency_s(2, 8) == pytest.approx(30e-6)
    assert machine.latency_s(4, 1) == pytest.approx(2 * 15e-6)


@settings(max_examples=60, deadline=None)
@given(layout=LAYOUTS, nodes=st.sampled_from([8, 16, 32]))
def test_memory_never_grows_with_more_copies(layout, nodes):
    fewer, more = on(nodes, layout), on(2 * nodes, layout)
    assume(not broken_rule(fewer) and not broken_rule(more))
    one, two = estimate(fewer), estimate(more)
    assert two.data_size == 2 * one.data_size
    assert two.memory.total_gib <= one.memory.total_gib
    # More GPUs are never slower at the same batch, unless communication between copies takes it all.
    assert two.time.step_s <= one.time.step_s + two.time.data_s


@settings(max_examples=60, deadline=None)
@given(
    layout=LAYOUTS,
    name=st.sampled_from(["nvlink_gb_s", "network_gb_s", "product_frac"]),
    factor=st.floats(1.0, 4.0),
)
def test_a_faster_machine_is_never_slower(layout, name, factor):
    config = on(16, layout)
    assume(not broken_rule(config))
    slow = {"nvlink_gb_s": 200.0, "network_gb_s": 20.0, "product_frac": 0.2}[name]
    one, two = (estimate(config, **{name: value}) for value in (slow, slow * factor))
    assert two.time.step_s <= one.time.step_s * (1 + 1e-12)


@settings(max_examples=60, deadline=None)
@given(layout=LAYOUTS)
def test_a_larger_batch_is_never_less_efficient(layout):
    config = on(16, layout)
    larger = replace(config, optim=replace(config.optim, global_batch_sequences=512))
    assume(not broken_rule(config))
    assert estimate(larger).tokens_per_s >= estimate(config).tokens_per_s * (1 - 1e-12)


@settings(max_examples=60, deadline=None)
@given(layout=LAYOUTS)
def test_recomputation_trades_activations_for_time(layout):
    assume(not broken_rule(on(16, layout)))
    found = {mode: estimate(on(16, replace(layout, recompute=mode))) for mode in Recompute}
    kept = {mode: one.memory.activations_gib + one.memory.gathered_kv_gib for mode, one in found.items()}
    for some in (Recompute.selective, Recompute.mlp):
        none, full = Recompute.none, Recompute.full
        assert found[none].time.step_s <= found[some].time.step_s <= found[full].time.step_s
        assert kept[full] < kept[some] <= kept[none]
