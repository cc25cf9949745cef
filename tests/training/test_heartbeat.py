"""What the heartbeats of all processes say about a hang."""

from __future__ import annotations

import dataclasses

from phsa_megatron.training import failures, heartbeat
from phsa_megatron.training.heartbeat import Heartbeat
from phsa_megatron.training.progress import Progress

NOW_S = 1000.0


def beat(rank, **changes):
    first = Heartbeat(
        rank=rank,
        host=f"n{rank // 2}",
        node_rank=rank // 2,
        pid=7,
        step=5,
        phase="forward",
        detail="",
        last_collective="all_reduce #9, not returned",
        collective_number=9,
        in_collective=True,
        stage=0,
        still_s=61,
        time_unix_s=NOW_S,
    )
    return dataclasses.replace(first, **changes)


def lines(*beats, world_size=4):
    return heartbeat.diagnose({b.rank: b for b in beats}, world_size, NOW_S, stale_after_s=25.0)


def test_a_process_that_is_gone_is_missing_with_its_host_and_last_place():
    found = lines(beat(0), beat(1), beat(2), beat(3, time_unix_s=NOW_S - 90))
    assert found[0].startswith("missing: rank 3 (n1), no heartbeat for 90 s")
    assert "step 5, phase forward" in found[0]
    assert found[1].startswith("waiting for them: ranks 0, 1, 2;")


def test_a_process_that_never_wrote_is_missing():
    assert lines(beat(0), beat(1), beat(3))[0].startswith("missing: rank 2 left no heartbeat")


def test_an_earlier_step_is_behind():
    found = lines(beat(0), beat(1, step=4, phase="log"), beat(2), beat(3))
    assert found[0].startswith("behind: rank 1 (n0) at step 4, phase log") and len(found) == 2


def test_outside_of_the_collective_that_others_wait_in_is_behind():
    found = lines(beat(0), beat(1), beat(2, in_collective=False, phase="backward"), beat(3))
    assert found[0].startswith("behind: rank 2 (n1) at step 5, phase backward") and len(found) == 2


def test_fewer_collectives_than_others_of_the_stage_is_behind():
    waits = {"in_collective": False}  # for collectives that run aside
    found = lines(
        beat(0, collective_number=30, stage=1, **waits),
        beat(1, collective_number=30, stage=1, **waits),
        beat(2, collective_number=7, **waits),
        beat(3, collective_number=8, **waits),
        world_size=4,
    )
    assert found[0].startswith("behind: rank 2") and len(found) == 2


def test_the_process_without_a_batch_is_behind():
    others = {"detail": "waits for the batches of other processes", "in_collective": False}
    own = {"detail": "waits for its own batch", "in_collective": False}
    found = lines(beat(0, **others), beat(1, **others), beat(2, **others), beat(3, **own))
    assert found[0].startswith("behind: rank 3") and len(found) == 2


def test_when_all_wait_nobody_is_blamed():
    found = lines(beat(0), beat(1), beat(2, last_collective="broadcast #9, not returned"), beat(3))
    assert found[0].startswith("nobody is missing or behind") and len(found) == 5
    assert "broadcast #9" in found[3]


def test_a_thousand_lines_are_shortened():
    found = lines(beat(0), world_size=1000)
    assert len(found) == 17 and found[-1].startswith("and ")


def test_what_is_written_is_read_back_and_a_torn_file_is_left_out(tmp_path):
    heartbeat.write(tmp_path, Heartbeat.of(Progress(step=3, phase="data"), rank=0, node_rank=0))
    heartbeat.file_of(tmp_path, 1).write_text('{"rank": 1, "ho')
    found = heartbeat.read(tmp_path, 2)
    assert list(found) == [0] and (found[0].step, found[0].phase) == (3, "data")
    assert not list(tmp_path.glob(".*"))


def test_an_alarm_is_for_the_other_processes_of_the_same_start(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    failures.raise_alarm(tmp_path, 1, "crash", "it broke")
    assert failures.alarm_since(tmp_path, 0.0, rank=0).text == "it broke"
    assert failures.alarm_since(tmp_path, 0.0, rank=1) is None, "it raised it"
    assert failures.alarm_since(tmp_path, 4e9, rank=0) is None, "older than this process"
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    assert failures.alarm_since(tmp_path, 0.0, rank=0) is None, "of an earlier start"
