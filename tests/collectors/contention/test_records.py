"""The estimators are unbiased, and records are added without waiting."""

from __future__ import annotations

import sys
import threading
from random import Random

import pytest

from asgi_pprof.collectors.contention import records as contention_records
from asgi_pprof.collectors.contention.records import (
    OTHERS,
    ContentionRecords,
    weigh_release,
    weigh_wait,
)
from asgi_pprof.stacks import StackKey, name_totals

MS = 1_000_000


def a_stack(leaf: str = "", lasti: int = 2):
    code = sys._getframe().f_code
    return leaf, StackKey((id(code), lasti), (code,))


def values(records):
    return [total.values for total in records.totals()]


def test_waits_of_the_rate_or_longer_are_recorded_as_they_are():
    """At rate 1 that is every wait; at rate 0 and below no wait is recorded."""
    never = pytest.fail
    assert weigh_wait(5, 1, never) == (1.0, 5)
    assert weigh_wait(10_000, 10_000, never) == (1.0, 10_000)
    assert weigh_wait(0, 1, never) == (1.0, 1)
    assert weigh_wait(5, 0, never) is None
    assert weigh_wait(5, -1, never) is None


def test_shorter_waits_are_sampled_and_scaled():
    """As in Go, one is kept with probability waited/rate, as rate/waited events of that length."""
    assert weigh_wait(2500, 10_000, lambda: 0.2499) == (4.0, 10_000)
    assert weigh_wait(2500, 10_000, lambda: 0.25) is None


def test_block_totals_are_unbiased():
    """At rate 1 ms, 200,000 waits of 10 us to 3 ms add up to their true sum within 2 %."""
    random = Random(1)
    records = ContentionRecords(weigh_wait, random=Random(2).random)
    records.rate = MS
    waits = [int(10_000 * 300 ** random.random()) for _ in range(200_000)]
    stack = a_stack()
    for waited_ns in waits:
        if weight := records.weigh(waited_ns):
            records.add(stack, weight)
    ((count, delay_ns),) = values(records)
    assert count == pytest.approx(len(waits), rel=0.02)
    assert delay_ns == pytest.approx(sum(waits), rel=0.02)


def test_mutex_totals_are_unbiased():
    """At 10 one in ten releases is kept, times ten; 1 is exact, and 0 records nothing."""
    random = Random(3)
    records = ContentionRecords(weigh_release, random=Random(4).random)
    records.rate = 10
    waits = [random.randrange(3 * MS) for _ in range(200_000)]
    stack = a_stack()
    for caused_ns in waits:
        if weight := records.weigh(caused_ns):
            records.add(stack, weight)
    ((count, delay_ns),) = values(records)
    assert count == pytest.approx(len(waits), rel=0.03)
    assert delay_ns == pytest.approx(sum(waits), rel=0.03)
    assert weigh_release(7, 1, pytest.fail) == (1.0, 7)
    assert weigh_release(7, 0, pytest.fail) is None


def test_nothing_is_lost_between_threads():
    """Threads that add at the same time lose nothing, and totals read meanwhile only rise."""
    records = ContentionRecords(weigh_wait)
    stack = a_stack()

    def add() -> None:
        for _ in range(5000):
            records.add(stack, (1.0, 3))

    threads = [threading.Thread(target=add) for _ in range(4)]
    for thread in threads:
        thread.start()
    seen = []
    while any(thread.is_alive() for thread in threads):
        seen += [count for count, _ in values(records)]
    for thread in threads:
        thread.join()
    assert values(records) == [(20_000, 60_000)]
    assert seen == sorted(seen)
    assert records.lost == 0


def test_adding_does_not_wait_for_a_sum_in_progress(monkeypatch):
    """A signal handler or a finalizer may add then. Its event is queued, and added up later."""
    monkeypatch.setattr(contention_records, "_MAX_QUEUED", 100)
    records = ContentionRecords(weigh_wait)
    stack = a_stack()
    with records._adding_up:
        for _ in range(130):
            records.add(stack, (1.0, 1))
    assert records.lost == 30
    assert values(records) == [(100, 100)]


def test_the_number_of_stacks_is_bounded(monkeypatch):
    """Events of further stacks are added up under a name that says so."""
    monkeypatch.setattr(contention_records, "MAX_STACKS", 3)
    records = ContentionRecords(weigh_wait)
    for lasti in range(0, 20, 2):
        records.add(a_stack(lasti=lasti), (1.0, 5))
    assert records.count() == 4
    assert records.overflowed
    samples = {sample.stack: sample.values for sample in name_totals(records.totals())}
    assert samples[(OTHERS,)] == (7, 35)
    assert sum(count for count, _ in samples.values()) == 10


def test_one_place_with_and_without_a_pseudo_frame_is_two_stacks():
    """A wait for a worker thread is distinguished from other waits at the same place."""
    records = ContentionRecords(weigh_wait)
    records.add(a_stack(), (1.0, 1))
    records.add(a_stack("waiting for a worker thread"), (1.0, 2))
    leaves = [sample.stack[0].function.name for sample in name_totals(records.totals())]
    assert leaves[0].endswith("a_stack")
    assert leaves[1] == "<waiting for a worker thread>"
