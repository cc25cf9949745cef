import dataclasses
import re

import pytest

from phsa_megatron.config import keys
from phsa_megatron.config.dependents import dependents
from phsa_megatron.config.derive import derive
from phsa_megatron.config.schema import AttentionKind, Dtype, LrSchedule, Recompute


def test_values_of_the_demo_by_hand(demo):
    d = derive(demo)
    assert (d.world_size, d.data_parallel_size, d.group_heads, d.layers_per_chunk) == (1, 1, 3, 4)
    assert d.tokens_per_step == 8 * 512
    assert d.total_tokens == 400 * 8 * 512
    assert d.micro_batches_per_step == 1
    assert d.warmup_sequences == 40 * 8
    assert d.decay_sequences == 100 * 8
    assert d.max_documents_per_sequence == 32
    per_layer = 192 * (192 + 64 + 64 + 192) + 3 * 192 * 512 + 2 * 192 + 2 * 32
    assert d.parameters.per_layer == per_layer
    assert d.parameters.total == 4 * per_layer + 192 + 8192 * 192
    assert d.flops_per_token_selected < d.flops_per_token_dense


def test_layout_of_many_processes(changed):
    d = derive(
        changed(
            {
                "cluster.num_nodes": 2,
                "cluster.processes_per_node": 8,
                "parallel.tensor_size": 2,
                "parallel.pipeline_size": 2,
                "parallel.virtual_pipeline_size": 2,
                "optim.global_batch_sequences": 64,
                "optim.micro_batch_sequences": 2,
            }
        )
    )
    assert (d.world_size, d.data_parallel_size, d.micro_batches_per_step, d.layers_per_chunk) == (16, 4, 8, 1)
    assert d.padded_vocab_size == 8192


def test_cosine_decays_over_all_steps_after_the_warm_up(changed):
    d = derive(changed({"optim.schedule": LrSchedule.cosine, "optim.decay_steps": 0}))
    assert d.warmup_sequences + d.decay_sequences == d.total_sequences


def test_inference_uses_train_topk_unless_told_otherwise(changed):
    assert derive(changed({})).topk_inference == 2
    assert derive(changed({"attention.infer_topk": 5})).topk_inference == 5
    assert derive(changed({"attention.kind": AttentionKind.dense})).topk_inference == 0


def test_memory_follows_dtype_sharding_and_recomputation(changed):
    base = derive(changed({})).memory
    assert base.weights_gib == base.grads_gib == base.optimizer_gib / 2
    bf16 = derive(changed({"run.dtype": Dtype.bf16})).memory
    assert bf16.weights_gib == base.weights_gib / 2
    assert bf16.optimizer_gib == base.optimizer_gib * 1.5
    many = {"cluster.processes_per_node": 4, "optim.micro_batch_sequences": 2}
    assert derive(changed(many)).memory.optimizer_gib == base.optimizer_gib / 4
    kept = derive(changed({**many, "parallel.distributed_optimizer": False})).memory
    assert kept.optimizer_gib == base.optimizer_gib
    full = derive(changed({"parallel.recompute": Recompute.full})).memory
    selective = derive(changed({"parallel.recompute": Recompute.selective})).memory
    assert full.activations_gib < selective.activations_gib < base.activations_gib
    parts = dataclasses.astuple(base)
    assert base.total_gib == parts[6] == pytest.approx(sum(parts[:6]))


def test_equations_hold_when_their_left_sides_are_computed(demo):
    lines = derive(demo).equations()
    assert "tokens per step = 8 sequences x 512 tokens = 4,096" in lines
    computed = 0
    for line in lines:
        sides = line.split(" = ")
        if len(sides) != 3 or "=" in sides[2] or "rounded" in line:
            continue
        value = re.match(r"[\d,.]+$", sides[2].split(" ")[0])
        expression = re.sub(r"(?<=\d),(?=\d)", "", re.sub(r"\b(?!x\b)[a-z_-]*[a-z]\b", "", sides[1]))
        expression = re.sub(r"\s+", " ", expression).replace(" x ", " * ")
        if value is None or not re.fullmatch(r"[\d\s.*+/()-]+", expression):
            continue
        # Memory is printed to two digits, so its sum may be off by half of the last one for each term.
        slack = 0.03 if line.startswith("memory") else 0
        assert eval(expression) == pytest.approx(float(value.group().replace(",", "")), abs=slack or None), (
            line
        )
        computed += 1
    assert computed >= 10


def test_memory_that_does_not_fit_is_said(changed):
    fits = derive(changed({"cluster.memory_gib": 80.0})).equations()[-1]
    too_big = derive(changed({"cluster.memory_gib": 0.01})).equations()[-1]
    assert fits.endswith("GiB of 80 GiB")
    assert too_big.endswith("of 0.01 GiB: MORE THAN THERE IS")


def test_every_derived_value_is_printed_or_part_of_a_printed_one(demo):
    text = "\n".join(derive(demo).equations())
    d = derive(demo)
    for name in ("world_size", "tokens_per_step", "total_tokens", "warmup_sequences", "padded_vocab_size"):
        assert f"= {getattr(d, name):,}" in text
    assert f"= {d.parameters.total:,}" in text
    assert f"{d.flops_per_token_dense:.4g}" in text
    assert f"{d.flops_per_token_selected:.4g}" in text


@pytest.mark.parametrize(
    ("key", "names"),
    [
        ("optim.global_batch_sequences", {"tokens_per_step", "total_tokens", "micro_batches_per_step"}),
        ("data.seq_len_tokens", {"tokens_per_step", "flops_per_token_dense", "max_documents_per_sequence"}),
        ("attention.train_topk", {"flops_per_token_selected", "sparsity_mean_frac", "topk_inference"}),
        ("model.num_kv_heads", {"group_heads", "parameters.per_layer", "parameters.total"}),
        ("model.tie_embeddings", {"parameters.output_layer", "parameters.total"}),
        ("parallel.tensor_size", {"data_parallel_size", "memory.weights_gib"}),
        ("attention.group_score", {"flops_per_token_selected"}),
    ],
)
def test_dependents_are_found(demo, key, names):
    assert names <= set(dependents(demo, key))


def test_dependents_do_not_name_what_does_not_depend(demo, changed):
    for key in ("optim.lr", "run.name", "run.sample_prompts", "checkpoint.keep_last"):
        assert dependents(demo, key) == {}
    assert "parameters.total" not in dependents(demo, "attention.train_topk")
    dense = changed({"attention.kind": AttentionKind.dense})
    assert dependents(dense, "attention.train_topk") == {}


def test_every_setting_can_be_asked_for_dependents(demo):
    demo.cluster.environment, demo.cluster.sbatch = {"english": "1"}, {"english": 1}
    moved = {key for key in keys.fields() if dependents(demo, key.replace("*", "english"))}
    assert {"run.train_steps", "cluster.num_nodes", "parallel.recompute", "run.dtype"} <= moved
