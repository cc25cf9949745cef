from __future__ import annotations

import time

import pytest
import torch

from phsa_megatron.training.meter import OwnTimes
from phsa_megatron.training.phase_clock import PhaseClock
from phsa_megatron.training.progress import Progress


def _step(clock, work):
    progress = Progress()
    progress.on_enter.append(clock.enter)
    for phase in ("data", "forward", "backward", "forward", "backward", "optimizer"):
        progress.enter(phase, step=1)
        work(phase)
    progress.step_done()


def test_host_time_goes_to_the_phase_that_it_was_spent_in():
    clock = PhaseClock(torch.device("cpu"))
    _step(clock, lambda phase: time.sleep({"forward": 0.02, "backward": 0.05, "data": 0.03}.get(phase, 0.0)))
    taken = clock.take()
    assert 0.04 <= taken["forward"] < 0.09 and 0.1 <= taken["backward"] < 0.15
    assert 0 <= taken["optimizer"] < 0.01, "waiting for data is in none of them"
    assert clock.take() == {"forward": 0.0, "backward": 0.0, "optimizer": 0.0}


@pytest.mark.gpu
def test_device_time_is_read_without_waiting():
    """The host enqueues a step and asks at once: what the device has not passed comes with a later call."""
    device = torch.device("cuda")
    x = torch.randn(8192, 8192, device=device)
    for _ in range(3):
        x @ x
    torch.cuda.synchronize()
    clock = PhaseClock(device)

    def work(phase):
        for _ in range({"forward": 4, "backward": 8, "optimizer": 1}.get(phase, 0)):
            x @ x

    began_s = time.perf_counter()
    _step(clock, work)
    first = clock.take()
    enqueued_s = time.perf_counter() - began_s
    torch.cuda.synchronize()
    whole_s = time.perf_counter() - began_s
    later = clock.take()
    total = {name: first[name] + later[name] for name in first}
    assert sum(first.values()) < 0.9 * sum(total.values()) and enqueued_s < 0.5 * whole_s
    assert 1.5 < total["backward"] / total["forward"] < 2.5
    assert sum(total.values()) == pytest.approx(whole_s, rel=0.3)


def test_the_slowest_process_is_measured_within_its_stage():
    times = OwnTimes([1.0, 1.1, 1.0, 5.0, 5.0, 9.0], [0, 0, 0, 1, 1, 1], step_s=10.0)
    assert times.slowest() == (5, pytest.approx(1.8), pytest.approx(4.0))
    assert OwnTimes([1.0, 6.0], [0, 0], 1.0).slowest()[:2] == (1, 6.0), "of two, against the faster one"
    assert OwnTimes([0.0, 0.0], [0, 0], 1.0).slowest() == (0, 1.0, 0.0)
