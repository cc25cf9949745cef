"""Processes that meet at the start: whoever is missing has a name before anybody gives up."""

import contextlib
import os
import socket
import threading

import pytest

from phsa_megatron.config.errors import DeviceError
from phsa_megatron.parallel import meeting


@pytest.fixture
def address(monkeypatch):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    monkeypatch.setattr(meeting, "_starts", iter(lambda: 0, 1))  # threads share what processes have alone


def test_the_missing_process_is_named_while_waiting_and_at_the_end(address, monkeypatch, capfd):
    monkeypatch.setattr(meeting, "REPORT_EVERY_S", 0.3)
    with pytest.raises(DeviceError, match=r"processes \[2, 3\] of 4 did not start within 1 s") as caught:
        late = threading.Thread(target=lambda: meet_quietly(1, 4, 2, 1.0))
        late.start()
        meeting.meet(0, 4, 2, 1.0)
    late.join()
    assert "node rank 1, all of it" in str(caught.value)
    said = capfd.readouterr().err.splitlines()
    assert said and all("waiting for processes [2, 3] of 4" in line for line in said if "waiting" in line)


def meet_quietly(*arguments):
    with contextlib.suppress(DeviceError):
        meeting.meet(*arguments)


def test_a_late_process_is_waited_for(address, monkeypatch):
    monkeypatch.setattr(meeting, "REPORT_EVERY_S", 0.2)
    said, came, missed = [], [], threading.Event()

    def say(text):
        said.append(text)
        missed.set()

    def come_late():
        assert missed.wait(30)
        meeting.meet(1, 2, 2, 30.0)
        came.append(True)

    monkeypatch.setattr(meeting, "_say", say)
    late = threading.Thread(target=come_late)
    late.start()
    served = meeting.meet(0, 2, 2, 30.0)  # it lives as long as process 0 does
    late.join()
    assert served is not None and came == [True]
    assert "waiting for processes [1] of 2" in said[0]


def test_a_missing_process_0_is_named_by_the_others(address, monkeypatch, capfd):
    monkeypatch.setattr(meeting, "REPORT_EVERY_S", 0.4)
    with pytest.raises(DeviceError, match="process 1 of 2 could not reach process 0 at 127.0.0.1:"):
        meeting.meet(1, 2, 2, 1.0)
    assert f"127.0.0.1:{os.environ['MASTER_PORT']} yet" in capfd.readouterr().err


def test_the_node_of_a_missing_process_has_its_slurm_name(monkeypatch):
    monkeypatch.setattr(meeting, "node_names", lambda: ["n1", "n2"])
    assert (
        meeting._places([3, 4, 5, 6, 7], 4) == "node rank 0 (n1), local rank 3; node rank 1 (n2), all of it"
    )


def test_a_long_list_is_shortened():
    assert meeting._shortened(list(range(20))).endswith("15] and 4 more")
