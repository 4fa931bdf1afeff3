"""The goroutine profile: every task of every loop, where it waits, and under which labels."""

from __future__ import annotations

import asyncio
import re
import threading

import pytest
import uvloop

from asgi_pprof import labels
from asgi_pprof.collectors.tasks import TaskCollector
from asgi_pprof.profile import check_valid

LOOPS = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}


def run(main, loop_name):
    with asyncio.Runner(loop_factory=LOOPS[loop_name]) as runner:
        return runner.run(main)


async def tasks_of(collector):
    return [goroutine async for goroutine in collector.goroutines()]


async def innermost(event):
    await event.wait()


async def middle(event):
    await innermost(event)


async def outermost(event):
    await middle(event)


def names(stack):
    return [location.function.name.removeprefix(f"{__name__}.") for location in stack]


def test_the_whole_chain_of_awaits_is_the_stack(loop_name):
    """Leaf first: what asyncio waits in, then each coroutine up to the task's own."""

    async def main():
        event = asyncio.Event()
        task = asyncio.create_task(outermost(event), name="patient")
        await asyncio.sleep(0)
        profile = (await TaskCollector().snapshot())()
        event.set()
        await task
        return profile

    profile = run(main(), loop_name)
    check_valid(profile)
    (sample,) = [each for each in profile.samples if dict(each.labels)["task"] == "patient"]
    assert names(sample.stack) == ["asyncio.locks.Event.wait", "innermost", "middle", "outermost"]
    assert dict(sample.labels)["state"] == "waiting"
    assert [location.function.filename for location in sample.stack][1:] == [__file__] * 3


def test_states_are_running_runnable_and_waiting(loop_name):
    """The asking task runs; one just made can run; one on an event waits."""

    async def main():
        event = asyncio.Event()
        waiting = asyncio.create_task(outermost(event), name="waits")
        await asyncio.sleep(0)
        runnable = asyncio.create_task(outermost(event), name="can run")
        asyncio.current_task().set_name("asks")
        dump = await tasks_of(TaskCollector())
        event.set()
        await asyncio.gather(waiting, runnable)
        return dump

    dump = run(main(), loop_name)
    states = {dict(goroutine.labels)["task"]: goroutine.state for goroutine in dump}
    assert states == {"asks": "running", "waits": "waiting", "can run": "runnable"}
    assert dict(dump[0].labels)["task"] == "asks"
    assert any("test_states" in name for name in names(dump[0].stack))


def test_equal_tasks_add_up(loop_name):
    """Default names are folded away: 1,000 tasks that wait alike are one sample."""

    async def main():
        event = asyncio.Event()
        tasks = [asyncio.create_task(outermost(event)) for _ in range(1000)]
        await asyncio.sleep(0)
        profile = (await TaskCollector().snapshot())()
        event.set()
        await asyncio.gather(*tasks)
        return profile

    values = [sample.values for sample in run(main(), loop_name).samples]
    assert sorted(values) == [(1,), (1000,)]


def test_labels_come_from_the_tasks_context(loop_name):
    """Those set around create_task, also in a task made by a labelled task."""

    async def parent(event):
        await asyncio.create_task(outermost(event), name="child")

    async def main():
        event = asyncio.Event()
        with labels(tenant="acme"):
            task = asyncio.create_task(parent(event), name="parent")
        plain = asyncio.create_task(outermost(event), name="plain")
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        dump = await tasks_of(TaskCollector())
        event.set()
        await asyncio.gather(task, plain)
        return {dict(each.labels)["task"]: dict(each.labels).get("tenant") for each in dump}

    tenants = run(main(), loop_name)
    assert (tenants["parent"], tenants["child"], tenants["plain"]) == ("acme", "acme", None)


def test_ids_stay_with_their_task(loop_name):
    """A task keeps its id from dump to dump, and no other gets it."""

    async def main():
        event = asyncio.Event()
        task = asyncio.create_task(outermost(event), name="stays")
        await asyncio.sleep(0)
        collector = TaskCollector()
        first = {dict(each.labels)["task"]: each.id for each in await tasks_of(collector)}
        another = asyncio.create_task(outermost(event), name="comes later")
        await asyncio.sleep(0)
        second = {dict(each.labels)["task"]: each.id for each in await tasks_of(collector)}
        event.set()
        await asyncio.gather(task, another)
        return first, second

    first, second = run(main(), loop_name)
    assert second["stays"] == first["stays"]
    assert second["comes later"] not in first.values()


@pytest.mark.parametrize("other_loop", LOOPS)
def test_loops_of_other_threads_are_seen(loop_name, other_loop):
    """A task of a loop that runs in another thread is in the profile."""
    ready, finish = threading.Event(), threading.Event()

    async def elsewhere():
        task = asyncio.create_task(outermost(asyncio.Event()), name="on the other loop")
        await asyncio.sleep(0)
        ready.set()
        await asyncio.to_thread(finish.wait)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    thread = threading.Thread(target=run, args=(elsewhere(), other_loop), name="other loop")
    thread.start()
    try:
        assert ready.wait(20)
        dump = run(tasks_of(TaskCollector()), loop_name)
    finally:
        finish.set()
        thread.join()
    (found,) = [each for each in dump if dict(each.labels)["task"] == "on the other loop"]
    assert names(found.stack)[-1] == "outermost"


def test_other_work_goes_on_between_slices(loop_name):
    """A collector whose clock always says that the slice is over yields after every task."""

    async def main():
        event = asyncio.Event()
        tasks = [asyncio.create_task(outermost(event)) for _ in range(50)]
        await asyncio.sleep(0)
        turns = 0

        async def count_turns():
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        counter = asyncio.create_task(count_turns())
        ticks = iter(range(10**6))
        await tasks_of(TaskCollector(clock=lambda: next(ticks)))
        counter.cancel()
        event.set()
        await asyncio.gather(*tasks, counter, return_exceptions=True)
        return turns

    assert run(main(), loop_name) >= 50


def test_a_task_that_ends_meanwhile_is_left_out(loop_name):
    """Only tasks that are not done when they are looked at count."""

    async def main():
        tasks = [asyncio.create_task(asyncio.sleep(0)) for _ in range(20)]
        ticks = iter(range(10**6))
        dump = await tasks_of(TaskCollector(clock=lambda: next(ticks)))
        await asyncio.gather(*tasks)
        return dump

    assert len(run(main(), loop_name)) < 21


def test_odd_names_do_no_harm(loop_name):
    """Empty names, lone surrogates and line breaks end up as labels."""

    async def main():
        event = asyncio.Event()
        odd = ["", "\udcff", "two\nlines", 'quo"te']
        tasks = [asyncio.create_task(outermost(event), name=name) for name in odd]
        await asyncio.sleep(0)
        profile = (await TaskCollector().snapshot())()
        event.set()
        await asyncio.gather(*tasks)
        return profile

    profile = run(main(), loop_name)
    check_valid(profile)
    found = {dict(sample.labels)["task"] for sample in profile.samples}
    assert {"?", "\udcff", "two\nlines", 'quo"te'} <= found
    assert any(re.fullmatch("Task", name) for name in found)
