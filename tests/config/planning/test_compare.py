"""Predictions beside measured runs. Without rows nothing is shown, and nothing here says otherwise."""

import json
from functools import cache
from pathlib import Path

import pytest

from phsa_megatron import cli
from phsa_megatron.config.errors import ConfigError
from phsa_megatron.config.planning.compare import TOLERANCE_FRAC, compare, read_rows
from phsa_megatron.config.planning.machine import Machine
from phsa_megatron.config.planning.run_to_plan import run_to_plan
from phsa_megatron.config.planning.search import Estimator
from phsa_megatron.evaluation.full_size.page import EMPTY_DOCUMENTS

ROOT = Path(__file__).resolve().parents[3]
FULL_SIZE = ROOT / "docs" / "results" / "h100_training.json"
ROWS = read_rows(FULL_SIZE) if FULL_SIZE.is_file() else []
RECIPE = "phsa_0p6b_pretrain_8gpu_h100_bf16_4k"
OVERRIDES = ["cluster=local_gpu"]


def _faulty(row):
    return row["attention"] == "dense" and row["packed"] and row["commit"] == EMPTY_DOCUMENTS


@pytest.mark.parametrize("row", ROWS, ids=lambda row: " ".join([row["recipe"], *row["overrides"]]))
def test_peak_memory_and_step_time_of_full_size_runs_are_predicted(row):
    comparison = compare(row)
    assert abs(comparison.memory_error_frac) <= TOLERANCE_FRAC, comparison
    if not _faulty(row):
        assert abs(comparison.step_error_frac) <= TOLERANCE_FRAC, comparison


def test_all_full_size_rows_have_a_predicted_time():
    assert len(ROWS) == 13 and all(compare(row).time_modelled for row in ROWS)


@pytest.mark.parametrize("row", [row for row in ROWS if _faulty(row)], ids=lambda row: row["name"])
def test_rows_of_a_known_fault_are_slower_than_predicted(row):
    """The page says what it was. Once they are measured again, the test above takes them."""
    assert compare(row).step_error_frac < -TOLERANCE_FRAC


def test_the_page_says_whether_there_are_full_size_rows():
    said = "There are no full-size rows yet" in (ROOT / "docs" / "plan.md").read_text()
    assert said == (not ROWS)


def test_nothing_in_the_plan_reads_measured_runs():
    folder = ROOT / "phsa_megatron" / "config"
    assert not [p for p in folder.rglob("*.py") if "h100_training" in p.read_text()]


@cache
def predicted():
    config = run_to_plan([f"recipe={RECIPE}", *OVERRIDES])
    return Estimator(config, Machine.of(config)).estimate(config)


def made_up(time_factor: float, memory_factor: float) -> dict[str, object]:
    """A row that a run would give if it took these multiples of the prediction."""
    estimate = predicted()
    return {
        "recipe": RECIPE,
        "overrides": OVERRIDES,
        "device": "none",
        "step_time_s": estimate.time.step_s * time_factor,
        "peak_memory_gib": estimate.memory.total_gib * memory_factor,
    }


def test_a_prediction_is_compared_with_its_row():
    exact = compare(made_up(1, 1))
    assert exact.step_error_frac == exact.memory_error_frac == 0
    assert exact.within
    off = compare(made_up(1 / 1.2, 1))
    assert off.step_error_frac == pytest.approx(0.2)
    assert not off.within
    assert not compare(made_up(1, 1.25)).within
    assert compare(made_up(1.1, 0.95)).within


def test_packed_dense_attention_without_its_lengths_is_compared_by_memory_alone():
    """Its time is a sum of squares of lengths, which a row says as `document_tokens`."""
    row = made_up(1, 1) | {"recipe": RECIPE.replace("phsa", "dense")}
    one, packed = (
        compare(row | {"overrides": [*OVERRIDES, f"data.isolate_documents={told}"], "step_time_s": 9e9})
        for told in ("false", "true")
    )
    assert one.time_modelled and not one.within and one.cells()[2] == "-100.0%"
    assert not packed.time_modelled and packed.cells()[2] == "not modelled"
    long_rows = [*OVERRIDES, "data.isolate_documents=true", "data.seq_len_tokens=32768"]
    short, long = (
        compare(row | {"overrides": long_rows, "document_tokens": tokens}) for tokens in (8e3, 3e4)
    )
    assert short.time_modelled and short.predicted_step_s < long.predicted_step_s
    near = {"peak_memory_gib": packed.predicted_gib, "step_time_s": 9e9}
    told = {"overrides": [*OVERRIDES, "data.isolate_documents=true"]}
    assert compare(row | told | near).within
    assert not compare(row | told | near | {"peak_memory_gib": packed.predicted_gib * 1.25}).within


def test_the_command_compares_a_file_and_fails_out_of_tolerance(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([made_up(1.05, 1)]))
    assert cli.main(["plan", "--compare", str(file)]) == 0
    assert "-4.8%" in capsys.readouterr().out
    file.write_text(json.dumps([made_up(1.05, 1), made_up(2, 1)]))
    assert cli.main(["plan", "--compare", str(file)]) == 1
    assert "-50.0%" in capsys.readouterr().out


def test_a_row_that_failed_is_left_out(tmp_path):
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([{"name": "dense_128k", "failed": "out of memory"}, made_up(1, 1)]))
    assert read_rows(file) == [made_up(1, 1)]


def test_a_row_without_a_column_is_refused(tmp_path):
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([{"recipe": RECIPE, "overrides": []}]))
    with pytest.raises(ConfigError, match="lacks device, step_time_s, peak_memory_gib"):
        read_rows(file)
