"""What counts as communication: each wait once, and nothing that computation hides."""

import pytest
import torch
import torch.distributed as dist

from phsa_megatron.parallel import collective_trace, communication_clock
from phsa_megatron.parallel.communication_clock import CommunicationClock


class Host:
    """A clock of the host that moves only where a collective takes time."""

    def __init__(self):
        self.now_s = 0.0

    def perf_counter(self):
        return self.now_s

    def takes(self, seconds, result=None):
        def call(*_args, **_kwargs):
            self.now_s += seconds
            return result

        return call


class Handle(dist.Work):
    """A collective that was started; waiting for it takes 3 s, and it knows more than to wait."""

    def __init__(self, host):
        super().__init__()
        self.host = host

    def wait(self, *_args):
        self.host.now_s += 3.0
        return True

    def is_completed(self):
        return False


@pytest.fixture
def host(monkeypatch):
    host = Host()
    monkeypatch.setattr(communication_clock, "time", host)
    return host


@pytest.fixture
def clock():
    return CommunicationClock(torch.device("cpu"))


def _traced(call):
    return collective_trace._traced("all_reduce", call)


def test_a_blocking_collective_counts_once_whatever_it_is_made_of(host, clock):
    inner = _traced(host.takes(2.0))

    def outer(_tensor):
        host.now_s += 1.0
        inner(None)
        inner(None)

    with clock.running():
        _traced(outer)(None)
        host.now_s += 100.0  # computation
        _traced(host.takes(4.0))(None)
    assert clock.take() == 1 + 2 + 2 + 4
    assert clock.take() == 0


def test_of_one_beside_computation_only_the_wait_counts(host, clock):
    start = _traced(host.takes(0.5, Handle(host)))
    with clock.running():
        handle = start(None)
        host.now_s += 100.0
        assert handle.is_completed() is False and handle.wait() is True
    assert clock.take() == 0.5 + 3.0
    batch = _traced(host.takes(0.25, [Handle(host), Handle(host)]))
    with clock.running():
        for one in batch(None):
            one.wait()
    assert clock.take() == 0.25 + 2 * 3.0


def test_outside_of_a_step_nothing_counts_and_handles_are_torchs_own(host, clock):
    work = Handle(host)
    start = _traced(host.takes(0.5, work))
    assert start(None) is work
    with clock.running():
        of_the_step = start(None)
    clock.take()
    of_the_step.wait()
    _traced(host.takes(4.0))(None)
    assert clock.take() == 0 and not collective_trace.is_running()


def test_a_collective_that_fails_counts_and_is_over(host, clock):
    def fails(_tensor):
        host.now_s += 7.0
        raise RuntimeError("lost")

    with clock.running(), pytest.raises(RuntimeError, match="lost"):
        _traced(fails)(None)
    assert clock.take() == 7.0 and not collective_trace.is_running()


def test_coalesced_collectives_count_where_they_block(host, clock, single_process_groups):
    """megatron's reduction of gradients: many calls that only note what to do, then one that does it."""
    collective_trace.install()
    tensors = [torch.ones(4), torch.ones(2)]
    times = []

    class Slow:
        def __init__(self, context):
            self.context = context

        def __enter__(self):
            return self.context.__enter__()

        def __exit__(self, *error):
            host.now_s += 5.0
            return self.context.__exit__(*error)

    original = dist._coalescing_manager.__wrapped__
    for asynchronous in (False, True):
        manager = collective_trace._coalesced(lambda *a, **k: Slow(original(*a, **k)))
        with clock.running():
            with manager(None, async_ops=asynchronous) as works:
                for tensor in tensors:
                    dist.all_reduce(tensor, async_op=asynchronous)
            if asynchronous:
                assert len(works.works) == 1
                works.works.append(Handle(host))
                works.wait()
        times.append(clock.take())
    assert times == [5.0, 5.0 + 3.0]
    with pytest.raises(ValueError, match="mine"), clock.running(), manager(None):
        raise ValueError("mine")
    assert all(tensor.eq(1).all() for tensor in tensors)


@pytest.mark.gpu
def test_on_a_device_the_stream_is_measured_and_the_host_never_waits():
    device = torch.device("cuda")
    x = torch.randn(4096, 4096, device=device)
    clock = CommunicationClock(device)
    for _ in range(3):
        x @ x
    torch.cuda.synchronize()

    def collective(_tensor):
        for _ in range(20):
            x @ x

    with clock.running():
        _traced(collective)(None)
    first = clock.take()
    torch.cuda.synchronize()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    collective(None)
    end.record()
    torch.cuda.synchronize()
    assert first == 0.0, "it was not over when it was asked"
    assert clock.take() == pytest.approx(begin.elapsed_time(end) / 1e3, rel=0.3)
    assert len(clock._spare) == 2
