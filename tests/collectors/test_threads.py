"""The thread profile has the stack and the labels of each thread."""

from __future__ import annotations

import _thread
import asyncio
import re
import threading

import pytest
import uvloop

from asgi_pprof.collectors.threads import ThreadCollector
from asgi_pprof.runtime.proc import system_labels
from tests.servers import until
from tests.valid import check_valid


def wait_in_here(ready, finish):
    ready.set()
    finish.wait()


def names(stack):
    return [location.function.name.removeprefix(f"{__name__}.") for location in stack]


def test_every_thread_has_a_sample_with_its_name():
    """Threads started without `threading` have one too."""
    ready, finish, raw_ready = threading.Event(), threading.Event(), threading.Event()
    thread = threading.Thread(target=wait_in_here, args=(ready, finish), name="waiter")
    thread.start()
    _thread.start_new_thread(wait_in_here, (raw_ready, finish))
    assert ready.wait(20)
    assert raw_ready.wait(20)
    until(lambda: system_labels(thread.native_id)["state"] == "sleeping")
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


@pytest.mark.parametrize("other_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_a_thread_that_runs_a_loop_has_labels_for_loop_and_task(other_loop):
    """Its labels are the loop's class, the task that runs, and whether the thread is a daemon."""
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
