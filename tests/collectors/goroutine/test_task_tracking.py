"""The creators of tasks and the starts of their waits are recorded; loops are restored."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import inspect
import sys
import threading
import time
import weakref

import anyio
import pytest

from asgi_pprof.collectors.goroutine import task_tracking
from asgi_pprof.collectors.goroutine.collector import TaskCollector
from asgi_pprof.collectors.goroutine.task_tracking import TaskTracking
from asgi_pprof.runtime.task_records import TaskRecord, record_of
from asgi_pprof.runtime.tasks import waits_for
from tests.loops import LOOPS, iterations, run, until

MINUTE_NS = 60_000_000_000

# uvloop from 0.22 on passes an argument that task factories accept only from 3.13.3 on.
EAGER_WORKS = {"asyncio": True, "uvloop": not (3, 13) <= sys.version_info < (3, 13, 3)}


def skip_unless_eager(loop_name):
    if sys.version_info < (3, 12) or not EAGER_WORKS[loop_name]:
        pytest.skip("there are no eager tasks")


@contextlib.contextmanager
def tracked(tracking=None):
    """Track tasks of the running loop."""
    tracking = tracking or TaskTracking()
    loop = asyncio.get_running_loop()
    tracking.attach(loop)
    try:
        yield tracking
    finally:
        tracking.detach(loop)


async def dump_of():
    """Return the tasks by name."""
    return {dict(each.labels)["task"]: each async for each in TaskCollector().goroutines()}


async def end(*tasks):
    for each in tasks:
        each.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


held = set()


async def wait():
    event = asyncio.Event()
    held.add(event)  # otherwise nothing refers to the task, and the garbage collector frees it
    try:
        await event.wait()
    finally:
        held.discard(event)


# The creator of a task


async def by_create_task():
    asyncio.create_task(wait(), name="made")
    await wait()


async def by_ensure_future():
    asyncio.ensure_future(wait()).set_name("made")
    await wait()


async def by_the_loop():
    asyncio.get_running_loop().create_task(wait(), name="made")
    await wait()


async def named():
    await asyncio.sleep(0)  # an eager task gets its first name only after it has begun
    asyncio.current_task().set_name("made")
    await wait()


async def by_gather():
    await asyncio.gather(named())


async def by_a_group():
    async with asyncio.TaskGroup() as group:
        group.create_task(wait(), name="made")


async def by_a_group_of_anyio():
    async with anyio.create_task_group() as group:
        group.start_soon(wait, name="made")


async def by_a_group_of_anyio_that_starts():
    async def start(*, task_status):
        task_status.started()
        await wait()

    async with anyio.create_task_group() as group:
        await group.start(start, name="made")
        await wait()


async def by_as_completed():
    for each in asyncio.as_completed([named()]):
        await each


def make():
    return asyncio.create_task(wait(), name="made")


async def by_a_function():
    make()
    await wait()


MAKERS = {
    by_create_task: ("by_create_task", 1),
    by_ensure_future: ("by_ensure_future", 1),
    by_the_loop: ("by_the_loop", 1),
    by_gather: ("by_gather", 1),
    by_a_group: ("by_a_group", 2),
    by_a_group_of_anyio: ("by_a_group_of_anyio", 2),
    by_a_group_of_anyio_that_starts: ("by_a_group_of_anyio_that_starts", 6),
    by_as_completed: ("by_as_completed", 1),
    by_a_function: ("make", 1),
}


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("maker", MAKERS, ids=lambda maker: maker.__name__)
def test_the_creator_of_a_task_is_recorded(maker, eager, loop_name):
    """It is the application's function and line, outside asyncio and anyio, and a task's number."""
    if eager:
        skip_unless_eager(loop_name)

    async def main():
        if eager:
            asyncio.get_running_loop().set_task_factory(asyncio.eager_task_factory)
        with tracked():
            task = asyncio.create_task(maker(), name="maker")
            await iterations()
            dump = await dump_of()
            await end(*(asyncio.all_tasks() - {asyncio.current_task()}))
            assert task.done()
            return dump

    dump = run(main(), loop_name)
    function, line = MAKERS[maker]
    made = dump["made"]
    assert made.created_by.function.name == f"{__name__}.{function}"
    assert made.created_by.function.filename == __file__
    source = globals()[function]
    assert made.created_by.line - inspect.getsourcelines(source)[1] == line
    assert made.creator == dump["maker"].id
    main_name = f"{__name__}.test_the_creator_of_a_task_is_recorded.<locals>.main"
    assert dump["maker"].created_by.function.name == main_name


def test_a_task_created_by_a_callback_has_a_place_but_no_creator(loop_name):
    """No task has created it, but the place is known."""

    async def main():
        with tracked():
            asyncio.get_running_loop().call_soon(make)
            await iterations()
            dump = await dump_of()
            await end(*(asyncio.all_tasks() - {asyncio.current_task()}))
        return dump

    made = run(main(), loop_name)["made"]
    assert made.created_by.function.name == f"{__name__}.make"
    assert made.creator == 0


def test_the_creator_is_unknown_outside_of_tracking(loop_name):
    """Tasks that were created before or after tracking have none."""

    async def main():
        before = asyncio.create_task(wait(), name="before")
        with tracked():
            pass
        after = asyncio.create_task(wait(), name="after")
        await iterations()
        dump = await dump_of()
        await end(before, after)
        return dump

    dump = run(main(), loop_name)
    for name in ("before", "after"):
        assert (dump[name].created_by, dump[name].creator) == (None, 0)


def test_a_task_run_from_another_thread_has_no_creator(loop_name):
    """A callback of asyncio creates it for `run_coroutine_threadsafe`, not a task."""

    async def main():
        with tracked():
            loop = asyncio.get_running_loop()
            future = await asyncio.to_thread(asyncio.run_coroutine_threadsafe, named(), loop)
            await iterations()
            dump = await dump_of()
            future.cancel()
            await iterations()
        return dump

    assert run(main(), loop_name)["made"].creator == 0


# Task factories


def test_the_applications_factory_is_still_called(loop_name):
    """It gets the same arguments, and its exceptions are passed on."""
    calls = []

    def factory(loop, coro, **kwargs):
        calls.append(kwargs)
        if coro.__name__ == "refused":
            coro.close()
            raise ZeroDivisionError
        return asyncio.Task(coro, loop=loop, **kwargs)

    async def refused():
        pass

    async def main():
        loop = asyncio.get_running_loop()
        loop.set_task_factory(factory)
        with tracked():
            made = make()
            with pytest.raises(ZeroDivisionError):
                asyncio.create_task(refused())
            await iterations()
            dump = await dump_of()
        assert loop.get_task_factory() is factory
        await end(made)
        return dump, list(calls)

    dump, seen = run(main(), loop_name)
    assert len(seen) >= 2
    assert dump["made"].created_by.function.name == f"{__name__}.make"


def test_factories_get_the_same_arguments_as_without_tracking(loop_name):
    """They are those that this version of asyncio or uvloop passes."""

    async def main(attach):
        calls = []
        loop = asyncio.get_running_loop()

        def factory(loop, coro, **kwargs):
            calls.append(sorted(kwargs))
            return asyncio.Task(coro, loop=loop, **kwargs)

        loop.set_task_factory(factory)
        with tracked() if attach else contextlib.nullcontext():
            context = contextvars.copy_context()
            tasks = [asyncio.create_task(wait()), asyncio.create_task(wait(), name="a")]
            tasks.append(asyncio.create_task(wait(), context=context))
            await end(*tasks)
        return calls

    assert run(main(True), loop_name) == run(main(False), loop_name)


class PlainFuture(asyncio.Future):
    """Some factories return such an object in place of a task; asyncio only sets its name."""

    def set_name(self, name):
        pass


def plain_future(loop, coro, **kwargs):
    coro.close()
    return PlainFuture(loop=loop)


def slotted(loop, coro, **kwargs):
    coro.close()
    return Bare()


class Bare:
    """An object that is no task, and has no room for a record."""

    __slots__ = ()

    def set_name(self, name):
        pass


@pytest.mark.parametrize("factory", [plain_future, slotted], ids=lambda each: each.__name__)
def test_a_factory_may_return_anything(factory, loop_name, caplog):
    """The application gets the object unchanged."""

    async def main():
        loop = asyncio.get_running_loop()
        loop.set_task_factory(factory)
        expected = type(factory(loop, wait()))
        try:
            with tracked():
                made = loop.create_task(wait())
            assert loop.get_task_factory() is factory
        finally:
            loop.set_task_factory(None)
        return type(made), expected

    made, expected = run(main(), loop_name)
    assert made is expected


def test_an_eager_constructor_may_return_anything(loop_name):
    """The application gets the object, provided that asyncio accepts it."""
    skip_unless_eager(loop_name)

    async def main():
        loop = asyncio.get_running_loop()
        bare = Bare()

        def construct(coro, **kwargs):
            coro.close()
            return bare

        loop.set_task_factory(asyncio.create_eager_task_factory(construct))
        try:
            with tracked():
                made = loop.create_task(wait())
        finally:
            loop.set_task_factory(None)
        return made is bare

    assert run(main(), loop_name)


class TaskWithSlots(asyncio.tasks._PyTask):
    """A task that takes no further attributes."""

    def __setattr__(self, name, value):
        if name == "_asgi_pprof_record":
            raise AttributeError(name)
        super().__setattr__(name, value)


def test_tasks_that_take_no_attribute_have_their_record_elsewhere(loop_name):
    """The record is freed with the task."""

    async def main():
        loop = asyncio.get_running_loop()
        loop.set_task_factory(lambda loop, coro, **kwargs: TaskWithSlots(coro, loop=loop, **kwargs))
        with tracked():
            made = make()
            await iterations()
            found = (await dump_of())["made"]
            same = record_of(made) is record_of(made)
            await end(made)
        loop.set_task_factory(None)
        reference = weakref.ref(made)
        del made
        await iterations()
        gc.collect()
        return found, same, reference() is None

    found, same, gone = run(main(), loop_name)
    assert found.created_by.function.name == f"{__name__}.make"
    assert same
    assert gone


def test_default_names_are_as_without_tracking(loop_name):
    """Their numbers go on without gaps, and given names are kept."""

    async def main():
        with tracked():
            tasks = [asyncio.create_task(wait()) for _ in range(2)]
            tasks.append(asyncio.create_task(wait(), name="given"))
            tasks.append(asyncio.get_running_loop().create_task(wait()))
            tasks.append(asyncio.ensure_future(wait()))
            names = [each.get_name() for each in tasks]
            await end(*tasks)
        return names

    names = run(main(), loop_name)
    assert names[2] == "given"
    numbers = [int(each.removeprefix("Task-")) for each in names if each != "given"]
    first = numbers[0]
    assert numbers[1] == first + 1
    assert numbers == sorted(numbers)


@pytest.mark.parametrize("attach", [False, True])
def test_default_names_with_an_eager_factory_are_as_without_tracking(attach, loop_name):
    """3.13.0 to 3.13.2 remove them."""
    skip_unless_eager(loop_name)

    async def main(attach):
        asyncio.get_running_loop().set_task_factory(asyncio.eager_task_factory)
        with tracked() if attach else contextlib.nullcontext():
            tasks = [asyncio.create_task(wait()), asyncio.create_task(wait(), name="given")]
            names = [each.get_name() for each in tasks]
            await end(*tasks)
        return [each.rstrip("0123456789") for each in names]

    assert run(main(attach), loop_name) == run(main(False), loop_name)


def test_eager_tasks_begin_at_once(loop_name):
    """All steps before their first wait are done when `create_task` returns."""
    skip_unless_eager(loop_name)

    async def at_once(seen):
        seen.append("begun")
        return 7

    async def main(attach):
        loop = asyncio.get_running_loop()
        loop.set_task_factory(asyncio.eager_task_factory)
        seen = []
        with tracked() if attach else contextlib.nullcontext():
            assert loop.get_task_factory().__code__ is asyncio.eager_task_factory.__code__
            done = asyncio.create_task(at_once(seen), name="eager")
            found = list(seen), done.done()
            made = make()
            found += (waits_for(made) is not None,)
            await end(made)
            assert await done == 7
        assert loop.get_task_factory() is asyncio.eager_task_factory
        return found

    with_us, without = run(main(True), loop_name), run(main(False), loop_name)
    assert with_us == without
    if loop_name == "asyncio":  # from 3.13.3 on uvloop does not start them eagerly
        assert with_us == (["begun"], True, True)


def test_a_task_that_an_eager_task_creates_has_its_number(loop_name):
    """An eager task has its number before its own creator is recorded."""
    skip_unless_eager(loop_name)

    async def makes():
        make()
        await wait()

    async def main():
        asyncio.get_running_loop().set_task_factory(asyncio.eager_task_factory)
        with tracked():
            maker = asyncio.create_task(makes(), name="maker")
            await iterations()
            dump = await dump_of()
            await end(*(asyncio.all_tasks() - {asyncio.current_task()}))
            assert maker.done()
        return dump

    dump = run(main(), loop_name)
    assert dump["made"].creator == dump["maker"].id
    assert dump["maker"].created_by.function.name.endswith("main")
    (asks,) = [each for each in dump.values() if each.state == "running"]
    assert dump["maker"].creator == asks.id


@pytest.mark.parametrize("custom", [False, True])
def test_anyio_recognizes_the_eager_factory(custom, loop_name):
    """anyio's tasks start when they do without tracking: not before `start_soon` returns."""
    skip_unless_eager(loop_name)

    class Custom(asyncio.Task):
        pass

    async def begin(order):
        order.append(type(asyncio.current_task()).__name__)

    async def main(attach):
        loop = asyncio.get_running_loop()
        factory = (
            asyncio.create_eager_task_factory(Custom) if custom else asyncio.eager_task_factory
        )
        loop.set_task_factory(factory)
        order = []
        with tracked() if attach else contextlib.nullcontext():
            async with anyio.create_task_group() as group:
                group.start_soon(begin, order)
                order.append("start_soon has returned")
        return order

    assert run(main(True), loop_name) == run(main(False), loop_name)


@pytest.mark.parametrize("way", ["create_task", "loop", "eager"])
def test_debug_mode_shows_where_a_task_was_created(way, loop_name):
    """The traceback ends as without tracking."""
    if way == "eager":
        skip_unless_eager(loop_name)

    async def main(attach):
        loop = asyncio.get_running_loop()
        if way == "eager":
            loop.set_task_factory(asyncio.eager_task_factory)
        with tracked() if attach else contextlib.nullcontext():
            if way == "loop":
                task = loop.create_task(wait())
            else:
                task = asyncio.create_task(wait())
            made = [(each.filename, each.name) for each in task._source_traceback]
            await end(task)
        return made

    with_us, without = run(main(True), loop_name, True), run(main(False), loop_name, True)
    assert (__file__, "main") in with_us
    assert with_us[-1] == without[-1]


def test_detach_restores_the_factory(loop_name):
    """The loop has the same factory object as before, or none."""

    async def main():
        loop = asyncio.get_running_loop()
        for before in (None, lambda loop, coro, **kwargs: asyncio.Task(coro, loop=loop, **kwargs)):
            loop.set_task_factory(before)
            with tracked():
                assert loop.get_task_factory() is not before
            assert loop.get_task_factory() is before

    run(main(), loop_name)


def test_a_factory_around_ours_is_left_alone(loop_name):
    """It belongs to the application. Our factory, which it calls, then only delegates."""

    async def main():
        loop = asyncio.get_running_loop()
        tracking = TaskTracking()
        tracking.attach(loop)
        ours = loop.get_task_factory()

        def around(loop, coro, **kwargs):
            return ours(loop, coro, **kwargs)

        loop.set_task_factory(around)
        inside = asyncio.create_task(wait(), name="inside")
        tracking.detach(loop)
        assert loop.get_task_factory() is around
        after = asyncio.create_task(wait(), name="after")
        await iterations()
        dump = await dump_of()
        await end(inside, after)
        loop.set_task_factory(None)
        return dump

    dump = run(main(), loop_name)
    assert dump["inside"].created_by is not None
    assert dump["after"].created_by is None


def test_a_factory_in_place_of_ours_is_left_alone(loop_name):
    """The application has replaced the earlier factory on purpose."""

    async def main():
        loop = asyncio.get_running_loop()

        def another(loop, coro, **kwargs):
            return asyncio.Task(coro, loop=loop, **kwargs)

        with tracked():
            loop.set_task_factory(another)
        assert loop.get_task_factory() is another
        loop.set_task_factory(None)

    run(main(), loop_name)


def test_a_loop_may_have_two_users(loop_name):
    """The second to leave restores the factory; one detach too many does nothing."""

    async def main():
        loop, tracking = asyncio.get_running_loop(), TaskTracking()
        tracking.attach(loop)
        ours = loop.get_task_factory()
        tracking.attach(loop)
        assert loop.get_task_factory() is ours
        tracking.detach(loop)
        assert loop.get_task_factory() is ours
        tracking.detach(loop)
        assert loop.get_task_factory() is None
        tracking.detach(loop)
        assert loop.get_task_factory() is None

    run(main(), loop_name)


def test_another_thread_may_detach(loop_name):
    """While the loop runs, the factory is restored, and no scan is scheduled any more."""

    async def main():
        loop, tracking = asyncio.get_running_loop(), TaskTracking(interval_s=3600)
        tracking.attach(loop)
        thread = threading.Thread(target=tracking.detach, args=(loop,))
        thread.start()
        await until(lambda: not thread.is_alive())
        await iterations()
        assert loop.get_task_factory() is None
        assert scheduled(loop) == []

    run(main(), loop_name)


def scheduled(loop):
    """Return the pending timers of asyncio's loop; uvloop does not show them."""
    handles = getattr(loop, "_scheduled", [])
    return [each for each in handles if not each.cancelled()]


def test_detach_works_when_the_loop_has_stopped(loop_name):
    """It works on a closed loop too."""
    for is_closed in (False, True):
        loop, tracking = LOOPS[loop_name](), TaskTracking(interval_s=3600)

        async def attach(tracking=tracking):
            tracking.attach(asyncio.get_running_loop())

        loop.run_until_complete(attach())
        if is_closed:
            loop.close()
        tracking.detach(loop)
        assert loop.get_task_factory() is None
        assert scheduled(loop) == []
        loop.close()


@pytest.mark.parametrize("detached", [True, False])
def test_tracking_keeps_no_loop_alive(detached, loop_name):
    """This holds whether or not tracking has ended."""
    tracking = TaskTracking(interval_s=3600)
    loop = LOOPS[loop_name]()

    async def attach():
        tracking.attach(asyncio.get_running_loop())
        await asyncio.create_task(asyncio.sleep(0))

    loop.run_until_complete(attach())
    if detached:
        tracking.detach(loop)
    loop.close()
    reference = weakref.ref(loop)
    del loop
    gc.collect()
    assert reference() is None


def test_a_task_is_freed_with_its_record(loop_name):
    """It is freed without the garbage collector, as without tracking."""

    async def main():
        with tracked():
            task = make()
            await iterations()
            await end(task)
            reference = weakref.ref(task)
            gc.disable()
            try:
                del task
                await iterations()
                return reference() is None
            finally:
                gc.enable()

    assert run(main(), loop_name)


def test_recording_that_fails_switches_itself_off(loop_name, monkeypatch, caplog):
    """The tasks are created all the same, and the failure is logged once."""

    async def main():
        def fail(*_):
            raise ZeroDivisionError

        with tracked():
            monkeypatch.setattr(task_tracking, "TaskRecord", fail)
            tasks = [make(), make()]
            monkeypatch.undo()
            await end(*tasks)
        assert asyncio.get_running_loop().get_task_factory() is None

    run(main(), loop_name)
    ours = [each for each in caplog.records if each.name == "asgi_pprof"]
    assert len(ours) == 1


# The start of a task's wait


class Awaited:
    """An object that a task waits for."""


def test_a_record_measures_how_long_a_task_waits():
    """It measures from the first update with the same object to the latest."""
    record, first, second = TaskRecord(), Awaited(), Awaited()
    assert [record.update(first, now) for now in (100, 103, 110)] == [0, 3, 10]
    assert [record.update(second, now) for now in (120, 125)] == [0, 5]
    assert record.update(None, 130) == 0
    assert [record.update(second, now) for now in (140, 141)] == [0, 1]


def test_another_object_begins_a_new_wait():
    """This holds even if its address was that of an object that has been freed."""
    record = TaskRecord()
    for now in range(100):
        assert record.update(Awaited(), now) == 0


def test_a_wait_for_an_object_without_weak_references_has_no_length():
    """It could be another object at the same address: too short is better than too long."""
    record = TaskRecord()
    assert [record.update((1, 2), now) for now in (0, 10, 20)] == [0, 0, 0]


def test_a_wait_has_lasted_at_most_since_the_task_was_seen_without_it():
    """A wait begins between two looks, or after the last scan before the task was created."""
    record, first, second = TaskRecord(after_ns=90), Awaited(), Awaited()
    record.update(first, 100)
    assert record.at_most(103) == 13
    record.update(first, 104)
    record.update(second, 110)
    assert record.at_most(115) == 11
    record.update(None, 120)
    record.update(first, 130)
    assert record.at_most(131) == 11


def test_how_long_a_wait_has_lasted_at_most_may_not_be_known():
    """The task was created before it could be seen, or waits for what is not recognized."""
    record, first = TaskRecord(), Awaited()
    record.update(first, 100)
    assert record.at_most(103) is None
    record.update((1, 2), 110)
    assert record.at_most(115) is None


class Clock:
    """A monotonic clock that is some minutes late and counts its calls."""

    def __init__(self, minutes=0):
        self.behind_ns = minutes * MINUTE_NS
        self.asked = 0

    def __call__(self):
        self.asked += 1
        return time.monotonic_ns() - self.behind_ns


async def scans(clock, times=2):
    """Wait until that many scans have begun."""
    goal = clock.asked + times
    await until(lambda: clock.asked >= goal)


def test_minutes_are_counted_from_a_scan(loop_name):
    """A task that a scan saw three minutes ago has waited as long, if for the same object."""

    async def main():
        clock, moves = Clock(minutes=3), asyncio.Event()

        async def move_on():
            await moves.wait()
            await wait()

        with tracked(TaskTracking(interval_s=0.01, clock=clock)):
            tasks = [asyncio.create_task(wait(), name="stays")]
            tasks.append(asyncio.create_task(move_on(), name="moves on"))
            await scans(clock)
            before = await dump_of()
        moves.set()
        await iterations()
        after = await dump_of()
        await end(*tasks)
        return before, after

    before, after = run(main(), loop_name)
    assert (before["stays"].minutes, before["moves on"].minutes) == (3, 3)
    assert (after["stays"].minutes, after["moves on"].minutes) == (3, 0)


def test_a_scan_notices_a_new_wait(loop_name):
    """The task waits for two events in turn. The second wait begins with the first scan of it."""

    async def main():
        clock, moves = Clock(minutes=9), asyncio.Event()

        async def move_on():
            await moves.wait()
            await wait()

        with tracked(TaskTracking(interval_s=0.01, clock=clock)):
            task = asyncio.create_task(move_on(), name="moves on")
            await scans(clock)
            clock.behind_ns = 2 * MINUTE_NS  # set first: a scan may come as soon as the task moves
            moves.set()
            await iterations()
            await scans(clock)
            dump = await dump_of()
            await end(task)
        return dump

    assert run(main(), loop_name)["moves on"].minutes == 2


def test_a_dump_is_also_a_scan(loop_name):
    """No time has passed between two dumps."""

    async def main():
        task = asyncio.create_task(wait(), name="waits")
        await iterations()
        await dump_of()
        since = record_of(task).since_ns
        found = (await dump_of())["waits"]
        await end(task)
        return since, record_of(task).since_ns, found.minutes

    first, second, minutes = run(main(), loop_name)
    assert first == second > 0
    assert minutes == 0


def test_scans_end_with_the_last_user(loop_name):
    """No timer of ours is left, and no scan follows."""

    async def main():
        loop, clock = asyncio.get_running_loop(), Clock()
        with tracked(TaskTracking(interval_s=0.005, clock=clock)):
            await scans(clock)
        assert scheduled(loop) == []
        asked = clock.asked
        await asyncio.sleep(0.05)
        return clock.asked - asked

    assert run(main(), loop_name) == 0


def test_scans_end_between_two_slices(loop_name, monkeypatch):
    """The rest of the scan is cancelled."""
    monkeypatch.setattr(task_tracking, "_SLICE_S", 0.0)

    async def main():
        clock = Clock()
        tasks = [asyncio.create_task(wait()) for _ in range(50)]
        with tracked(TaskTracking(interval_s=0.005, clock=clock)):
            while not clock.asked:  # noqa: ASYNC110 (one iteration at a time, so one slice)
                await asyncio.sleep(0)
        asked = clock.asked
        await iterations(100)
        await end(*tasks)
        return asked, clock.asked

    asked, later = run(main(), loop_name)
    assert asked == later < 50


def test_the_loop_runs_other_work_between_the_slices_of_a_scan(loop_name, monkeypatch):
    """With a length of 0, a slice has one task."""
    monkeypatch.setattr(task_tracking, "_SLICE_S", 0.0)

    async def main():
        clock = Clock()
        tasks = [asyncio.create_task(wait()) for _ in range(50)]
        with tracked(TaskTracking(interval_s=0.005, clock=clock)):
            await until(lambda: clock.asked)
            begun, iterations = clock.asked, 0
            while clock.asked < 50:
                await asyncio.sleep(0)
                iterations += 1
        await end(*tasks)
        return begun, iterations

    begun, iterations = run(main(), loop_name)
    assert iterations >= 50 - begun - 1


def test_very_many_tasks_are_scanned_in_slices():
    """All of 20,000 tasks are scanned, in several iterations of the loop."""

    async def main():
        clock, event = Clock(), asyncio.Event()
        tasks = [asyncio.create_task(event.wait()) for _ in range(20_000)]
        await iterations(2)
        with tracked(TaskTracking(interval_s=0.001, clock=clock)):
            await until(lambda: all(record_of(each).waited for each in tasks))
            slices = clock.asked
        event.set()
        await asyncio.gather(*tasks)
        return slices

    assert run(main(), debug=False) > 3


def test_a_task_that_cannot_be_read_hides_no_other(loop_name):
    """A task of the application's own class may raise whenever it is read."""

    class Odd(asyncio.tasks._PyTask):
        raises = False

        def done(self):
            if self.raises:
                raise ZeroDivisionError
            return super().done()

        @property
        def _fut_waiter(self):
            if self.raises:
                raise ZeroDivisionError
            return self.kept

        @_fut_waiter.setter
        def _fut_waiter(self, future):
            self.kept = future

    async def main():
        loop, clock = asyncio.get_running_loop(), Clock()
        with tracked(TaskTracking(interval_s=0.005, clock=clock)):
            odd = Odd(wait(), loop=loop)
            await asyncio.sleep(0)
            odd.raises = True
            others = [asyncio.create_task(wait()) for _ in range(3)]
            await until(lambda: all(record_of(each).waited for each in others))
            odd.raises = False
            await end(odd, *others)

    run(main(), loop_name)


def test_scans_go_on_after_one_that_failed(loop_name, caplog):
    """The failure is logged, and the application's exception handler is not called."""

    class FailingClock(Clock):
        raises = False

        def __call__(self):
            if self.raises:
                raise ZeroDivisionError
            return super().__call__()

    async def main():
        loop, clock, failed = asyncio.get_running_loop(), FailingClock(), []
        loop.set_exception_handler(lambda loop, context: failed.append(context))
        with tracked(TaskTracking(interval_s=0.005, clock=clock)):
            await scans(clock)
            clock.raises = True
            await until(lambda: any(each.name == "asgi_pprof" for each in caplog.records))
            clock.raises = False
            await scans(clock)
        return failed

    assert run(main(), loop_name) == []  # the application's exception handler was not called
    assert [each.name for each in caplog.records if each.exc_info] == ["asgi_pprof"]
