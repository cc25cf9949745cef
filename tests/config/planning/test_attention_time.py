import importlib.util
import json
from pathlib import Path

import pytest

from phsa_megatron.config.errors import ConfigError
from phsa_megatron.config.memory import kernel_workspace_bytes
from phsa_megatron.config.planning.attention_time import TABLE_FILE, Curve, attention_time, table
from phsa_megatron.config.schema import AttentionKind, GroupScore, KernelImpl, Selector

BENCHMARKS = Path(__file__).resolve().parents[3] / "kernels" / "benchmarks"
ROWS = json.loads((BENCHMARKS / "results" / "h100.json").read_text())
spec = importlib.util.spec_from_file_location("plan_table", BENCHMARKS / "plan_table.py")
plan_table = importlib.util.module_from_spec(spec)
spec.loader.exec_module(plan_table)
MEASURED = [row for row in ROWS if plan_table.is_planned(row)]
ONE_GPU = {"parallel__tensor_size": 1, "parallel__sequence_parallel": False}


def _row(large, row, **changes):
    return large(
        **ONE_GPU,
        model__num_query_heads=row["heads_q"],
        attention__train_topk=row["topk"],
        data__seq_len_tokens=row["seq_len_tokens"],
        **changes,
    )


def test_the_packaged_table_is_the_one_that_the_results_give():
    assert plan_table.TABLE == TABLE_FILE
    fresh = plan_table.text(plan_table.plan_table(ROWS))
    assert TABLE_FILE.read_text() == fresh, "run python kernels/benchmarks/plan_table.py"
    # Every module row with a trained model's overlap is in it, and every dense one once.
    assert sum(len(curve.ms) for curve in table().phsa.values()) == len(MEASURED)
    assert sum(len(curve.ms) for curve in table().dense.values()) == 2 * 2 * 7


@pytest.mark.parametrize("heads", [16, 32])
def test_measured_points_are_returned_as_they_are(large, heads):
    modules = [row for row in MEASURED if row["stage"] == "module" and row["heads_q"] == heads]
    assert len(modules) == 7 * 5 * 2
    for row in modules:
        time = attention_time(_row(large, row))
        ms = time.forward_ms + (time.backward_ms if row["pass"] == "fwd_bwd" else 0)
        assert ms == pytest.approx(row["ours_ms"], rel=1e-9)
        dense = attention_time(_row(large, row, attention__kind=AttentionKind.dense))
        ms = dense.forward_ms + (dense.backward_ms if row["pass"] == "fwd_bwd" else 0)
        assert ms == pytest.approx(row["cudnn_ms"], rel=1e-9)
        assert time.notes == dense.notes == ()


def test_a_left_out_length_is_interpolated_to_within_a_seventh():
    """What interpolation is worth: every inner measured point against the curve through its neighbours, which
    are farther apart than those that the plan reads between. docs/plan.md quotes it."""
    errors = []
    for curve in (*table().phsa.values(), *table().dense.values()):
        for i in range(1, len(curve.lengths) - 1):
            without = Curve(curve.lengths[:i] + curve.lengths[i + 1 :], curve.ms[:i] + curve.ms[i + 1 :])
            errors.append(without.at(curve.lengths[i], 1.0) / curve.ms[i] - 1)
    errors.sort(key=abs)
    assert len(errors) == 200
    assert abs(errors[100]) < 0.06
    assert abs(errors[-1]) < 0.15


def test_a_length_beyond_the_rows_grows_as_stated_and_says_so(large):
    row = {"heads_q": 32, "topk": 2, "seq_len_tokens": 262144}
    at, beyond = (attention_time(_row(large, row | {"seq_len_tokens": n})) for n in (262144, 1048576))
    assert beyond.select_ms == pytest.approx(16 * at.select_ms)
    assert beyond.forward_ms - beyond.select_ms == pytest.approx(4 * (at.forward_ms - at.select_ms), rel=1e-3)
    assert beyond.backward_ms == pytest.approx(4 * at.backward_ms, rel=1e-3)
    assert any("beyond the longest row" in note for note in beyond.notes)
    dense = [
        attention_time(_row(large, row | {"seq_len_tokens": n}, attention__kind=AttentionKind.dense))
        for n in (262144, 1048576)
    ]
    assert dense[1].forward_ms == pytest.approx(16 * dense[0].forward_ms)
    short = attention_time(_row(large, row | {"seq_len_tokens": 2048}, attention__kind=AttentionKind.dense))
    shortest = attention_time(
        _row(large, row | {"seq_len_tokens": 4096}, attention__kind=AttentionKind.dense)
    )
    assert short.forward_ms == pytest.approx(shortest.forward_ms / 2)


def test_a_process_takes_its_part_of_heads_and_queries(large):
    one = attention_time(large(**ONE_GPU))
    part = attention_time(large(parallel__tensor_size=2, parallel__context_size=4))
    assert part.forward_ms == pytest.approx(one.forward_ms / 8)
    assert part.backward_ms == pytest.approx(one.backward_ms / 8)
    rows = attention_time(large(**ONE_GPU, optim__micro_batch_sequences=3))
    assert rows.select_ms == pytest.approx(3 * one.select_ms)


@pytest.mark.parametrize("topk", [2, 16])
def test_sequences_of_a_micro_batch_are_one_launch(large, topk):
    """Eight of 4k fill a GPU that one leaves idle: no slower than one by one, nor than one of 32k, whose
    attention has more pairs; by the rows alone."""

    def at(length, count=1, **changes):
        row = {"heads_q": 16, "topk": topk, "seq_len_tokens": length}
        changes |= {"optim__micro_batch_sequences": count, "optim__global_batch_sequences": 1024}
        return attention_time(_row(large, row, **changes))

    one, eight, long = at(4096), at(4096, 8), at(32768)
    assert eight.select_ms == pytest.approx(8 * one.select_ms) and eight.select_ms < long.select_ms
    # 4,096 queries see 640 + 16 k tokens, less what the first ones have before them.
    seen = 640 + 16 * topk
    fewer = 8 * (4096 - seen / 2) / (32768 - seen / 2)
    rest = long.forward_ms - long.select_ms
    assert eight.forward_ms - eight.select_ms == pytest.approx(fewer * rest, rel=0.01)
    assert eight.backward_ms == pytest.approx(fewer * long.backward_ms, rel=0.01)
    assert eight.forward_ms + eight.backward_ms < 0.9 * 8 * (one.forward_ms + one.backward_ms)
    # Where one sequence fills the GPU, one by one is the smaller bound of the backward pass.
    assert at(32768, 4).backward_ms == pytest.approx(4 * long.backward_ms)
    dense = (at(4096, n, attention__kind=AttentionKind.dense).forward_ms for n in (1, 8))
    assert next(dense) * 8 == pytest.approx(next(dense))


def test_k_between_the_rows_lies_between_them(large):
    times = [attention_time(large(attention__train_topk=k)).forward_ms for k in (8, 12, 16, 24)]
    assert times == sorted(times)
    assert times[1] == pytest.approx((times[0] + times[2]) / 2)
    assert any("k = 24" in note for note in attention_time(large(attention__train_topk=24)).notes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model__num_query_heads": 64}, "R = 8 has no rows"),
        ({"model__head_dim": 64}, "head dim 64"),
        ({"attention__group_score": GroupScore.raw_sum}, "raw_sum has no rows"),
        ({"attention__local_tokens": 1024}, "by attended pairs"),
        ({"attention__local_tokens": 128}, "an upper bound"),
        ({"attention__block_tokens": 32}, "blocks of 32"),
        ({"attention__dense_len_tokens": 32768}, "dense_len_tokens"),
        ({"attention__selector": Selector.halves}, "twice the selection"),
        ({"attention__selector": Selector.minmax}, "chooses eagerly"),
    ],
)
def test_what_the_rows_do_not_cover_is_said(large, changes, words):
    assert attention_time(large()).notes == ()
    assert any(words in note for note in attention_time(large(**changes)).notes)


def test_two_vectors_a_block_take_twice_the_selection(large):
    one, two = (attention_time(large(attention__selector=s)) for s in (Selector.phsa, Selector.halves))
    assert two.select_ms == pytest.approx(2 * one.select_ms)
    assert two.forward_ms - one.forward_ms == pytest.approx(one.select_ms)
    assert two.backward_ms == one.backward_ms


def test_the_reference_has_no_times(large):
    with pytest.raises(ConfigError, match="set attention.impl=triton"):
        attention_time(large(attention__impl=KernelImpl.reference))


def test_another_kind_of_attention_has_no_times(large):
    with pytest.raises(ConfigError, match="attention.kind=window: only phsa and dense"):
        attention_time(large(attention__kind="window"))


@pytest.mark.parametrize("row", [r for r in MEASURED if r["stage"] == "module" and r["pass"] == "fwd_bwd"])
def test_kernel_workspace_is_what_was_measured(large, row):
    """Within a twentieth or half a MiB, the rows' own rounding; dense without its results, which are q, k, v
    gradients, the output and its log-sum-exp."""
    measured = row["beyond_results_mib"]
    fitted = kernel_workspace_bytes(_row(large, row)) / 2**20
    assert fitted == pytest.approx(measured, rel=0.05, abs=0.5)
    tokens, heads = row["seq_len_tokens"], row["heads_q"]
    results = tokens * (2 * heads * 256 + 2 * 8 * 256 + 4 * heads) / 2**20
    dense = kernel_workspace_bytes(_row(large, row, attention__kind=AttentionKind.dense)) / 2**20
    assert dense == pytest.approx(row["cudnn_peak_extra_mib"] - results, rel=0.01, abs=0.5)


@pytest.mark.parametrize("document_tokens", [8192, 4096, 1024])
def test_dense_attention_over_packed_documents_takes_the_pairs_inside_them(large, document_tokens):
    """From the shortest row on as many documents as there are, below it by pairs; slower than cuDNN's."""
    config = large(**ONE_GPU, data__seq_len_tokens=32768, attention__kind=AttentionKind.dense)
    row = max(document_tokens, 4096)
    one = attention_time(large(**ONE_GPU, data__seq_len_tokens=row, attention__kind=AttentionKind.dense))
    packed = attention_time(config, document_tokens, 1.5)
    times = 1.5 * 32768 / row * document_tokens / row
    assert packed.forward_ms == pytest.approx(times * one.forward_ms)
    assert packed.backward_ms == pytest.approx(times * one.backward_ms)
    phsa = large(**ONE_GPU, data__seq_len_tokens=32768)
    assert attention_time(phsa, document_tokens, 1.5) == attention_time(phsa)
