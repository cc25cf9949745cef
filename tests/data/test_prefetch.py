from __future__ import annotations

import itertools
import threading

import pytest

from phsa_megatron.data.prefetch import Prefetcher


def test_results_come_in_the_order_of_the_keys():
    with Prefetcher(lambda key: key * key, range(50), depth=3) as ahead:
        assert list(ahead) == [n * n for n in range(50)]
        assert list(ahead) == []


def test_it_reads_ahead_but_no_further_than_its_depth():
    read: list[int] = []
    full = threading.Event()

    def note(key: int) -> int:
        read.append(key)
        if len(read) == 4:
            full.set()
        return key

    with Prefetcher(note, itertools.count(), depth=3) as ahead:
        assert full.wait(timeout=30)
        assert next(ahead) == 0
    # Three wait, one is in hand, and the one taken made room for one more.
    assert len(read) <= 5


def test_an_error_of_the_reader_is_raised_where_its_result_was_due():
    def read(key: int) -> int:
        if key == 2:
            raise ValueError("bad key")
        return key

    ahead = Prefetcher(read, range(5))
    assert [next(ahead), next(ahead)] == [0, 1]
    with pytest.raises(ValueError, match="bad key"):
        next(ahead)
    with pytest.raises(StopIteration):
        next(ahead)


def test_the_caller_is_polled_while_it_waits_and_may_leave_without_losing_a_result():
    release = threading.Event()

    class AskedToStop(Exception):
        pass

    polls = []

    def poll() -> None:
        polls.append(1)
        if len(polls) == 1:
            raise AskedToStop
        release.set()

    def read(key: int) -> int:
        assert release.wait(timeout=30)
        return key

    with Prefetcher(read, range(2), poll=poll) as ahead:
        with pytest.raises(AskedToStop):
            next(ahead)
        assert [next(ahead), next(ahead)] == [0, 1]
    assert len(polls) >= 2


def test_closing_ends_the_thread_though_its_queue_is_full():
    before = set(threading.enumerate())
    ahead = Prefetcher(lambda key: key, itertools.count(), depth=1)
    started = set(threading.enumerate()) - before
    assert len(started) == 1
    assert next(ahead) == 0
    ahead.close()
    ahead.close()
    assert not any(thread.is_alive() for thread in started)
    with pytest.raises(StopIteration):
        next(ahead)


def test_closing_leaves_a_read_alone_that_never_returns():
    release, reading = threading.Event(), threading.Event()

    def read(key: int) -> int:
        reading.set()
        release.wait()
        return key

    ahead = Prefetcher(read, range(2))
    assert reading.wait(timeout=30)
    ahead.close()  # the test's own time limit is the negative control
    with pytest.raises(StopIteration):
        next(ahead)
    release.set()


def test_a_depth_without_room_is_refused():
    with pytest.raises(ValueError, match="depth=0"):
        Prefetcher(lambda key: key, range(2), depth=0)
