"""The goroutine profile has every task of every loop, what it waits for, and its labels."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import re
import sys
import threading
import time
import types
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import ClassVar

import anyio
import anyio.from_thread
import anyio.to_thread
import pytest

from asgi_pprof import labels
from asgi_pprof.collectors.goroutine.collector import TaskCollector
from asgi_pprof.collectors.goroutine.leak_collector import LeakCollector
from asgi_pprof.collectors.goroutine.waits import WAITING_FOR_A_THREAD
from asgi_pprof.runtime.tasks import waits_for
from tests.loops import LOOPS, iterations, run, until
from tests.programs import run_program
from tests.proxy import Proxy
from tests.valid import check_valid


async def dump_of(collector=None):
    """Return the tasks in the order of the dump."""
    return [each async for each in (collector or TaskCollector()).goroutines()]


async def tasks_of(collector=None):
    """Return the tasks of a dump by name."""
    return {label(each, "task"): each for each in await dump_of(collector)}


async def profile_of(collector=None):
    profile = (await (collector or TaskCollector()).snapshot())()
    check_valid(profile)
    return profile


def label(one, key):
    return dict(one.labels).get(key)


@contextlib.asynccontextmanager
async def waiting(**coroutines):
    """Yield once tasks with these names wait; then cancel all tasks but the current one."""
    tasks = [asyncio.create_task(each, name=name) for name, each in coroutines.items()]
    try:
        await iterations()
        yield tasks
    finally:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for each in others:
            each.cancel()
        await asyncio.gather(*others, return_exceptions=True)


async def innermost(event):
    await event.wait()


async def middle(event):
    await innermost(event)


async def outermost(event):
    await middle(event)


def names(stack):
    return [location.function.name.removeprefix(f"{__name__}.") for location in stack]


def test_the_whole_chain_of_awaits_is_the_stack(loop_name):
    """The innermost coroutine, asyncio's, comes first, and the task's own coroutine last."""

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
    assert dict(sample.labels)["state"] == "Event.wait"
    assert [location.function.filename for location in sample.stack][1:] == [__file__] * 3


@pytest.mark.parametrize("collector", [TaskCollector, lambda: LeakCollector(TaskCollector())])
def test_a_task_that_awaits_a_proxied_coroutine_has_its_stack(collector, loop_name):
    """Tracing tools wrap coroutines in proxies. The task's stack goes through the proxy."""

    async def main():
        event = asyncio.Event()

        async def await_proxy():
            await Proxy(innermost(event))

        async with waiting(proxied=Proxy(outermost(event)), awaits=await_proxy()):
            await profile_of(collector())
            found = await tasks_of()
            return names(found["proxied"].stack), names(found["awaits"].stack)

    proxied, awaits = run(main(), loop_name)
    assert proxied[-3:] == ["innermost", "middle", "outermost"]
    assert awaits[-2].endswith("innermost")
    assert awaits[-1].endswith("await_proxy")


async def spin_until(event):
    while not event.is_set():  # noqa: ASYNC110  this task is always runnable
        await asyncio.sleep(0)


def test_states_are_running_runnable_and_what_is_waited_for(loop_name):
    """The task that takes the profile runs. One that yields is runnable, one on an event waits."""

    async def main():
        event = asyncio.Event()
        waiting = asyncio.create_task(outermost(event), name="waits")
        await asyncio.sleep(0)
        runnable = asyncio.create_task(spin_until(event), name="can run")
        asyncio.current_task().set_name("asks")
        dump = await dump_of()
        event.set()
        await asyncio.gather(waiting, runnable)
        return dump

    dump = run(main(), loop_name)
    states = {dict(goroutine.labels)["task"]: goroutine.state for goroutine in dump}
    assert states == {"asks": "running", "waits": "Event.wait", "can run": "runnable"}
    assert dict(dump[0].labels)["task"] == "asks"
    assert any("test_states" in name for name in names(dump[0].stack))


def test_equal_tasks_add_up():
    """Default names lose their numbers, so 10,000 tasks at one place are one sample."""

    async def main():
        event = asyncio.Event()
        tasks = [asyncio.create_task(outermost(event)) for _ in range(10_000)]
        await asyncio.sleep(0)
        profile = (await TaskCollector().snapshot())()
        event.set()
        await asyncio.gather(*tasks)
        return profile

    # Debug mode, which the tests use, takes seconds to create so many tasks.
    values = [sample.values for sample in run(main(), debug=False).samples]
    assert sorted(values) == [(1,), (10_000,)]


def test_labels_come_from_the_tasks_context(loop_name):
    """They are set around create_task. A task that a labelled task creates inherits them."""

    async def parent(event):
        await asyncio.create_task(outermost(event), name="child")

    async def main():
        event = asyncio.Event()
        with labels(tenant="acme"):
            task = asyncio.create_task(parent(event), name="parent")
        plain = asyncio.create_task(outermost(event), name="plain")
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        dump = await dump_of()
        event.set()
        await asyncio.gather(task, plain)
        return {dict(each.labels)["task"]: dict(each.labels).get("tenant") for each in dump}

    tenants = run(main(), loop_name)
    assert (tenants["parent"], tenants["child"], tenants["plain"]) == ("acme", "acme", None)


def test_a_task_keeps_its_id(loop_name):
    """It has the same id in each dump, and no other task gets that id."""

    async def main():
        event = asyncio.Event()
        task = asyncio.create_task(outermost(event), name="stays")
        await asyncio.sleep(0)
        collector = TaskCollector()
        first = {name: each.id for name, each in (await tasks_of(collector)).items()}
        another = asyncio.create_task(outermost(event), name="comes later")
        await asyncio.sleep(0)
        second = {name: each.id for name, each in (await tasks_of(collector)).items()}
        event.set()
        await asyncio.gather(task, another)
        return first, second

    first, second = run(main(), loop_name)
    assert second["stays"] == first["stays"]
    assert second["comes later"] not in first.values()


@pytest.mark.parametrize("other_loop", LOOPS)
def test_tasks_of_other_threads_loops_are_in_the_profile(loop_name, other_loop):
    """The other loop runs in another thread."""
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
        dump = run(dump_of(), loop_name)
    finally:
        finish.set()
        thread.join()
    (found,) = [each for each in dump if dict(each.labels)["task"] == "on the other loop"]
    assert names(found.stack)[-1] == "outermost"


def test_the_loop_runs_other_work_between_slices(loop_name):
    """With a slice length of 0, the collector yields to the loop after every task."""

    async def main():
        event = asyncio.Event()
        tasks = [asyncio.create_task(outermost(event)) for _ in range(50)]
        await asyncio.sleep(0)
        iterations = 0

        async def count_iterations():
            nonlocal iterations
            while True:
                iterations += 1
                await asyncio.sleep(0)

        counter = asyncio.create_task(count_iterations())
        ticks = iter(range(10**6))
        await dump_of(TaskCollector(clock=lambda: next(ticks)))
        counter.cancel()
        event.set()
        await asyncio.gather(*tasks, counter, return_exceptions=True)
        return iterations

    assert run(main(), loop_name) >= 50


def test_a_task_that_ends_meanwhile_is_left_out(loop_name):
    """Only tasks that are not done when they are read are counted."""

    async def main():
        tasks = [asyncio.create_task(asyncio.sleep(0)) for _ in range(20)]
        ticks = iter(range(10**6))
        dump = await dump_of(TaskCollector(clock=lambda: next(ticks)))
        await asyncio.gather(*tasks)
        return dump

    assert len(run(main(), loop_name)) < 21


def test_odd_names_do_no_harm(loop_name):
    """Empty names, lone surrogates and line breaks become labels."""

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


# Chains of awaits


async def generator(event):
    await innermost(event)
    yield 1


async def generator_of_a_generator(event):
    async for each in generator(event):
        yield each


async def iterates(event):
    async for _ in generator_of_a_generator(event):
        pass


async def comprehends(event):
    return [each async for each in generator(event)]


async def comprehends_in_a_generator_expression(event):
    async for _ in (each async for each in generator(event)):
        pass


class AwaitableByGenerator:
    def __init__(self, event):
        self.event = event

    def __await__(self):
        return (yield from innermost(self.event).__await__())


class AwaitableByAnother(AwaitableByGenerator):
    def __await__(self):
        return innermost(self.event).__await__()


class Steps:
    """An iterator that is not a generator, so it has no frame."""

    def __init__(self, event):
        self.future = asyncio.get_running_loop().create_future()

    def __await__(self):
        return self

    def __iter__(self):
        return self

    def __next__(self):
        self.future._asyncio_future_blocking = True
        return self.future


async def awaits_by_generator(event):
    await AwaitableByGenerator(event)


async def awaits_by_another(event):
    await AwaitableByAnother(event)


async def awaits_an_iterator(event):
    await Steps(event)


@types.coroutine
def generator_based(event):
    yield from innermost(event)


async def awaits_generator_based(event):
    await generator_based(event)


async def sends(event):
    await generator(event).asend(None)


async def takes_the_next(event):
    await anext(generator(event))


async def takes_the_next_or_none(event):
    await anext(generator(event), None)


async def waits_when_thrown_at(event):
    try:
        yield
    except ValueError:
        await innermost(event)


async def throws(event):
    thrown_at = waits_when_thrown_at(event)
    await anext(thrown_at)
    await thrown_at.athrow(ValueError())


async def waits_when_closed(event):
    try:
        yield
    finally:
        await innermost(event)


async def closes(event):
    closed = waits_when_closed(event)
    await anext(closed)
    await closed.aclose()


@contextlib.asynccontextmanager
async def managed(event):
    await innermost(event)
    yield


async def enters(event):
    async with managed(event):
        pass


async def waits_with_a_timeout(event):
    await asyncio.wait_for(innermost(event), 3600)


async def in_a_timeout(event):
    async with asyncio.timeout(3600):
        await innermost(event)


async def fails_after(event):
    with anyio.fail_after(3600):
        await innermost(event)


async def moves_on_after(event):
    with anyio.move_on_after(3600), anyio.CancelScope(shield=True):
        await innermost(event)


INNERMOST = ["asyncio.locks.Event.wait", "innermost"]
LISTCOMP = ["comprehends.<locals>.<listcomp>"] if sys.version_info < (3, 12) else []
STACKS = {
    iterates: [*INNERMOST, "generator", "generator_of_a_generator", "iterates"],
    comprehends: [*INNERMOST, "generator", *LISTCOMP, "comprehends"],
    comprehends_in_a_generator_expression: [
        *INNERMOST,
        "generator",
        "comprehends_in_a_generator_expression.<locals>.<genexpr>",
        "comprehends_in_a_generator_expression",
    ],
    awaits_by_generator: [*INNERMOST, "AwaitableByGenerator.__await__", "awaits_by_generator"],
    awaits_by_another: [*INNERMOST, "awaits_by_another"],
    awaits_an_iterator: [f"<{__name__}.Steps>", "awaits_an_iterator"],
    awaits_generator_based: [*INNERMOST, "generator_based", "awaits_generator_based"],
    sends: [*INNERMOST, "generator", "sends"],
    takes_the_next: [*INNERMOST, "generator", "takes_the_next"],
    takes_the_next_or_none: [*INNERMOST, "generator", "takes_the_next_or_none"],
    throws: [*INNERMOST, "waits_when_thrown_at", "throws"],
    closes: [*INNERMOST, "waits_when_closed", "closes"],
    enters: [
        *INNERMOST,
        "managed",
        "contextlib._AsyncGeneratorContextManager.__aenter__",
        "enters",
    ],
    in_a_timeout: [*INNERMOST, "in_a_timeout"],
    fails_after: [*INNERMOST, "fails_after"],
    moves_on_after: [*INNERMOST, "moves_on_after"],
}


def test_every_kind_of_await_is_followed(loop_name):
    """The chain is followed to its end. Between coroutines, only objects with frames are shown."""

    async def main():
        async with waiting(**{wait.__name__: wait(asyncio.Event()) for wait in STACKS}):
            return await tasks_of()

    dump = run(main(), loop_name)
    found = {wait: names(dump[wait.__name__].stack) for wait in STACKS}
    assert found == STACKS
    states = {wait: dump[wait.__name__].state for wait in STACKS}
    assert states == dict.fromkeys(STACKS, "Event.wait") | {awaits_an_iterator: "Future"}


def test_a_wait_with_a_timeout_is_followed(loop_name):
    """Up to 3.11 the inner part runs in a task of its own, and the stack ends with its number."""

    async def main():
        async with waiting(it=waits_with_a_timeout(asyncio.Event())):
            found = await dump_of()
            (it,) = [each for each in found if label(each, "task") == "it"]
            return it, [each for each in found if label(each, "awaited_by") == str(it.id)]

    it, inner = run(main(), loop_name)
    outer = ["asyncio.tasks.wait_for", "waits_with_a_timeout"]
    if sys.version_info < (3, 12):
        assert (it.state, names(it.stack)) == ("Task", outer)
        assert [names(each.stack) for each in inner] == [INNERMOST]
        assert label(it, "awaits") == str(inner[0].id)
    else:
        assert (it.state, names(it.stack)) == ("Event.wait", [*INNERMOST, *outer])
        assert inner == []


@pytest.mark.parametrize(("depth", "shown"), [(100, 100), (500, 128)])
def test_deep_chains_keep_their_inner_part(depth, shown, loop_name):
    """As in Go, 128 locations are kept, and a mark stands for the outer ones."""

    async def descend(left, event):
        if left:
            await descend(left - 1, event)
        else:
            await event.wait()

    async def main():
        async with waiting(deep=descend(depth - 2, asyncio.Event())):
            return (await tasks_of())["deep"]

    stack = names(run(main(), loop_name).stack)
    assert stack[0] == "asyncio.locks.Event.wait"
    assert sum(each.endswith("descend") for each in stack[:shown]) == shown - 1
    assert len(stack) == (depth if depth == shown else shown + 1)
    assert stack[-1].startswith("<truncated") == (depth != shown)


# Tasks that wait for tasks


async def joins(name, event, *, times=2):
    """Wait for some tasks of the same kind in the given way."""
    children = [innermost(event) for _ in range(times)]
    if name == "gather":
        await asyncio.gather(*children)
    elif name == "wait":
        await asyncio.wait([asyncio.create_task(each) for each in children])
    elif name == "as_completed":
        for each in asyncio.as_completed(children):
            await each
    elif name == "TaskGroup":
        async with asyncio.TaskGroup() as group:
            for each in children:
                group.create_task(each)
    else:
        for each in children:
            each.close()
        async with anyio.create_task_group() as group:
            for _ in children:
                group.start_soon(innermost, event)


@pytest.mark.parametrize("way", ["gather", "wait", "as_completed", "TaskGroup", "anyio"])
def test_tasks_that_wait_for_each_other_name_each_other(way, loop_name):
    """A task has the numbers of the tasks that it waits for, and they have its number."""

    async def main():
        async with waiting(parent=joins(way, asyncio.Event())):
            return await dump_of(), await profile_of()

    dump, profile = run(main(), loop_name)
    (parent,) = [each for each in dump if label(each, "task") == "parent"]
    children = [each for each in dump if "innermost" in names(each.stack)]
    assert parent.state == (way if way != "anyio" else "TaskGroup")
    assert label(parent, "awaits") == ", ".join(str(each.id) for each in children)
    assert [label(each, "awaited_by") for each in children] == [str(parent.id)] * 2
    (sample,) = [each for each in profile.samples if label(each, "task") == "parent"]
    # A number would make equal tasks differ.
    assert label(sample, "awaits").endswith("innermost")
    assert label(sample, "state") == parent.state


def test_the_innermost_tasks_of_nested_gathers_are_awaited(loop_name):
    """The inner gather is not a task, and is skipped."""

    async def nested(event):
        inner = asyncio.gather(innermost(event), innermost(event))
        await asyncio.gather(innermost(event), inner)

    async def main():
        async with waiting(parent=nested(asyncio.Event())):
            return await dump_of()

    dump = run(main(), loop_name)
    (parent,) = [each for each in dump if label(each, "task") == "parent"]
    children = [str(each.id) for each in dump if label(each, "awaited_by") == str(parent.id)]
    assert parent.state == "gather"
    assert len(children) == 3
    assert label(parent, "awaits") == ", ".join(children)


def test_a_chain_of_tasks_is_linked(loop_name):
    """Each task in the chain awaits the next one, directly or through shield."""

    async def awaits(task):
        await task

    async def shields(task):
        await asyncio.shield(task)

    async def main():
        async with waiting(a=innermost(asyncio.Event())) as (a,):
            b = asyncio.create_task(shields(a), name="b")
            c = asyncio.create_task(awaits(b), name="c")
            await iterations()
            found = await tasks_of()
            c.cancel()
            return found

    dump = run(main(), loop_name)
    a, b, c = (dump[name] for name in "abc")
    assert (a.state, b.state, c.state) == ("Event.wait", "shield", "Task")
    assert (label(c, "awaits"), label(b, "awaits"), label(a, "awaits")) == (
        str(b.id),
        str(a.id),
        None,
    )
    assert (label(b, "awaited_by"), label(a, "awaited_by")) == (str(c.id), str(b.id))


def test_several_tasks_may_wait_for_one(loop_name):
    """The awaited task has all their numbers, in order."""

    async def awaits(task):
        await asyncio.shield(task)

    async def main():
        async with waiting(one=innermost(asyncio.Event())) as (one,):
            waiters = [asyncio.create_task(awaits(one), name=f"w{number}") for number in range(3)]
            await iterations()
            assert not any(each.done() for each in waiters)
            return await tasks_of()

    dump = run(main(), loop_name)
    waiters = sorted(dump[f"w{number}"].id for number in range(3))
    assert label(dump["one"], "awaited_by") == ", ".join(map(str, waiters))


def test_a_dag_of_tasks_stays_linear():
    """Each of 300 tasks gathers all later ones. The label has ten numbers, and how many more."""
    count = 300

    async def gathers(tasks, number, event):
        await event.wait()
        later = tasks[number + 1 :]
        await (asyncio.gather(*later) if later else asyncio.Event().wait())

    async def main():
        start = asyncio.Event()
        tasks = []
        tasks += [
            asyncio.create_task(gathers(tasks, number, start), name=f"t{number}")
            for number in range(count)
        ]
        await iterations()
        start.set()
        await until(lambda: all(map(waits_for, tasks)) and start.is_set())
        await iterations()
        dump, profile = await tasks_of(), await profile_of()
        tasks[-1].cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return dump, profile

    dump, profile = run(main(), debug=False)
    assert len([each for each in dump if each.startswith("t")]) == count
    for number in range(count):
        awaits = label(dump[f"t{number}"], "awaits") or ""
        awaited_by = label(dump[f"t{number}"], "awaited_by") or ""
        assert edges_in(awaits) == count - 1 - number
        assert edges_in(awaited_by) == number
        assert len(awaits.split(", ")) <= 10
        assert len(awaited_by.split(", ")) <= 10
    assert sum(sample.values[0] for sample in profile.samples) == count + 1


def edges_in(text):
    numbers, _, more = text.partition(" and ")
    return len(re.findall(r"\d+", numbers)) + int(more.removesuffix(" more") or 0)


def test_a_cycle_of_waiting_tasks_is_shown(loop_name):
    """Each task has the number of the next one."""

    async def waits(tasks, number):
        await asyncio.wait([tasks[number]])

    async def main():
        tasks = []
        async with waiting():
            tasks += [
                asyncio.create_task(waits(tasks, (number + 1) % 3), name=f"t{number}")
                for number in range(3)
            ]
            await iterations()
            return await tasks_of()

    dump = run(main(), loop_name)
    ids = [dump[f"t{number}"].id for number in range(3)]
    assert [label(dump[f"t{number}"], "awaits") for number in range(3)] == [
        str(ids[1]),
        str(ids[2]),
        str(ids[0]),
    ]


def test_tasks_that_await_each_other_can_be_read():
    """Cancelling two tasks that await each other would never end; reading them does."""
    program = """
        import asyncio, os
        from tests.collectors.goroutine.test_collector import label, tasks_of
        from tests.loops import iterations, run

        async def awaits(tasks, name):
            await tasks[name]

        async def main():
            tasks = {}
            tasks["a"] = asyncio.create_task(awaits(tasks, "b"), name="a")
            tasks["b"] = asyncio.create_task(awaits(tasks, "a"), name="b")
            await iterations()
            dump = await tasks_of()
            a, b = dump["a"], dump["b"]
            assert (a.state, b.state) == ("Task", "Task")
            assert (label(a, "awaits"), label(b, "awaits")) == (str(b.id), str(a.id))
            print("seen", flush=True)
            os._exit(0)

        run(main())
    """
    assert run_program(program) == "seen\n"


@pytest.mark.parametrize("other_loop", LOOPS)
def test_a_task_of_another_loop_is_linked(loop_name, other_loop):
    """A task that awaits `run_coroutine_threadsafe`'s future waits for the other loop's task."""

    async def main(other):
        async def there():
            await innermost(asyncio.Event())

        async def awaits():
            await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(there(), other))

        async with waiting(here=awaits()):
            found = {}

            async def look():
                found.clear()
                found.update({each.id: each for each in await dump_of()})
                # The other loop may not have begun its task yet.
                return [
                    each
                    for each in found.values()
                    if "awaits" in dict(each.labels)
                    and found[int(label(each, "awaits"))].state == "Event.wait"
                ]

            end = time.monotonic() + 20
            while not (linked := await look()) and time.monotonic() < end:
                pass
            (here,) = linked
            return here, found[int(label(here, "awaits"))]

    with a_loop(other_loop) as other:
        here, there = run(main(other), loop_name)
    assert (label(here, "task"), here.state) == ("here", "Task")
    assert names(there.stack)[:2] == INNERMOST
    assert label(there, "awaited_by") == str(here.id)


@contextlib.contextmanager
def a_loop(loop_name, serve=None, name="other loop"):
    """Yield a loop that runs in another thread; cancel its tasks at the end."""
    ready, loops = threading.Event(), []

    async def main():
        end = asyncio.Event()
        loops.extend([asyncio.get_running_loop(), end])
        task = asyncio.create_task(serve(), name="serves") if serve else None
        asyncio.get_running_loop().call_soon(ready.set)
        await end.wait()
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    thread = threading.Thread(target=run, args=(main(), loop_name), name=name)
    thread.start()
    try:
        assert ready.wait(20)
        yield loops[0]
    finally:
        loops[0].call_soon_threadsafe(loops[1].set)
        thread.join(20)


# Requests to cancel


class Hostile:
    """What a class of tasks may do to those who read its tasks."""

    asked: ClassVar[list[str]] = []

    def __getattribute__(self, name):
        if name in ("cancelling", "_num_cancels_requested"):
            Hostile.asked.append(name)
        return super().__getattribute__(name)


class HostileInC(Hostile, asyncio.Task):
    pass


class HostileInPython(Hostile, asyncio.tasks._PyTask):
    pass


async def survives(requests):
    """End only after so many requests to cancel."""
    for _ in range(requests):
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
    await asyncio.Event().wait()


async def send(task, requests):
    for _ in range(requests):
        task.cancel()
        await iterations(2)


@pytest.mark.parametrize(
    "kind",
    [asyncio.Task, asyncio.tasks._PyTask, HostileInC, HostileInPython],
    ids=lambda kind: kind.__name__,
)
def test_a_task_that_was_cancelled_and_lives_on_says_so(kind, loop_name):
    """It says how often, in the dump and in the profile. No code of the task's class is asked."""

    async def main():
        loop = asyncio.get_running_loop()
        tasks = [kind(survives(3), loop=loop, name=name) for name in ("cancelled", "untouched")]
        await iterations()
        await send(tasks[0], 3)
        Hostile.asked.clear()
        found = await tasks_of(), (await profile_of()).samples, tuple(Hostile.asked)
        await send(tasks[0], 1)
        await send(tasks[1], 4)
        return found

    found, samples, asked = run(main(), loop_name)
    assert asked == ()
    in_profile = {label(each, "task"): each for each in samples}
    for each in (found, in_profile):
        assert label(each["cancelled"], "cancelling") == "3"
        assert label(each["untouched"], "cancelling") is None


def test_a_request_that_was_taken_back_does_not_count():
    """`uncancel` takes it back; timeouts do so as well."""

    async def uncancels():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        asyncio.current_task().uncancel()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0):
                await asyncio.Event().wait()
        await asyncio.Event().wait()

    async def main():
        async with waiting(it=uncancels()) as (task,):
            await send(task, 1)
            return (await tasks_of())["it"]

    assert label(run(main()), "cancelling") is None


@pytest.mark.once
@pytest.mark.parametrize(
    ("requests", "shown"), [(9, "9"), (10, "10 or more"), (250, "100 or more")]
)
def test_the_profile_rounds_the_number_of_many_requests(requests, shown):
    """Else each of the tasks to which requests are sent for ever would be a sample of its own."""

    async def main():
        task = asyncio.create_task(survives(requests), name="it")
        await iterations()
        await send(task, requests)
        found = (await tasks_of())["it"], (await profile_of()).samples
        await send(task, 1)
        return found

    found, samples = run(main())
    assert label(found, "cancelling") == str(requests)
    (sample,) = [each for each in samples if label(each, "task") == "it"]
    assert label(sample, "cancelling") == shown


# Worker threads


class Job:
    """Work for a thread, which blocks until `end` is set."""

    def __init__(self):
        self.begun, self.end = threading.Event(), threading.Event()

    def run(self):
        self.begun.set()
        self.end.wait()


async def in_an_executor(function, pool=None):
    await asyncio.get_running_loop().run_in_executor(pool, function)


async def in_asyncios_thread(function):
    await asyncio.to_thread(function)


async def in_anyios_thread(function, limiter=None):
    await anyio.to_thread.run_sync(function, limiter=limiter)


async def in_a_thread_in_time(function):
    await asyncio.wait_for(asyncio.to_thread(function), 3600)


TO_THREAD = ["asyncio.threads.to_thread"]
RUN_SYNC = [
    "anyio._backends._asyncio.AsyncIOBackend.run_sync_in_worker_thread",
    "anyio.to_thread.run_sync",
]
IN_THREADS = {
    in_an_executor: (["in_an_executor"], "{}_0"),
    in_asyncios_thread: ([*TO_THREAD, "in_asyncios_thread"], "{}_0"),
    in_anyios_thread: ([*RUN_SYNC, "in_anyios_thread"], "AnyIO worker thread"),
}


@pytest.mark.parametrize("wait", IN_THREADS, ids=lambda wait: wait.__name__)
def test_a_worker_threads_frames_are_the_inner_part_of_the_stack(wait, loop_name):
    """A boundary and the task's frames follow; the pool's own frames are left out."""

    async def main():
        job = Job()
        async with waiting(it=wait(job.run)) as (task,):
            await until(job.begun.is_set)
            found, profile = (await tasks_of())["it"], await profile_of()
            job.end.set()
            await task
        return found, profile

    found, profile = run(main(), loop_name)
    outer, thread = IN_THREADS[wait]
    stack = names(found.stack)
    boundary = stack.index("<worker thread>")
    assert stack[:boundary][-2:] == ["threading.Event.wait", "Job.run"]
    assert stack[boundary + 1 :] == outer
    assert found.state == "executor"
    assert label(found, "thread") == thread.format(loop_name)
    (sample,) = [each for each in profile.samples if label(each, "task") == "it"]
    assert names(sample.stack)[boundary - 1 :] == ["Job.run", "<worker thread>", *outer]
    assert label(sample, "thread") is None  # a number in the label would make equal tasks differ
    assert profile.comments == ()


async def shielded(function):
    await asyncio.shield(asyncio.get_running_loop().run_in_executor(None, function))


async def shielded_in_time(function):
    job = asyncio.get_running_loop().run_in_executor(None, function)
    await asyncio.wait_for(asyncio.shield(job), 3600)


async def gathered(function):
    await asyncio.gather(asyncio.get_running_loop().run_in_executor(None, function))


async def gathered_beside_one_that_is_done(function):
    loop = asyncio.get_running_loop()
    done = loop.create_future()
    done.set_result(None)
    await asyncio.shield(asyncio.gather(done, loop.run_in_executor(None, function)))


async def wrapped(function):
    with ThreadPoolExecutor(1) as pool:
        await asyncio.wrap_future(pool.submit(function))


async def waited(function):
    await asyncio.wait([asyncio.get_running_loop().run_in_executor(None, function)])


async def completed(function):
    for each in asyncio.as_completed([asyncio.get_running_loop().run_in_executor(None, function)]):
        await each


async def as_django(function):
    sync = pytest.importorskip("asgiref.sync")
    async with sync.ThreadSensitiveContext():  # as in Django's handler of ASGI requests
        await sync.sync_to_async(function)()


@pytest.mark.parametrize(
    "wait",
    [
        shielded,
        shielded_in_time,
        gathered,
        gathered_beside_one_that_is_done,
        wrapped,
        waited,
        completed,
        as_django,
    ],
    ids=lambda wait: wait.__name__,
)
def test_a_worker_thread_behind_other_futures_is_shown(wait, loop_name):
    """A task that waits for nothing but the thread's work is continued into the thread."""

    async def main():
        job = Job()
        async with waiting(it=wait(job.run)) as (task,):
            await until(lambda: job.begun.is_set() or (task.done() and task.result()))
            found = (await tasks_of())["it"]
            job.end.set()
            await task
        return found

    found = run(main(), loop_name)
    stack = names(found.stack)
    boundary = stack.index("<worker thread>")
    assert stack[:2] == ["threading.Condition.wait", "threading.Event.wait"]
    assert "Job.run" in stack[:boundary]
    assert stack[-1] == wait.__name__
    assert found.state == "executor"
    assert label(found, "thread")


def test_several_threads_that_a_task_waits_for_are_named(loop_name):
    """The task waits for all of them, so it is continued into none."""

    async def main():
        jobs = [Job() for _ in range(12)]
        with ThreadPoolExecutor(12, thread_name_prefix="shop") as pool:
            loop = asyncio.get_running_loop()

            async def few():
                await asyncio.gather(*(loop.run_in_executor(pool, job.run) for job in jobs[:2]))

            async def more():
                await asyncio.wait([loop.run_in_executor(pool, job.run) for job in jobs[2:]])

            async def and_a_task(task):
                await asyncio.gather(task, loop.run_in_executor(pool, innermost_job.run))

            async with waiting(few=few()) as (first,):
                await until(lambda: all(job.begun.is_set() for job in jobs[:2]))
                second = asyncio.create_task(more(), name="more")
                await until(lambda: all(job.begun.is_set() for job in jobs))
                innermost_job = Job()
                third = asyncio.create_task(and_a_task(second), name="and a task")
                await iterations()
                found = await tasks_of()
                for job in (*jobs, innermost_job):
                    job.end.set()
                await asyncio.gather(first, second, third)
        return found

    found = run(main(), loop_name)
    assert [found[name].state for name in ("few", "more", "and a task")] == [
        "gather",
        "wait",
        "gather",
    ]
    assert sorted(label(found["few"], "thread").split(", ")) == ["shop_0", "shop_1"]
    assert label(found["more"], "thread").count("shop_") == 10
    assert label(found["and a task"], "thread") is None
    assert label(found["and a task"], "workers") == "12 of 12 busy"
    assert label(found["and a task"], "awaits") == str(found["more"].id)
    assert names(found["few"].stack) == [
        "test_several_threads_that_a_task_waits_for_are_named.<locals>.main.<locals>.few"
    ]


def test_a_worker_thread_behind_a_timeout_is_shown(loop_name):
    """Up to 3.11 its frames are shown with the task that `wait_for` has created."""

    async def main():
        job = Job()
        async with waiting(it=in_a_thread_in_time(job.run)) as (task,):
            await until(job.begun.is_set)
            dump = await dump_of()
            job.end.set()
            await task
        return dump

    dump = run(main(), loop_name)
    (found,) = [each for each in dump if "<worker thread>" in names(each.stack)]
    stack = names(found.stack)
    assert stack[stack.index("<worker thread>") - 1] == "Job.run"
    outer = stack[stack.index("<worker thread>") + 1 :]
    if sys.version_info < (3, 12):
        assert outer == TO_THREAD
        assert label(found, "awaited_by")
    else:
        assert outer == [*TO_THREAD, "asyncio.tasks.wait_for", "in_a_thread_in_time"]


@pytest.mark.parametrize("wait", IN_THREADS, ids=lambda wait: wait.__name__)
def test_a_c_function_in_a_worker_thread_is_named(wait, loop_name):
    """It has no frames, so its name is shown."""

    async def main():
        reading, writing = os.pipe()
        async with waiting(it=wait(functools.partial(os.read, reading, 1))) as (task,):
            dump = {}

            async def look():
                dump.update(await tasks_of())
                return "<worker thread>" in names(dump["it"].stack)

            end = time.monotonic() + 20
            while not await look():
                assert time.monotonic() < end
            os.write(writing, b"x")
            await task
        os.close(reading)
        os.close(writing)
        return dump["it"]

    found = run(main(), loop_name)
    outer, _ = IN_THREADS[wait]
    assert names(found.stack) == ["<posix.read>", "<worker thread>", *outer]


def test_tasks_whose_work_is_queued_for_an_executor(loop_name):
    """They say how busy the pool is. The profile's comments say how many tasks wait for it."""

    async def main():
        job = Job()
        with ThreadPoolExecutor(1) as pool:
            async with waiting(first=in_an_executor(job.run, pool)) as (first,):
                await until(job.begun.is_set)
                queued = [
                    asyncio.create_task(in_an_executor(job.run, pool), name=f"queued {number}")
                    for number in range(2)
                ]
                await iterations()
                dump, profile = await tasks_of(), await profile_of()
                job.end.set()
                await asyncio.gather(first, *queued)
        return dump, profile

    dump, profile = run(main(), loop_name)
    for name in ("queued 0", "queued 1"):
        assert dump[name].state == WAITING_FOR_A_THREAD
        assert label(dump[name], "workers") == "1 of 1 busy"
        assert names(dump[name].stack) == ["in_an_executor"]
    assert dump["first"].state == "executor"
    assert profile.comments == ("2 tasks wait for a thread: 1 of 1 busy",)


def test_tasks_whose_work_is_queued_for_anyios_threads(loop_name):
    """The tokens of anyio's limiter count as threads."""

    async def main():
        job, limiter = Job(), anyio.CapacityLimiter(1)
        async with waiting(first=in_anyios_thread(job.run, limiter)) as (first,):
            await until(job.begun.is_set)
            queued = asyncio.create_task(in_anyios_thread(job.run, limiter), name="queued")
            await iterations()
            dump, profile = await tasks_of(), await profile_of()
            job.end.set()
            await asyncio.gather(first, queued)
        return dump, profile

    dump, profile = run(main(), loop_name)
    assert dump["queued"].state == WAITING_FOR_A_THREAD
    assert label(dump["queued"], "workers") == "1 of 1 busy"
    assert names(dump["queued"].stack)[-3:] == [*RUN_SYNC, "in_anyios_thread"]
    assert dump["first"].state == "executor"
    assert profile.comments == ("1 task waits for a thread: 1 of 1 busy",)


def test_tasks_made_in_worker_threads_have_labels(loop_name):
    """The labels follow the work into the thread, and its coroutine back to the loop."""

    async def through_anyio(event):
        await anyio.to_thread.run_sync(anyio.from_thread.run, innermost, event)

    async def through_asyncio(event):
        loop = asyncio.get_running_loop()

        def work():
            asyncio.run_coroutine_threadsafe(middle(event), loop).result()

        await asyncio.to_thread(work)

    async def main():
        event = asyncio.Event()
        with labels(tenant="acme"):
            tasks = [asyncio.create_task(through_anyio(event), name="anyio")]
        with labels(tenant="bolt"):
            tasks.append(asyncio.create_task(through_asyncio(event), name="asyncio"))
        await until(lambda: len(event._waiters) == 2)
        dump = await dump_of()
        event.set()
        await asyncio.gather(*tasks)
        return dump

    made = [each for each in run(main(), loop_name) if names(each.stack)[0] == INNERMOST[0]]
    inner = {
        "middle" if "middle" in names(each.stack) else "innermost": label(each, "tenant")
        for each in made
        if "innermost" in names(each.stack)
    }
    assert inner == {"innermost": "acme", "middle": "bolt"}


# All tasks


def test_all_tasks_are_counted(loop_name):
    """The profile has as many as `asyncio.all_tasks`, including eager ones and other classes."""

    class Derived(asyncio.Task):
        pass

    async def main():
        loop, event = asyncio.get_running_loop(), asyncio.Event()
        kinds = {"C": asyncio.Task, "derived": Derived, "Python": asyncio.tasks._PyTask}
        tasks = [kind(innermost(event), loop=loop, name=name) for name, kind in kinds.items()]
        if sys.version_info >= (3, 12):
            eager = asyncio.Task(innermost(event), loop=loop, eager_start=True, name="eager")
            tasks.append(eager)
        async with waiting():
            # From 3.14 on `all_tasks` leaves out tasks of the class written in Python.
            known = asyncio.all_tasks().union(tasks)
            expected = {each.get_name() for each in known}
            collector = TaskCollector()
            return expected, await dump_of(collector), collector.count(), await profile_of()

    expected, dump, count, profile = run(main(), loop_name)
    assert len(expected) == (5 if sys.version_info >= (3, 12) else 4)
    assert Counter(label(each, "task") for each in dump) == Counter(expected)
    assert count == len(expected)
    assert sum(sample.values[0] for sample in profile.samples) == len(expected)
    stacks = {label(each, "task"): names(each.stack) for each in dump}
    assert stacks["C"] == stacks["derived"] == stacks["Python"] == INNERMOST


def test_the_dump_is_ordered_by_age_after_the_current_task(loop_name):
    """Tasks get their ids when they are first seen, so the order is the same in each dump."""

    async def main():
        async with waiting(a=innermost(asyncio.Event()), b=innermost(asyncio.Event())):
            collector = TaskCollector()
            first = await dump_of(collector)
            another = asyncio.create_task(innermost(asyncio.Event()), name="c")
            await iterations()
            second = await dump_of(collector)
            assert not another.done()
            return first, second

    first, second = run(main(), loop_name)
    assert [each.id for each in second[1:]] == sorted(each.id for each in second[1:])
    assert [each.id for each in second[:3]] == [each.id for each in first]
    assert [label(each, "task") for each in second][3:] == ["c"]
    assert second[0].state == "running"


# Loops that do not answer


def blocked_in_a_task(job):
    async def serve():
        waits = asyncio.create_task(innermost(asyncio.Event()), name="waits there")
        await iterations()
        try:
            job.run()
        finally:
            waits.cancel()
            await asyncio.gather(waits, return_exceptions=True)

    return serve


def blocked_in_a_callback(job):
    async def serve():
        waits = asyncio.create_task(innermost(asyncio.Event()), name="waits there")
        await iterations()
        asyncio.get_running_loop().call_soon(job.run)
        try:
            await asyncio.Event().wait()
        finally:
            waits.cancel()
            await asyncio.gather(waits, return_exceptions=True)

    return serve


@pytest.mark.parametrize("other_loop", LOOPS)
@pytest.mark.parametrize("kind", [blocked_in_a_task, blocked_in_a_callback])
def test_the_code_that_blocks_a_loop_comes_first(loop_name, other_loop, kind):
    """It has its live stack. The loop's other tasks are read from outside, and marked."""
    job = Job()
    with a_loop(other_loop, kind(job), name="held"):
        assert job.begun.wait(20)
        try:
            collector = TaskCollector(answer_s=0.01)
            dump, profile = run(both(collector), loop_name)
        finally:
            job.end.set()
    blocker, asks = dump[:2]
    assert blocker.state == "running"
    assert label(blocker, "loop") == "does not answer"
    assert "threading.Event.wait" in names(blocker.stack)
    assert "Job.run" in names(blocker.stack)
    in_task = kind is blocked_in_a_task
    assert label(blocker, "task") == ("serves" if in_task else "none: a callback")
    assert (names(blocker.stack)[-1] == "blocked_in_a_task.<locals>.serve") == in_task
    assert (asks.state, label(asks, "loop")) == ("running", None)
    (waits,) = [each for each in dump if label(each, "task") == "waits there"]
    assert label(waits, "loop") == "does not answer"
    assert (waits.state, names(waits.stack)) == ("Event.wait", INNERMOST)
    assert profile.comments == ("the loop of thread held does not answer: read from outside",)


async def both(collector):
    return await dump_of(collector), await profile_of(collector)


@pytest.mark.parametrize("other_loop", LOOPS)
def test_a_loop_that_answers_is_not_marked(loop_name, other_loop):
    """It may take its time: the collector waits for the answer, and no longer."""

    async def serve():
        await innermost(asyncio.Event())

    with a_loop(other_loop, serve):
        dump, profile = run(both(TaskCollector(answer_s=60)), loop_name)
    assert all(label(each, "loop") is None for each in dump)
    (served,) = [each for each in dump if label(each, "task") == "serves"]
    assert served.state == "Event.wait"
    assert profile.comments == ()


@pytest.mark.parametrize("other_loop", LOOPS)
def test_a_loop_that_stops_while_it_is_asked_does_no_harm(loop_name, other_loop):
    """It never runs the callback in its queue."""
    job = Job()
    loop = LOOPS[other_loop]()

    def stop():
        job.run()
        loop.stop()

    def serve():
        loop.call_soon(stop)
        loop.run_forever()
        loop.close()

    thread = threading.Thread(target=serve)
    thread.start()
    assert job.begun.wait(20)

    async def main():
        asyncio.get_running_loop().call_soon(asyncio.get_running_loop().call_soon, job.end.set)
        return await dump_of(TaskCollector(answer_s=0.2))

    try:
        dump = run(main(), loop_name)
    finally:
        job.end.set()
        thread.join(20)
    assert len([each for each in dump if each.state == "running"]) >= 1
    assert label(dump[-1], "task").startswith("Task-")


@pytest.mark.parametrize("other_loop", LOOPS)
def test_tasks_that_run_while_they_are_read_do_no_harm(loop_name, other_loop):
    """They belong to a busy loop in another thread. Each stack is of one task."""
    end = threading.Event()

    async def pause():
        await asyncio.sleep(0)

    async def step():
        yield await pause()

    async def spins():
        while not end.is_set():
            async for _ in step():
                await asyncio.sleep(0)
            await asyncio.gather(pause(), pause())

    async def serve():
        await asyncio.gather(*(spins() for _ in range(20)))

    async def main():
        return [each for _ in range(20) for each in await dump_of()]

    with a_loop(other_loop, serve):
        try:
            dump = run(main(), loop_name, debug=False)
        finally:
            end.set()
    spinning = [each for each in dump if names(each.stack)[-1].endswith("spins")]
    assert len(spinning) >= 20
    assert {each.state for each in spinning} <= {"running", "runnable", "gather", "sleep"}
