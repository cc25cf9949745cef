import json

from phsa_megatron.config.goodput import Goodput
from phsa_megatron.config.records import read_records


def _records(path, launches):
    """Write launches of (start time, {step: step time}), and read them."""
    lines = []
    for start, steps in launches:
        lines.append({"event": "start", "time": start})
        lines += [{"step": s, "time": start + 1, "values": {"perf/step_time_s": t}} for s, t in steps.items()]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return read_records(path)


def test_a_step_made_again_counts_once_and_time_between_launches_counts_against(tmp_path):
    first = (1000.0, {1: 2.0, 2: 2.0, 3: 2.0, 4: 2.0})
    records = _records(tmp_path / "m", [first, (1100.0, {3: 5.0, 4: 5.0, 5: 5.0})])
    goodput = Goodput.of(records)
    assert (goodput.first_start_unix_s, goodput.new_step_s, goodput.last_step) == (1000.0, 2 * 2 + 3 * 5, 5)
    assert goodput.frac(1200.0) == 19 / 200
    assert goodput.frac(1000.0) is None, "no time has passed"


def test_a_launch_that_goes_on_counts_as_the_records_will_say_later(tmp_path):
    """Every second step is recorded, and the checkpoint lies between two records."""
    first = (1000.0, {2: 3.0, 4: 3.0, 6: 3.0})
    going_on = Goodput.of(_records(tmp_path / "m", [first]), last_step=3)
    assert (going_on.new_step_s, going_on.last_step) == (6.0, 2)
    for step in (4, 6):
        going_on.add(step, 4.0)
    later = Goodput.of(_records(tmp_path / "m", [first, (1100.0, {4: 4.0, 6: 4.0})]))
    assert later == going_on and later.new_step_s == 2 * 3 + 4 * 4


def test_a_run_that_never_started_has_none(tmp_path):
    (tmp_path / "m").write_text("")
    assert Goodput.of(read_records(tmp_path / "m")) is None
