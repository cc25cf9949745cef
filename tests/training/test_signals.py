"""Requests to save or leave: signals and touch files, in one process and agreed by two."""

import os
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

import pytest

from phsa_megatron.training.signals import StopRequest, StopSignals

WORKER = """
import os, sys, time
from datetime import timedelta
from pathlib import Path
import torch, torch.distributed as dist
from phsa_megatron.training.signals import StopSignals

class Folder:
    save_request = Path(sys.argv[1]) / "save"
    exit_request = Path(sys.argv[1]) / "exit"

class Groups:
    rank = int(sys.argv[2])
    def any_true(self, flag):
        number = torch.tensor(int(flag))
        dist.all_reduce(number, op=dist.ReduceOp.MAX)
        return bool(number)

dist.init_process_group(
    "gloo", init_method=f"file://{sys.argv[1]}/store", rank=Groups.rank, world_size=2,
    timeout=timedelta(seconds=120),
)
with StopSignals(Folder(), Groups()) as signals:
    print("ready", flush=True)
    num_polls = 0
    while True:
        request = signals.poll()
        num_polls += 1
        if request:
            print(num_polls, request.save, request.exit, request.reason, flush=True)
        if request.exit:
            break
dist.destroy_process_group()
"""


@dataclass
class Folder:
    path: Path

    @property
    def save_request(self):
        return self.path / "save"

    @property
    def exit_request(self):
        return self.path / "exit"


class OneProcess:
    rank = 0

    def __init__(self):
        self.num_reductions = 0

    def any_true(self, flag):
        self.num_reductions += 1
        return flag


class OtherProcess(OneProcess):
    rank = 1


def test_nothing_asked_costs_one_reduction_and_answers_false(tmp_path):
    groups = OneProcess()
    with StopSignals(Folder(tmp_path), groups) as signals:
        assert signals.poll() == StopRequest()
        assert not signals.poll()
        assert not signals.requested_locally()
    assert groups.num_reductions == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_asks_to_save_and_leave_and_stays_asked(tmp_path, number):
    groups = OneProcess()
    with StopSignals(Folder(tmp_path), groups) as signals:
        os.kill(os.getpid(), number)
        assert signals.requested_locally()
        assert signals.poll() == StopRequest(True, True, number.name)
        so_far = groups.num_reductions
        assert signals.poll() == StopRequest(True, True, number.name)
        assert groups.num_reductions == so_far


def test_touch_save_asks_once_and_goes_on(tmp_path):
    folder = Folder(tmp_path)
    with StopSignals(folder, OneProcess()) as signals:
        folder.save_request.touch()
        assert not signals.requested_locally(), "a save is no reason to leave a data wait"
        assert signals.poll() == StopRequest(True, False, "RUN/save")
        assert not folder.save_request.exists()
        assert not signals.poll()
        folder.save_request.touch()
        assert signals.poll().save


def test_touch_exit_saves_and_leaves(tmp_path):
    folder = Folder(tmp_path)
    with StopSignals(folder, OneProcess()) as signals:
        folder.exit_request.touch()
        assert signals.requested_locally()
        assert signals.poll() == StopRequest(True, True, "RUN/exit")
        assert not folder.exit_request.exists(), "the next start must not leave at once"
        assert signals.poll().exit
        assert signals.requested_locally()


def test_asking_whether_to_leave_keeps_a_save_request_for_the_loop(tmp_path):
    folder = Folder(tmp_path)
    with StopSignals(folder, OneProcess()) as signals:
        folder.save_request.touch()
        assert not signals.leave_requested()
        assert signals.poll().save
        folder.exit_request.touch()
        assert signals.leave_requested()
        assert signals.poll() == StopRequest(True, True, "RUN/exit")


def test_several_requests_are_all_named(tmp_path):
    folder = Folder(tmp_path)
    with StopSignals(folder, OneProcess()) as signals:
        folder.save_request.touch()
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.poll().reason == "RUN/save and SIGTERM"


def test_only_process_0_looks_at_files(tmp_path):
    folder = Folder(tmp_path)
    with StopSignals(folder, OtherProcess()) as signals:
        folder.exit_request.touch()
        assert not signals.poll()
        assert not signals.requested_locally()
    assert folder.exit_request.exists()


def test_handlers_are_put_back(tmp_path):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR1)
    with StopSignals(Folder(tmp_path), OneProcess()):
        assert signal.getsignal(signal.SIGTERM) != before[0]
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR1)) == before


def test_another_thread_is_refused(tmp_path):
    caught = []

    def enter():
        try:
            with StopSignals(Folder(tmp_path), OneProcess()):
                pass
        except RuntimeError as error:
            caught.append(str(error))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert caught and "main thread" in caught[0]


def start_two(tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(tmp_path), str(rank)],
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in range(2)
    ]
    for worker in workers:
        assert worker.stdout is not None and worker.stdout.readline() == "ready\n"
    return workers


def test_two_processes_agree_at_the_same_poll_whoever_is_asked(tmp_path):
    workers = start_two(tmp_path)
    (tmp_path / "save").touch()
    saves = [worker.stdout.readline().split() for worker in workers]
    assert saves[0] == saves[1]
    assert saves[0][1:] == ["True", "False", "RUN/save"]
    workers[1].send_signal(signal.SIGUSR1)  # only the second one hears it
    exits = [worker.stdout.readline().split() for worker in workers]
    assert exits[0] == exits[1]
    assert exits[0][1:] == ["True", "True", "SIGUSR1"]
    assert [worker.wait(timeout=60) for worker in workers] == [0, 0]
