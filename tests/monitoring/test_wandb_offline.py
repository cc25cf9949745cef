import json

import pytest

from phsa_megatron.config.errors import DataError
from phsa_megatron.config.records import LoggedRow
from phsa_megatron.monitoring.wandb_offline import OfflineLaunch, compare, main


def _offline(*rows):
    return OfflineLaunch(None, "abc", 1, [LoggedRow(step, values) for step, values in rows], {})


def test_numbers_must_be_equal_to_the_last_bit_and_rows_complete():
    logged = [LoggedRow(1, {"a": 0.1, "b": float("nan")}), LoggedRow(2, {"a": 0.2})]
    same = _offline((1, {"a": 0.1, "b": float("nan")}), (2, {"a": 0.2}), (2, {"samples": "table-file"}))
    assert compare(same, logged) == []
    assert compare(_offline((1, {"a": 0.1, "b": float("nan")})), logged) == [
        "1 rows in W&B, 2 in metrics.jsonl"
    ]
    (off,) = compare(_offline((1, {"a": 0.10000000000000002, "b": float("nan")}), (2, {"a": 0.2})), logged)
    assert off.startswith("step 1, a: 0.1000000000")
    (shifted,) = compare(_offline((1, {"a": 0.1, "b": float("nan")}), (3, {"a": 0.2})), logged)
    assert "step 3 in W&B where metrics.jsonl has step 2" in shifted


def test_a_folder_without_offline_runs_is_refused(unfinished_run):
    with pytest.raises(DataError, match="holds no offline run"):
        main([str(unfinished_run.path)])
    assert json.loads(unfinished_run.metrics_file.read_text().splitlines()[0])["event"] == "start"
