"""Which settings full-size rows try, what their gates say, how kernels are grouped, and the page."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest

from phsa_megatron.config.schema import AttentionKind, Recompute
from phsa_megatron.data.demo import prepare_demo_sets
from phsa_megatron.evaluation.full_size import page
from phsa_megatron.evaluation.full_size.kernel_times import kind_of, summary
from phsa_megatron.evaluation.full_size.roofline import least_ms
from phsa_megatron.evaluation.full_size.rows import (
    ROWS,
    Setting,
    config_of,
    gates,
    overrides_of,
    recipe_of,
    settings_to_try,
    without,
)
from phsa_megatron.evaluation.full_size.session import Session

ROW = {row.name: row for row in ROWS}


def test_rows_are_the_recipes_with_the_same_tokens_a_step():
    assert len(ROW) == len(ROWS)
    for row in ROWS:
        config = config_of(row, Setting())
        assert config.optim.global_batch_sequences * config.data.seq_len_tokens == 131072
        assert (config.attention.kind == AttentionKind.dense) is (row.topk is None)
        assert row.topk in (None, config.attention.train_topk)
        assert config.data.isolate_documents is row.packed
        assert row.num_timed >= 5
    long, short = (config_of(ROW[name], Setting()).attention for name in ("phsa_k2_128k", "phsa_k2_4k"))
    assert (long.init_tokens, long.local_tokens) == (128, 512)
    assert (short.init_tokens, short.local_tokens) == (16, 128)


def test_what_fits_is_not_recomputed_and_what_does_not_is_recomputed_in_few_layers():
    plain = settings_to_try(ROW["phsa_k2_32k"], 79.0)
    assert plain[0] == Setting() and [s.recompute for s in plain[1:]] == [Recompute.mlp, Recompute.full]
    assert settings_to_try(ROW["dense_4k"], 79.0)[:2] == [Setting(micro_batch=8), Setting(micro_batch=4)]
    long = settings_to_try(ROW["dense_128k"], 79.0)
    assert {s.recompute for s in long} == {Recompute.full}
    layers = [s.recompute_layers for s in long]
    assert 0 < layers[0] < layers[1] < 28 and layers[-1] is None
    fewer = settings_to_try(ROW["dense_128k"], 100.0)[0].recompute_layers
    assert fewer < layers[0]


def test_a_setting_of_the_caller_replaces_the_rows_own():
    given = ("cluster=local_cpu", "data.seq_len_tokens=64")
    settings = overrides_of(ROW["dense_4k"], Setting(), given)
    assert [s for s in settings if s.startswith(("cluster=", "data.seq_len"))] == list(given)
    assert without(["a=1", "b=2"], ("a=3",)) == ["b=2"]


def measured(name, tokens_per_s, mfu=0.3):
    row = ROW[name]
    return {
        "name": name, "attention": row.attention, "seq_len_tokens": row.seq_len_tokens, "topk": row.topk,
        "packed": row.packed, "recompute": "none", "micro_batch": 1, "num_documents": 4, "step_ms": 1000.0,
        "tokens_per_s": tokens_per_s, "mfu_selected_frac": mfu, "dense_equiv_tflops": 400.0,
        "step_time_s": 1.0, "recipe": recipe_of(row), "overrides": overrides_of(row, Setting()),
        "peak_memory_gib": 50.0, "device": "GPU", "versions": {"torch": "2"}, "commit": "c" * 40,
    }  # fmt: skip


def test_what_a_row_recorded_is_given_back_before_the_next_ones_memory_is_measured():
    given_back = []
    parts = SimpleNamespace(
        graph=SimpleNamespace(release=lambda: given_back.append(True)),
        zero_grad=lambda: None,
        named_parameters=lambda: [],
    )
    Session.free(SimpleNamespace(parts=parts, on_gpu=False))
    assert given_back
    parts.graph = None
    Session.free(SimpleNamespace(parts=parts, on_gpu=False))


def test_the_least_times_are_those_of_the_shape():
    """Qwen3-0.6B written out: 28 layers, 1024 hidden, 16/8 heads of 128, 3072 inner, 151,936 tokens."""
    tokens, least = 131072, least_ms(config_of(ROW["dense_32k"], Setting()))
    products = 28 * 1024 * (4096 + 2048 + 3 * 3072) + 151936 * 1024
    assert least["linear layers"] == pytest.approx(6 * products * tokens / 989e9, rel=1e-9)
    pairs = 4 * 32768 * 32769 / 2  # of four documents; scores and outputs, forward and twice that backward
    assert least["attention"] == pytest.approx(28 * 3 * 4 * 128 * 16 * pairs / 989e9, rel=1e-9)
    assert least["norms"] == pytest.approx(
        tokens * 10 * (28 * (2 * 1024 + 24 * 128) + 1024) / 3.35e9, rel=1e-9
    )
    assert least["cross-entropy"] == pytest.approx(tokens * 6 * 151936 / 3.35e9, rel=1e-9)
    sparse = least_ms(config_of(ROW["phsa_k2_32k"], Setting()))
    assert sparse["attention"] < least["attention"] / 10
    assert {k: v for k, v in sparse.items() if k != "attention"} == {
        k: v for k, v in least.items() if k != "attention"
    }


TINY = (
    "cluster=local_cpu", "model=demo_tiny", "data=demo", "data.seq_len_tokens=64",
    "attention.local_tokens=16",
    "run.dtype=fp32", "attention.impl=reference", "compute.elementwise=unfused", "compute.norm=torch",
    "optim.global_batch_sequences=2", "optim.micro_batch_sequences=2",
)  # fmt: skip


def measure(folder, *arguments, refused=""):
    done = subprocess.run(
        [sys.executable, "-m", "phsa_megatron.cli", "measure-training", "--out", "out", "--warm-up", "1",
         "--timed", "1", *arguments, *TINY],
        cwd=folder, capture_output=True, text=True, timeout=300, check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.returncode == (2 if refused else 0) and refused in done.stderr, done.stderr[-3000:]


@pytest.mark.slow
def test_what_was_measured_before_stays(tmp_path):
    """The command itself, tiny, on a CPU: rows are added to rows, a whole curve is not made again."""
    list(prepare_demo_sets(tmp_path / "prepared" / "demo"))
    measure(tmp_path, "--only", "phsa_k2_4k", "--parts", "rows", "curves", "--curve-steps", "3")
    first = json.loads((tmp_path / "out" / page.ROWS_FILE).read_text())
    curves = json.loads((tmp_path / "out" / page.CURVES_FILE).read_text())["curves"]
    assert [row["name"] for row in first] == ["phsa_k2_4k"] and first[0]["step_ms"] > 0
    assert {name: len(losses) for name, losses in curves.items()} == {"phsa": 3, "dense": 3}
    assert curves["phsa"] != curves["dense"]
    curves["phsa"] = [1.0, 2.0, 3.0]
    older = {"curves": {"phsa": curves["phsa"]}, "device": "cpu", "commit": "older"}
    page.write_json(tmp_path / "out" / page.CURVES_FILE, older)
    again = ("--only", "dense_4k", "--parts", "rows", "curves", "--curve-steps", "3", "--commit", "newer")
    measure(tmp_path, *again)
    rows = json.loads((tmp_path / "out" / page.ROWS_FILE).read_text())
    assert [row["name"] for row in rows] == ["dense_4k", "phsa_k2_4k"] and rows[1] == first[0]
    assert page.read_curves(tmp_path / "out") == (curves, {"phsa": "older", "dense": "newer"})
    page.write_json(tmp_path / "out" / page.CURVES_FILE, older | {"device": "H200"})
    measure(tmp_path, *again, refused="holds measurements of H200, and this is cpu")
    assert page.read_curves(tmp_path / "out")[1] == {"phsa": "older"}


def test_gates_compare_rows_of_the_same_length():
    rows = [
        measured("phsa_k2_32k", 230.0),
        measured("dense_32k", 100.0),
        measured("phsa_k2_4k", 90.0),
        measured("dense_4k", 100.0, mfu=0.41),
        {"name": "dense_128k", "failed": "out of memory"},
        measured("phsa_k2_128k", 50.0),
    ]
    found = {gate.name.split(",")[0]: (gate.value, gate.verdict) for gate in gates(rows)}
    assert found["tokens/s at 32k"] == (pytest.approx(2.3), "passed")
    assert found["tokens/s at 128k"] == (None, "not measured")
    assert found["tokens/s at 4k"] == (pytest.approx(0.9), "failed")
    assert found["MFU of dense at 4k"] == (0.41, "passed")


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("chosen_dkdv_kernel", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16", "attention"),
        ("nvjet_tst_256x128_64x4_2x1_v_bz_coopA_NNT", "linear layers"),
        ("void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>", "optimizer"),
        ("triton_red_fused__to_copy_amax_exp_sum_0", "cross-entropy"),
        ("triton_poi_fused_mul_silu_split_1", "SwiGLU"),
        ("triton_poi_fused__to_copy_cat_mul_sub_0", "RoPE"),
        ("void at::native::vectorized_layer_norm_kernel<float>", "norms"),
        ("rms_norm_forward_kernel", "norms"),
        ("Memcpy HtoD (Pinned -> Device)", "copies"),
        ("something_new", "other"),
    ],
)
def test_kernels_are_grouped_by_what_they_are_for(kernel, kind):
    assert kind_of(kernel) == kind


def test_a_profile_counts_overlapping_kernels_once_and_the_waits_of_the_host():
    events = [
        {"cat": "kernel", "name": "gemm", "ts": 0.0, "dur": 400.0, "ph": "X"},
        {"cat": "kernel", "name": "gemm", "ts": 300.0, "dur": 300.0, "ph": "X"},
        {"cat": "kernel", "name": "forward_kernel", "ts": 900.0, "dur": 50.0, "ph": "X"},
        {"cat": "cuda_runtime", "name": "cudaStreamSynchronize", "ts": 0.0, "dur": 9.0, "ph": "X"},
    ]
    found = summary(events, step_s=1e-3)
    assert found["kinds_ms"] == {"linear layers": 0.7, "attention": 0.05}
    assert (found["busy_ms"], found["idle_ms"]) == (0.65, 0.35)
    assert found["host_waits"] == {"cudaStreamSynchronize": 1}
    assert found["kernels"][0] == {"name": "gemm", "calls": 2, "ms": 0.7}


def test_the_page_shows_what_is_there(tmp_path):
    rows = [measured("phsa_k2_32k", 230.0), measured("dense_32k", 100.0), measured("dense_4k", 90.0)]
    failed = {key: rows[0][key] for key in ("seq_len_tokens", "topk", "packed", "attention")}
    rows.append(failed | {"name": "dense_128k", "commit": "d" * 40, "failed": "OutOfMemoryError: no"})
    page.write_json(tmp_path / page.ROWS_FILE, rows)
    profile = summary([{"cat": "kernel", "name": "gemm", "ts": 0.0, "dur": 4e5}], 0.5) | {"name": "dense_32k"}
    page.write_json(tmp_path / page.PROFILE_FILE, [profile])
    before = summary([{"cat": "kernel", "name": "gemm", "ts": 0.0, "dur": 45e4}], 0.6)
    before |= {"name": "dense_32k", "commit": "e" * 40}
    page.write_json(tmp_path / page.EARLIER_PROFILE_FILE, [before])
    curves = {"curves": {"phsa": [2.0, 1.0, 0.5], "dense": [2.0, 1.5]}, "device": "GPU", "commit": "c" * 40}
    curves["commits"] = {"dense": "f" * 40}
    page.write_json(tmp_path / page.CURVES_FILE, curves)
    page.write_json(tmp_path / page.OPS_FILE, {"ops_ms": {"SwiGLU": {"torch": 1.0, "compiled": "no"}}})
    text = page.write_page(tmp_path).read_text()
    assert "| phsa_k2_32k | none | 1 | 4 | 1,000.0 | 230 | 30.0% | 400 | 50.0 | 2.30 |" in text
    assert "| dense_128k | OutOfMemoryError: no |" in text
    assert "| tokens/s at 32k, k = 2, against dense | 2.2 | 2.7 | 2.300 | passed |" in text
    assert re.search(r"\| dense_32k \| \d\.\d+ \| 1\.000 \| [+-]\d+\.\d% \| \d+\.\d \| 50\.0 \|", text)
    assert "| | dense_32k before | dense_32k | least |" in text and "Before: commit `eeeeeeeeeeee`" in text
    assert re.search(r"\| linear layers \| 450.0 \| 400.0 \| 47\d.\d \|", text)
    assert "| SwiGLU | 1.0 | no |" in text
    assert "`cccccccccccc` (phsa_k2_32k, dense_32k, dense_4k) and `dddddddddddd` (dense_128k)" in text
    assert "PHSA, k = 2: commit `cccccccccccc`, dense, cuDNN: commit `ffffffffffff`" in text
    assert "| | steps | 1 to 10 | 1 to 2 |" in text and "| PHSA, k = 2 | 3 | 1.5000 | 1.5000 |" in text
    assert "Packed rows" not in text
    assert (tmp_path / "h100_training.png").stat().st_size > 1000
    assert json.loads((tmp_path / page.ROWS_FILE).read_text()) == rows


def test_the_page_says_what_packed_rows_of_dense_attention_are_worth(tmp_path):
    names = ("phsa_k2_32k_packed", "dense_32k_packed", "phsa_k2_32k")
    rows = [measured(name, speed) for name, speed in zip(names, (300.0, 100.0, 80.0), strict=True)]
    page.write_json(tmp_path / page.ROWS_FILE, rows)
    text = page.write_page(tmp_path).read_text()
    assert "Packed rows are no gate" in text
    assert re.search(r"\| dense_32k_packed \| - \| 1\.000 \| not modelled \| \d+\.\d \| 50\.0 \|", text)
    rows[1]["document_tokens"] = 3000.0
    page.write_json(tmp_path / page.ROWS_FILE, rows)
    assert re.search(
        r"\| dense_32k_packed \| \d\.\d+ \| 1\.000 \| \+\d", page.write_page(tmp_path).read_text()
    )
