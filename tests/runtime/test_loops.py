"""Running loops and all tasks of the process are found, with the C core and without."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import sys
import threading
import weakref

import pytest

from asgi_pprof.native.core import native
from asgi_pprof.runtime import frames, loops, tasks
from asgi_pprof.runtime.loops import running_loops
from asgi_pprof.runtime.tasks import TaskList, alive
from tests.loops import LOOPS, run
from tests.programs import run_program
from tests.threads import in_a_thread

LINKED = sys.version_info >= (3, 14)  # CPython keeps tasks in linked lists; before, in sets

needs_native = pytest.mark.skipif(not native, reason="needs the C core")


@pytest.fixture(params=["native", "pure"])
def core(request, monkeypatch) -> str:
    """Run the test with the C core and without."""
    if request.param == "pure":
        monkeypatch.setattr(loops, "native", None)
        monkeypatch.setattr(tasks, "native", None)
        for name in frames._MAKE_INTERPRETERS:  # another test may have loaded them
            monkeypatch.delitem(sys.modules, name, raising=False)
    elif not native:
        pytest.skip("needs the C core")
    return request.param


def names(task_list=None):
    return {task.get_name() for task in alive((task_list or TaskList()).tasks())}


async def names_now(task_list=None):
    return names(task_list)


async def hold(ready, end, name):
    """Run a task that has one waiting child, until the end event is set."""
    child = asyncio.create_task(asyncio.Event().wait(), name=name)
    await asyncio.sleep(0)
    ready.set()
    while not end.is_set():  # noqa: ASYNC110 - another thread sets the event
        await asyncio.sleep(0.005)
    child.cancel()
    await asyncio.gather(child, return_exceptions=True)


def served_by_a_runner(loop_name, name):
    def serve(ready, end):
        run(hold(ready, end, name), loop_name)

    return serve


@pytest.mark.parametrize("other", list(LOOPS))
def test_tasks_of_a_loop_in_another_thread_are_listed(core, loop_name, other):
    """They are listed on each kind of loop, and no longer listed once they have ended."""
    with in_a_thread(served_by_a_runner(other, "far away")):
        assert "far away" in run(names_now(), loop_name)
    assert "far away" not in run(names_now(), loop_name)


@pytest.mark.parametrize("name", ["loop", "engine"])
def test_a_loop_run_by_hand_in_another_thread_is_found(core, loop_name, name):
    """Without the C core, on 3.14, it is sure to be found only in a variable of a usual name."""

    def by_hand(ready, end):
        scope = {"new": LOOPS[loop_name], "hold": hold, "ready": ready, "end": end}
        exec(BY_HAND.replace("LOOP", name), scope)
        scope["main"]()

    with in_a_thread(by_hand):
        found = run(names_now())
    # If the thread happens to be in asyncio's own code, a variable `loop` there refers to the loop.
    may_be_missed = core == "pure" and LINKED and loop_name == "uvloop" and name == "engine"
    assert "hand-run" in found or may_be_missed


BY_HAND = """
def main():
    LOOP = new()
    LOOP.run_until_complete(hold(ready, end, "hand-run"))
    LOOP.close()
"""


def a_loop_that_waits(loop_name):
    """Return a loop that is not running, with one task that waits."""
    loop = LOOPS[loop_name]()
    task = loop.create_task(asyncio.Event().wait(), name="put aside")
    loop.run_until_complete(asyncio.sleep(0))
    return loop, task


def end(loop, task):
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        loop.run_until_complete(task)
    loop.close()


def test_tasks_of_a_loop_that_does_not_run_are_listed(core, loop_name):
    """On 3.14 and later this needs the C core."""
    loop, task = a_loop_that_waits(loop_name)
    found = run(names_now())
    end(loop, task)
    assert ("put aside" in found) == (core == "native" or not LINKED)


def test_a_loop_that_has_run_is_remembered(core, loop_name):
    """Its tasks stay in the list when it stops running. The list does not keep the loop alive."""
    task_list = TaskList()
    loop, task = a_loop_that_waits(loop_name)
    loop.run_until_complete(names_now(task_list))
    assert "put aside" in run(names_now(task_list))
    end(loop, task)
    reference = weakref.ref(loop)
    del loop, task
    for _ in range(10):
        if reference() is None:
            break
        gc.collect()
    assert reference() is None


def test_tasks_of_an_ended_thread_are_listed(core):
    """From 3.14 on the interpreter keeps the tasks of ended threads."""
    made = []
    thread = threading.Thread(target=lambda: made.append(a_loop_that_waits("asyncio")))
    thread.start()
    thread.join()
    found = run(names_now())
    end(*made[0])
    assert ("put aside" in found) == (core == "native" or not LINKED)


@pytest.mark.skipif(sys.version_info < (3, 12), reason="eager tasks came with 3.12")
def test_eager_tasks_are_listed(core, loop_name):
    """They are listed during their first step and while they wait."""
    within = []

    async def child(event):
        within.append(asyncio.current_task() in set(alive(TaskList().tasks())))
        await event.wait()

    async def main():
        event = asyncio.Event()
        # uvloop's create_task fails with the eager factory of 3.13.0 to 3.13.2.
        task = asyncio.eager_task_factory(asyncio.get_running_loop(), child(event), name="eager")
        assert {each.get_name() for each in asyncio.all_tasks()} <= names()
        assert "eager" in names()
        event.set()
        await task
        assert "eager" not in names()

    run(main(), loop_name)
    assert within == [True]


class Foreign:
    """A task whose class is not derived from asyncio's."""

    def __init__(self, loop, name):
        self._loop, self._name = loop, name

    def get_loop(self):
        return self._loop

    def get_name(self):
        return self._name

    def done(self):
        return False


class OurTask(asyncio.Task):
    """A subclass of asyncio.Task, as frameworks have."""


def made_by(make_task, loop_name):
    async def main():
        event = asyncio.Event()
        loop = asyncio.get_running_loop()
        loop.set_task_factory(lambda loop, coro, **kwargs: make_task(coro, loop=loop, **kwargs))
        task = asyncio.create_task(event.wait(), name="special")
        await asyncio.sleep(0)
        found = names()
        event.set()
        await task
        return found, names()

    return run(main(), loop_name)


@pytest.mark.parametrize("task_class", [OurTask, asyncio.tasks._PyTask])
def test_tasks_of_other_classes_are_listed(core, loop_name, task_class):
    """Tasks of a subclass and of asyncio's Python class are listed until they are done."""
    before, after = made_by(task_class, loop_name)
    assert "special" in before
    assert "special" not in after


def test_a_registered_task_of_a_foreign_class_is_listed(core, loop_name):
    """A library may register such a task with asyncio."""

    async def main():
        task = Foreign(asyncio.get_running_loop(), "registered")
        asyncio._register_task(task)
        try:
            return names()
        finally:
            asyncio._unregister_task(task)

    assert "registered" in run(main(), loop_name)


def test_the_list_equals_asyncios_all_tasks(core, loop_name):
    """Two loops run at a time. No task is missing, and the list adds none."""

    async def main(ready, end):
        tasks = {asyncio.create_task(asyncio.sleep(0 if i % 3 else 60)) for i in range(300)}
        for _ in range(3):
            await asyncio.sleep(0)
        ready.set()
        while not end.is_set():  # noqa: ASYNC110 - another thread sets the event
            await asyncio.sleep(0.005)
        mine = asyncio.all_tasks()
        found = {task for task in alive(TaskList().tasks()) if task.get_loop() in known}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return mine, found

    async def asking(ready, end):
        known.add(asyncio.get_running_loop())
        mine, found = await main(ready, end)
        return mine, {task for task in found if task.get_loop() is asyncio.get_running_loop()}

    known = set()
    results = []

    def far(ready, end):
        results.append(run(asking(ready, end), loop_name))

    with in_a_thread(far):
        ended = threading.Event()
        ended.set()
        results.append(run(asking(threading.Event(), ended), loop_name))
    for mine, found in results:
        assert len(mine) == 101
        assert found == mine


@needs_native
def test_listing_releases_its_references():
    """Listing a thousand times changes no reference count."""

    async def main():
        event = asyncio.Event()
        tasks = [asyncio.create_task(event.wait()) for _ in range(100)]
        await asyncio.sleep(0)
        loop, current = asyncio.get_running_loop(), asyncio.current_task()
        counts = []
        for _ in range(2):
            for _ in range(1000):
                TaskList().tasks()
                running_loops()
            counted = [*tasks, loop, current, event, None]
            counts.append([sys.getrefcount(each) for each in counted[:-1]])
        event.set()
        await asyncio.gather(*tasks)
        return counts

    before, after = run(main())
    assert before == after


@needs_native
def test_no_list_is_read_before_its_layout_is_known():
    """The layout is learnt from the last task of a list; any other object is refused."""
    program = """
import asyncio, sys
from asgi_pprof.runtime import tasks
from asgi_pprof.native.core import native

async def main():
    assert native.asyncio_tasks() is None
    task = asyncio.create_task(asyncio.sleep(0))
    later = asyncio.create_task(asyncio.sleep(0))
    for wrong in (task, asyncio.current_task(), object(), 5, [], asyncio.Future()):
        assert native.learn_tasks(wrong) is False
    assert native.asyncio_tasks() is None
    await later
    assert native.learn_tasks(later) is False  # done, and not in the list
    assert native.asyncio_tasks() is None
    found = set(tasks.alive(tasks.TaskList().tasks()))
    assert found == {asyncio.current_task()}, found
    assert (native.asyncio_tasks() is not None) == (sys.version_info >= (3, 14))
    assert native.learn_tasks(5) == (sys.version_info >= (3, 14))  # it has been learnt

asyncio.run(main())
"""
    run_program(program)


@needs_native
def test_running_loops_are_unknown_if_the_layout_is_unknown():
    """The loop in the calling thread's state must be the loop that asyncio returns."""
    assert native.running_loops(None) == []
    assert native.running_loops(object()) is None

    async def main():
        loop = asyncio.get_running_loop()
        assert native.running_loops(None) is None
        assert len(native.running_loops(loop)) == 1

    run(main())


CHURN = """
import asyncio, sys, threading, time
import uvloop
from asgi_pprof.runtime.tasks import TaskList, alive
from asgi_pprof.runtime.loops import running_loops
from asgi_pprof.native.core import native

assert bool(native) == (sys.argv[1] == "native")
kinds = [asyncio.new_event_loop, uvloop.new_event_loop]
stop = threading.Event()
made = [0] * 4

async def churn(index):
    async def child(depth):
        await asyncio.sleep(0)
        if depth:
            await asyncio.create_task(child(depth - 1))
    while not stop.is_set():
        tasks = [asyncio.create_task(child(i % 3)) for i in range(200)]
        made[index] += len(tasks)
        await asyncio.gather(*tasks)

def work(index):
    # Loops and threads end and begin again, some with waiting tasks left over.
    while not stop.is_set():
        with asyncio.Runner(debug=False, loop_factory=kinds[index % 2]) as runner:
            runner.run(asyncio.wait({runner.get_loop().create_task(churn(index))}, timeout=0.2))

def short_lives():
    def one():
        with asyncio.Runner(debug=False, loop_factory=kinds[0]) as runner:
            runner.run(asyncio.sleep(0))
    while not stop.is_set():
        thread = threading.Thread(target=one)
        thread.start()
        thread.join()

async def main():
    tasks, largest, calls = TaskList(), 0, 0
    end = time.monotonic() + 60
    while (min(made) < 2500 or calls < 100) and time.monotonic() < end:
        found = list(alive(tasks.tasks()))
        assert asyncio.current_task() in found
        for running in running_loops():
            running.loop.is_running()
        largest, calls = max(largest, len(found)), calls + 1
        await asyncio.sleep(0)
    return largest, calls

sys.setswitchinterval(1e-4)
threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
threads.append(threading.Thread(target=short_lives))
for thread in threads:
    thread.start()
try:
    # We want dev mode's memory checks, but not asyncio's log of slow steps.
    largest, calls = asyncio.run(main(), debug=False)
finally:
    stop.set()
    for thread in threads:
        thread.join()
assert sum(made) >= 10000, made
assert largest > 50, largest
"""


def test_tasks_are_listed_while_tasks_loops_and_threads_start_and_end(core):
    """Other threads run 10,000 tasks and more, on both kinds of loop."""
    variables = {} if core == "native" else {"ASGI_PPROF_NATIVE": "0"}
    run_program(CHURN, core, **variables)


def test_running_loops_of_all_threads_are_listed(core, loop_name):
    """Each is listed with its thread and its running task, including the calling thread's."""

    async def main(thread):
        rows = {row.thread_ident: row for row in running_loops()}
        own = rows[threading.get_ident()]
        assert own.loop is asyncio.get_running_loop()
        assert own.task is asyncio.current_task()
        other = rows[thread.ident]
        assert other.loop is not own.loop
        assert other.loop.is_running()
        return other.loop

    with in_a_thread(served_by_a_runner(loop_name, "child")) as thread:
        loop = run(main(thread))
        assert loop in [row.loop for row in running_loops()]  # this thread runs no loop now
    assert [row.loop for row in running_loops() if row.loop is loop] == []


def test_a_running_loop_is_listed_with_its_current_task(core, loop_name):
    """The loop is in another thread. While a callback runs there is no current task."""
    stuck, go_on = threading.Semaphore(0), threading.Semaphore(0)

    def be_stuck():
        stuck.release()
        go_on.acquire(timeout=30)

    async def in_a_task():
        be_stuck()
        called = asyncio.Event()
        asyncio.get_running_loop().call_soon(lambda: (be_stuck(), called.set()))
        await called.wait()

    thread = threading.Thread(target=lambda: run(in_a_task(), loop_name))
    thread.start()
    names = []
    for _ in range(2):
        assert stuck.acquire(timeout=30)
        (row,) = running_loops()
        names.append(row.task and row.task.get_coro().__name__)
        go_on.release()
    thread.join()
    assert names == ["in_a_task", None]


def test_a_thread_that_refers_to_a_loop_does_not_count_as_running_it(core, loop_name):
    """A variable of a worker thread refers to the loop."""

    def worker(loop, ready, done):
        loop.call_soon_threadsafe(ready.set)
        done.wait(30)

    async def main():
        loop, ready, done = asyncio.get_running_loop(), asyncio.Event(), threading.Event()
        waiting = loop.run_in_executor(None, worker, loop, ready, done)
        await ready.wait()
        rows = running_loops()
        done.set()
        await waiting
        return [row for row in rows if row.loop is loop]

    (row,) = run(main(), loop_name)
    assert row.thread_ident == threading.get_ident()
