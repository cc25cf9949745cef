import json
import math
import time

import pytest

from phsa_megatron.config.errors import DataError
from phsa_megatron.monitoring.records import read_records


def _write(path, *records, tail=""):
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + tail, encoding="utf-8")
    return path


def _start(time=0.0):
    return {"event": "start", "time": time}


def _values(step, loss, time=1.0, name="train/loss_nats"):
    return {"step": step, "time": time, "values": {name: loss}}


def test_steps_run_again_after_a_resume_supersede_the_killed_attempt(tmp_path):
    path = _write(
        tmp_path / "m.jsonl",
        _start(), _values(1, 9.0), _values(2, 8.0), _values(3, 7.0), _values(4, 6.0),
        _start(), _values(3, 7.5),
    )  # fmt: skip
    records = read_records(path)
    assert records.series("train/loss_nats") == ([1, 2, 3], [9.0, 8.0, 7.5])
    assert records.num_superseded_steps == 2
    assert len(records.events_of("start")) == 2


def test_until_the_new_launch_logs_a_step_the_old_values_stand(tmp_path):
    path = _write(tmp_path / "m.jsonl", _start(), _values(1, 9.0), _values(2, 8.0), _start())
    assert read_records(path).series("train/loss_nats") == ([1, 2], [9.0, 8.0])


def test_values_of_one_launch_at_one_step_are_merged(tmp_path):
    path = _write(
        tmp_path / "m.jsonl",
        _start(),
        _values(1, 9.0),
        _values(2, 8.0),
        _values(1, 7.0, name="val/loss_nats"),
    )
    records = read_records(path)
    assert records.values_by_step == {
        1: {"train/loss_nats": 9.0, "val/loss_nats": 7.0},
        2: {"train/loss_nats": 8.0},
    }
    assert records.last("val/loss_nats") == 7.0 and records.last("optim/lr") is None


def test_non_finite_numbers_come_back(tmp_path):
    path = _write(tmp_path / "m.jsonl", _values(1, "NaN"), _values(2, "-Infinity"))
    _, values = read_records(path).series("train/loss_nats")
    assert math.isnan(values[0]) and values[1] == -math.inf


def test_a_line_still_being_written_is_left_out(tmp_path):
    path = _write(tmp_path / "m.jsonl", _values(1, 9.0), tail='{"step": 2, "val')
    assert read_records(path).series("train/loss_nats") == ([1], [9.0])


@pytest.mark.parametrize("line", ["{broken", '"text"', '{"step": 3, "time": 1.0}', '{"event": "start"}'])
def test_a_damaged_complete_line_is_reported_with_its_number(tmp_path, line):
    path = _write(tmp_path / "m.jsonl", _values(1, 9.0), tail=line + "\n")
    with pytest.raises(DataError, match=r"m\.jsonl, line 2"):
        read_records(path)


def test_a_missing_file_is_said(tmp_path):
    with pytest.raises(DataError, match="no metrics were recorded there"):
        read_records(tmp_path / "m.jsonl")


def test_a_third_launch_supersedes_what_the_first_two_left(tmp_path):
    path = _write(
        tmp_path / "m.jsonl",
        _start(), _values(10, 1.0), _values(20, 1.0), _values(30, 1.0),
        _start(), _values(30, 2.0), _values(40, 2.0),
        _start(), _values(20, 3.0), _values(20, 3.5, name="val/loss_nats"),
    )  # fmt: skip
    records = read_records(path)
    assert records.series("train/loss_nats") == ([10, 20], [1.0, 3.0])
    assert records.last("val/loss_nats") == 3.5
    assert [launch.first_step for launch in records.launches] == [10, 30, 20]


def test_a_long_file_is_read_in_reasonable_time(tmp_path):
    half = [_values(step, 1.0) for step in range(1, 30_001)]
    path = _write(tmp_path / "m.jsonl", _start(), *half, _start(), *half[15_000:])
    start_s = time.process_time()
    assert read_records(path).num_superseded_steps == 15_000
    assert time.process_time() - start_s < 10, "reading must not be quadratic in the number of records"
