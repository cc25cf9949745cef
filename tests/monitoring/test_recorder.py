import json
import logging
import math
import os
import resource
import signal
import struct

import pytest

from phsa_megatron.config.errors import TrainingError
from phsa_megatron.config.run_folder import RunFolder
from phsa_megatron.config.schema import MonitoringConfig, RunConfig, TrainConfig, WandbConfig, WandbMode
from phsa_megatron.monitoring import recorder as recorder_module
from phsa_megatron.monitoring.recorder import Recorder
from phsa_megatron.monitoring.records import read_records


@pytest.fixture
def config():
    off = WandbConfig(mode=WandbMode.disabled)
    return TrainConfig(run=RunConfig(name="demo"), monitoring=MonitoringConfig(wandb=off))


@pytest.fixture
def folder(tmp_path):
    return RunFolder(tmp_path)


def _open(folder, config, rank=0):
    return Recorder(folder, config, derived=None, rank=rank)


def test_numbers_come_back_with_the_same_bits(folder, config):
    values = [math.pi, 1 / 3, 5e-324, 1.7976931348623157e308, -0.0, 0.1 + 0.2, math.inf, -math.inf]
    recorder = _open(folder, config)
    for step, value in enumerate(values, start=1):
        recorder.log(step, {"train/loss_nats": value})
    recorder.log(99, {"train/loss_nats": math.nan, "optim/num_zeros": 2**60 + 1})
    recorder.close()
    records = read_records(folder.metrics_file)
    _, read = records.series("train/loss_nats")
    assert [struct.pack("d", v) for v in read[:-1]] == [struct.pack("d", v) for v in values]
    assert math.isnan(read[-1])
    assert records.last("optim/num_zeros") == 2**60 + 1


def test_every_line_is_strict_json_and_is_on_disk_before_close(folder, config):
    recorder = _open(folder, config)
    recorder.log(1, {"train/loss_nats": math.nan})
    recorder.event("checkpoint_requested", step=1, path="检查点")

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    lines = [json.loads(line, parse_constant=refuse) for line in folder.metrics_file.read_text().splitlines()]
    assert [line.get("event") for line in lines] == ["start", None, "checkpoint_requested"]
    assert lines[2]["path"] == "检查点" and lines[2]["step"] == 1
    recorder.close()
    recorder.close()


def test_a_launch_records_its_environment(folder, config):
    _open(folder, config).close()
    (start,) = read_records(folder.metrics_file).events_of("start")
    environment = start.fields["environment"]
    assert environment["pid"] == os.getpid() and environment["packages"]["torch"]
    assert (
        environment["packages"]["transformer-engine"] is None or environment["packages"]["transformer-engine"]
    )


def test_restart_appends_and_cuts_off_only_the_torn_line(folder, config):
    recorder = _open(folder, config)
    recorder.log(1, {"train/loss_nats": 3.0})
    recorder.close()
    before = folder.metrics_file.read_bytes()
    torn = b'{"step": 2, "time": 1.0, "val' + b"x" * 200_000
    folder.metrics_file.write_bytes(before + torn)
    recorder = _open(folder, config)
    recorder.log(2, {"train/loss_nats": 2.0})
    recorder.close()
    assert folder.metrics_file.read_bytes().startswith(before)
    records = read_records(folder.metrics_file)
    assert records.series("train/loss_nats") == ([1, 2], [3.0, 2.0])
    assert records.events_of("start")[1].fields["torn_bytes_removed"] == len(torn)


def test_a_file_that_is_one_torn_line_starts_empty(folder, config):
    folder.metrics_file.write_bytes(b'{"event": "sta')
    _open(folder, config).close()
    assert len(read_records(folder.metrics_file).events) == 1


def test_unknown_names_are_refused_on_every_rank_and_nothing_is_written(folder, config):
    for rank in (0, 1):
        recorder = _open(folder, config, rank)
        with pytest.raises(ValueError, match="nearest: 'train/loss_nats'"):
            recorder.log(1, {"optim/lr": 1.0, "train/los_nats": 1.0})
        recorder.close()
    assert read_records(folder.metrics_file).values_by_step == {}


@pytest.mark.parametrize("value", [True, "1.0", None, [1.0]])
def test_values_that_are_no_numbers_are_refused(folder, config, value):
    recorder = _open(folder, config)
    with pytest.raises(TypeError, match="'train/loss_nats' must be a Python int or float"):
        recorder.log(1, {"train/loss_nats": value})
    recorder.close()


def test_only_rank_zero_writes(folder, config):
    recorder = _open(folder, config, rank=3)
    recorder.log(1, {"train/loss_nats": 3.0})
    recorder.event("resume", step=0)
    recorder.close()
    assert not folder.metrics_file.exists()


def test_a_full_disk_stops_training_with_the_path(folder, config):
    folder.metrics_file.symlink_to("/dev/full")
    with pytest.raises(TrainingError, match="No space left") as caught:
        _open(folder, config)
    assert str(folder.metrics_file) in str(caught.value) and "free space" in str(caught.value)


def test_a_record_that_fits_only_in_part_is_taken_back(folder, config):
    recorder = _open(folder, config)
    recorder.log(1, {"train/loss_nats": 3.0})
    complete = folder.metrics_file.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(complete) + 10, limits[1]))
        with pytest.raises(TrainingError, match=r"metrics\.jsonl: File too large"):
            recorder.log(2, {"train/loss_nats": 2.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert folder.metrics_file.read_bytes() == complete
    recorder.event("end", reason="disk full")
    recorder.close()
    assert read_records(folder.metrics_file).events[-1].fields == {"reason": "disk full"}


def test_a_folder_that_cannot_be_made_is_said(tmp_path, config):
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match=r"cannot write .*metrics\.jsonl"):
        _open(RunFolder(tmp_path / "file"), config)


def test_wandb_gets_the_same_values_and_its_failure_changes_nothing(folder, config, monkeypatch, caplog):
    class Broken:
        id = "abc"
        logged = []

        def log(self, values):
            self.logged.append(values)
            raise ConnectionError("server gone")

        def finish(self):
            raise ConnectionError("still gone")

    run = recorder_module.WandbRun(Broken(), sync_command=None)
    monkeypatch.setattr(recorder_module, "start_wandb", lambda *arguments: run)
    with caplog.at_level(logging.WARNING):
        recorder = _open(folder, config)
        recorder.log(1, {"train/loss_nats": 3.0})
        recorder.log(2, {"train/loss_nats": 2.0})
        recorder.close()
    assert Broken.logged == [{"progress/step": 1, "progress/launch": 1, "train/loss_nats": 3.0}]
    assert sum("server gone" in record.message for record in caplog.records) == 1
    assert read_records(folder.metrics_file).series("train/loss_nats") == ([1, 2], [3.0, 2.0])


def test_an_event_may_carry_a_field_called_kind_but_not_those_that_every_event_has(folder, config):
    recorder = _open(folder, config)
    recorder.event("error", step=3, kind="ValueError", text="no")
    with pytest.raises(ValueError, match="cannot be called time"):
        recorder.event("error", time=3)
    recorder.close()
    event = read_records(folder.metrics_file).events[-1]
    assert (event.kind, event.step, event.fields) == ("error", 3, {"kind": "ValueError", "text": "no"})
