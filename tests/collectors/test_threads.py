"""thread and threadcreate: every thread there is, and who started it."""

from __future__ import annotations

import _thread
import asyncio
import re
import threading

import pytest
import uvloop

from asgi_pprof.collectors.threads import ThreadCollector, ThreadStarts, name_stacks
from asgi_pprof.profile import check_valid
from asgi_pprof.stacks import UNKNOWN


def wait_in_here(ready, finish):
    ready.set()
    finish.wait()


def totals_of(starts):
    counted, unknown = starts.counted()
    return name_stacks(counted), unknown


def names(stack):
    return [location.function.name.removeprefix(f"{__name__}.") for location in stack]


def test_every_thread_has_a_sample_with_its_name():
    """Also one that was started past `threading`."""
    ready, finish, raw_ready = threading.Event(), threading.Event(), threading.Event()
    thread = threading.Thread(target=wait_in_here, args=(ready, finish), name="waiter")
    thread.start()
    _thread.start_new_thread(wait_in_here, (raw_ready, finish))
    assert ready.wait(20)
    assert raw_ready.wait(20)
    try:
        profile = asyncio.run(ThreadCollector().snapshot())()
        count = ThreadCollector().count()
    finally:
        finish.set()
        thread.join()
    check_valid(profile)
    assert sum(sample.values[0] for sample in profile.samples) == count >= 3
    waiting = [sample for sample in profile.samples if "wait_in_here" in names(sample.stack)]
    assert {dict(sample.labels).get("thread") for sample in waiting} == {"waiter", None}
    waiter = next(dict(each.labels) for each in waiting if dict(each.labels).get("thread"))
    assert waiter["daemon"] == "false"
    assert waiter["native_id"] == str(thread.native_id)
    assert waiter["state"] == "sleeping"
    assert "loop" not in waiter
    (main,) = [each for each in profile.samples if dict(each.labels).get("thread") == "MainThread"]
    assert any("test_every_thread" in name for name in names(main.stack))


def test_threads_count_by_the_stack_that_started_them():
    """Two from one line are one stack with 2; those from before are not among them."""
    starts = ThreadStarts()
    original = threading.Thread.start
    starts.enable()
    try:
        for _ in range(2):
            thread = threading.Thread(target=lambda: None)
            thread.start()
            thread.join()
    finally:
        starts.disable()
    assert threading.Thread.start is original
    totals, unknown = totals_of(starts)
    ((stack, count),) = totals.items()
    assert count == 2
    assert names(stack)[0] == "test_threads_count_by_the_stack_that_started_them"
    assert unknown >= 1
    assert starts.count() == unknown + 2


def test_counts_are_kept_when_switched_off_and_on():
    """Cumulative numbers never fall; threads between do not count."""
    starts = ThreadStarts()
    for _ in range(2):
        starts.enable()
        thread = threading.Thread(target=lambda: None)
        thread.start()
        thread.join()
        starts.disable()
        uncounted = threading.Thread(target=lambda: None)
        uncounted.start()
        uncounted.join()
    totals, _ = totals_of(starts)
    assert sum(totals.values()) == 2


def test_too_many_different_stacks_count_as_unknown(monkeypatch):
    """Memory is bounded, and no thread is lost from the sum."""
    monkeypatch.setattr("asgi_pprof.collectors.threads._MAX_STACKS", 1)
    starts = ThreadStarts()
    starts.enable()
    before = starts.count()
    one = threading.Thread(target=lambda: None)
    one.start()
    two = threading.Thread(target=lambda: None)
    two.start()
    one.join()
    two.join()
    starts.disable()
    totals, unknown = totals_of(starts)
    assert len(totals) == 1
    assert UNKNOWN not in {stack[0] for stack in totals}
    assert sum(totals.values()) + unknown == before + 2


@pytest.mark.parametrize("other_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_a_thread_that_runs_a_loop_says_which_and_its_task(other_loop):
    """Between two tasks only the loop; a daemon is told apart."""
    ready, finish = threading.Event(), threading.Event()

    async def hold():
        asyncio.current_task().set_name("holds")
        wait_in_here(ready, finish)

    def run():
        with asyncio.Runner(loop_factory=other_loop) as runner:
            runner.run(hold())

    thread = threading.Thread(target=run, name="runs a loop", daemon=True)
    thread.start()
    assert ready.wait(20)
    try:
        profile = asyncio.run(ThreadCollector().snapshot())()
    finally:
        finish.set()
        thread.join()
    check_valid(profile)
    labels = {dict(each.labels).get("thread"): dict(each.labels) for each in profile.samples}
    assert labels["runs a loop"]["task"] == "holds"
    assert labels["runs a loop"]["daemon"] == "true"
    assert re.fullmatch(r"(asyncio|uvloop)\..*Loop", labels["runs a loop"]["loop"])
    assert labels["MainThread"]["task"].startswith("Task-")
