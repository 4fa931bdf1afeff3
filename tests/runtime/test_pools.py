"""The work of worker threads, the futures it is for, and the figures of their pools are found."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import os
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import thread as thread_pool
from contextvars import copy_context

import anyio
import anyio.to_thread
import pytest

from asgi_pprof.runtime.frames import current_frames
from asgi_pprof.runtime.pools import Pool, Workers, default_limiter, limiter_pool
from asgi_pprof.runtime.tasks import waits_for
from tests.loops import LOOPS, run
from tests.servers import until


class Job:
    """Work for a thread, which blocks until `end` is set."""

    def __init__(self):
        self.begun, self.end = threading.Event(), threading.Event()

    def run(self, *_):
        self.begun.set()
        self.end.wait()

    __call__ = run


def hold(job):
    job.run()


@contextlib.contextmanager
def working(size, *functions, prefix="shop"):
    """Yield a pool, and the futures of the functions submitted to it."""
    with ThreadPoolExecutor(size, thread_name_prefix=prefix) as pool:
        yield pool, [pool.submit(*each) for each in functions]


@contextlib.contextmanager
def holding(size, count):
    """Yield a pool, its jobs and their futures, once every thread has begun a job."""
    jobs = [Job() for _ in range(count)]
    with working(size, *((hold, each) for each in jobs)) as (pool, futures):
        try:
            for each in jobs[:size]:
                assert each.begun.wait(20)
            yield pool, jobs, futures
        finally:
            for each in jobs:
                each.end.set()


def pools(name="shop"):
    return [each for each in Workers().pools if each.name == name]


def codes(stack):
    return [code.co_qualname for code, _ in stack]


def test_a_thread_is_found_by_its_future():
    """It has its name, its frames without the pool's own, and the submitted function."""
    with holding(1, 1) as (_, _, (future,)):
        work = Workers().working_for(future)
    assert work.future is future
    assert work.thread == "shop_0"
    assert codes(work.stack)[-3:] == ["Event.wait", "Job.run", "hold"]
    assert work.function == f"{__name__}.hold"


def test_other_futures_belong_to_no_thread():
    """These are futures that no thread works for, and futures that are done."""
    with holding(1, 1) as (_, (job,), (future,)):
        job.end.set()
        future.result()
        until(lambda: Workers().working_for(future) is None)
        assert Workers().working_for(object()) is None


def test_each_thread_of_a_pool_has_its_own_future():
    """A pool of three threads works for three futures."""
    with holding(3, 3) as (_, _, futures):
        workers = Workers()
        found = [workers.working_for(each) for each in futures]
    assert [each.future for each in found] == futures
    assert {each.thread for each in found} == {"shop_0", "shop_1", "shop_2"}


def test_c_functions_have_no_frames():
    """The thread has the function's name and an empty stack."""
    reading, writing = os.pipe()
    with working(1, (os.read, reading, 1)) as (_, (future,)):
        work = until(lambda: Workers().working_for(future))
        os.write(writing, b"x")
    os.close(reading)
    os.close(writing)
    assert (work.stack, work.function) == ((), "posix.read")


@pytest.mark.parametrize(
    ("wrap", "name"),
    [
        (lambda job: (hold, job), f"{__name__}.hold"),
        (lambda job: (functools.partial(hold, job),), f"{__name__}.hold"),
        (lambda job: (functools.partial(functools.partial(hold), job),), f"{__name__}.hold"),
        (lambda job: (copy_context().run, hold, job), f"{__name__}.hold"),
        (lambda job: (functools.partial(copy_context().run, hold, job),), f"{__name__}.hold"),
        (
            lambda job: (functools.partial(copy_context().run, functools.partial(hold, job)),),
            f"{__name__}.hold",
        ),
        (lambda job: (job.run,), f"{__name__}.Job.run"),
        (lambda job: (job,), ""),
    ],
    ids=["plain", "partial", "partials", "context", "to_thread", "all", "method", "object"],
)
def test_the_wrapped_function_is_named(wrap, name):
    """Partials and `Context.run` are unwrapped. An object that is no function has no name."""
    job = Job()
    with working(1, wrap(job)) as (_, (future,)):
        assert job.begun.wait(20)
        work = Workers().working_for(future)
        job.end.set()
    assert work.function == name


def test_a_pools_figures():
    """They say how many threads work, how many there may be, and how much work is queued."""
    with holding(2, 5) as (_, jobs, futures):
        assert pools() == [Pool("shop", 2, 2, 3)]
        for each in jobs[:4]:
            each.end.set()
        assert jobs[4].begun.wait(20)
        assert until(lambda: pools() == [Pool("shop", 1, 2, 0)])
        assert not futures[4].done()


def test_the_size_of_a_pool_is_its_maximum():
    """It may have started fewer threads."""
    with holding(1, 1) as (_, _, _), ThreadPoolExecutor(9, thread_name_prefix="large") as large:
        large.submit(int).result()
        assert until(lambda: pools("large") == [Pool("large", 0, 9, 0)])


def test_the_size_of_a_freed_pool_is_its_number_of_threads():
    """Its workers refer to the pool only weakly."""
    job = Job()
    pool = ThreadPoolExecutor(5, thread_name_prefix="forsaken")
    future = pool.submit(job.run)
    assert job.begun.wait(20)
    thread = next(iter(pool._threads))
    del pool
    gc.collect()
    try:
        assert pools("forsaken") == [Pool("forsaken", 1, 1, 0)]
    finally:
        job.end.set()
        future.result()
        thread.join(20)


def test_queued_work_is_found_in_its_pool():
    """It is found by its future. Work that runs is not queued."""
    with holding(1, 3) as (_, _, (first, *queued)):
        workers = Workers()
        assert workers.queued_in(first) is None
        assert [workers.queued_in(each) for each in queued] == [Pool("shop", 1, 1, 2)] * 2
        assert workers.working_for(queued[0]) is None


def test_cancelled_work_counts_as_queued():
    """It stays in the queue until a thread takes it."""
    with holding(1, 2) as (_, _, (_, queued)):
        assert queued.cancel()
        assert pools() == [Pool("shop", 1, 1, 1)]


def test_pools_without_threads_are_not_listed():
    """A pool is found by its threads."""
    with ThreadPoolExecutor(1, thread_name_prefix="unused"):
        assert pools("unused") == []


def test_frames_of_ended_threads_are_ignored():
    """A thread may end after its frames were read."""
    frames = {12345: next(iter(current_frames().values()))}
    with holding(1, 1) as (_, _, (future,)):
        workers = Workers(current_frames=lambda **_: frames)
        assert workers.working_for(future) is None
        assert [each for each in workers.pools if each.name == "shop"] == [Pool("shop", 0, 1, 0)]


def test_a_subclass_of_the_work_item_is_recognized():
    """It runs the function of the executor's class."""

    class Item(thread_pool._WorkItem):
        pass

    original = thread_pool._WorkItem
    thread_pool._WorkItem = Item
    try:
        with holding(1, 1) as (_, _, (future,)):
            assert Workers().working_for(future)
            assert pools() == [Pool("shop", 1, 1, 0)]
    finally:
        thread_pool._WorkItem = original


def test_workers_keep_nothing_alive():
    """Once the `Workers` are freed, no future and no argument is kept."""
    with holding(1, 1) as (_, (job,), (future,)):
        workers = Workers()
        assert workers.working_for(future)
        job.end.set()
        future.result()
        until(lambda: pools()[0].busy == 0)
        references = [weakref.ref(job), weakref.ref(future)]
        del workers
    del job, future
    gc.collect()
    assert [each() for each in references] == [None, None]


def test_anyios_threads_are_found(loop_name):
    """They are found by the asyncio future that the task waits for, and belong to no executor."""

    async def main():
        job = Job()
        task = asyncio.create_task(anyio.to_thread.run_sync(hold, job))
        while not job.begun.is_set():  # noqa: ASYNC110 - another thread sets the event
            await asyncio.sleep(0.002)
        workers = Workers()
        work = workers.working_for(waits_for(task))
        job.end.set()
        await task
        return work, workers.pools

    with asyncio.Runner(loop_factory=LOOPS[loop_name]) as runner:
        work, found = runner.run(main())
    assert work.thread == "AnyIO worker thread"
    assert codes(work.stack)[-3:] == ["Event.wait", "Job.run", "hold"]
    assert work.function == f"{__name__}.hold"
    assert [each for each in found if "AnyIO" in each.name] == []


def test_anyios_idle_threads_have_no_work(loop_name):
    """A thread waits for its next work, and has none meanwhile."""

    async def main():
        thread = await anyio.to_thread.run_sync(threading.current_thread)
        return until(lambda: thread.is_alive() and not working_now(thread.name))

    with asyncio.Runner(loop_factory=LOOPS[loop_name]) as runner:
        assert runner.run(main())


def working_now(name):
    workers = Workers()
    return [each for each in workers._work.values() if each.thread == name]


async def until_begun(*jobs):
    await asyncio.sleep(0)  # lets the tasks start
    while not all(each.begun.is_set() for each in jobs):  # noqa: ASYNC110 - set by other threads
        await asyncio.sleep(0.002)


async def awaited(future):
    return await future


@contextlib.contextmanager
def ending(*jobs):
    try:
        yield
    finally:
        for each in jobs:
            each.end.set()


@pytest.mark.parametrize(("count", "known"), [(4, 3), (40, 10)])
def test_tasks_that_wait_for_queued_work_are_found(loop_name, count, known):
    """The first ten are found, in the order of the queue, without those whose work runs."""

    async def main():
        loop, jobs = asyncio.get_running_loop(), [Job() for _ in range(count)]
        with ThreadPoolExecutor(1, thread_name_prefix="shop") as pool, ending(*jobs):
            tasks = [
                asyncio.create_task(awaited(loop.run_in_executor(pool, each))) for each in jobs
            ]
            await until_begun(jobs[0])
            ((found, waiting),) = [each for each in Workers().waiting() if each[0].name == "shop"]
            for each in jobs:
                each.end.set()
            await asyncio.gather(*tasks)
        return found, [tasks.index(each) for each in waiting]

    found, waiting = run(main(), loop_name)
    assert found == Pool("shop", 1, 1, count - 1)
    assert waiting == list(range(1, known + 1))


def test_the_order_is_right_after_work_has_left_the_queue(loop_name):
    """It does not depend on how the queue stores its items."""

    async def main():
        loop, jobs = asyncio.get_running_loop(), [Job() for _ in range(30)]
        with ThreadPoolExecutor(1, thread_name_prefix="shop") as pool, ending(*jobs):
            tasks = [
                asyncio.create_task(awaited(loop.run_in_executor(pool, each))) for each in jobs
            ]
            for each in jobs[:7]:
                each.end.set()
            await until_begun(jobs[7])
            more = [Job() for _ in range(3)]
            with ending(*more):
                tasks += [
                    asyncio.create_task(awaited(loop.run_in_executor(pool, each))) for each in more
                ]
                await asyncio.sleep(0)
                (waiting,) = [each for pool, each in Workers().waiting() if pool.name == "shop"]
            for each in jobs:
                each.end.set()
            await asyncio.gather(*tasks)
        return [tasks.index(each) for each in waiting]

    assert run(main(), loop_name) == list(range(8, 18))


def test_work_that_no_task_awaits_has_no_waiting_task(loop_name):
    """Such work was only submitted."""

    async def main():
        jobs = [Job(), Job()]
        with ThreadPoolExecutor(1, thread_name_prefix="shop") as pool, ending(*jobs):
            pool.submit(jobs[0])
            await until_begun(jobs[0])
            pool.submit(jobs[1])
            return [each for each in Workers().waiting() if each[0].name == "shop"]

    assert run(main(), loop_name) == [(Pool("shop", 1, 1, 1), [])]


async def waited(future):
    await asyncio.wait([future])


THROUGH = {
    "shield": asyncio.shield,
    "gather": asyncio.gather,
    "wait": waited,
    "wait_for": lambda future: asyncio.wait_for(future, 3600),
    "all": lambda future: asyncio.wait_for(asyncio.gather(asyncio.shield(future)), 3600),
}


@pytest.mark.parametrize("through", THROUGH)
def test_tasks_that_wait_for_queued_work_through_others_are_found(through, loop_name):
    """They await a future of asyncio's that the work's future completes."""

    async def main():
        loop, jobs = asyncio.get_running_loop(), [Job(), Job()]
        with ThreadPoolExecutor(1, thread_name_prefix="shop") as pool, ending(*jobs):
            pool.submit(jobs[0])
            await until_begun(jobs[0])
            queued = loop.run_in_executor(pool, jobs[1])
            task = asyncio.create_task(awaited(THROUGH[through](queued)))
            for _ in range(3):
                await asyncio.sleep(0)
            found = [tasks for pool, tasks in Workers().waiting() if pool.name == "shop"]
            for each in jobs:
                each.end.set()
            await task
        return found == [[task]]

    assert run(main(), loop_name)


def test_limiters_of_anyios_work_are_found(loop_name):
    """Each comes with the loop of its work. The loop's default limiter is left out."""

    async def main():
        limiter, jobs = anyio.CapacityLimiter(1), [Job(), Job()]
        with ending(*jobs):
            tasks = [
                asyncio.create_task(anyio.to_thread.run_sync(hold, jobs[0], limiter=limiter)),
                asyncio.create_task(anyio.to_thread.run_sync(hold, jobs[1])),
            ]
            await until_begun(*jobs)
            found = list(Workers().limited())
            for each in jobs:
                each.end.set()
            await asyncio.gather(*tasks)
        return found, [None, (asyncio.get_running_loop(), limiter)]

    found, expected = run(main(), loop_name)
    assert sorted(found, key=bool) == expected


def test_the_default_limiter_of_a_loop_is_found(loop_name):
    """It is None until anyio has started a thread for the loop; other threads find it too."""

    async def main():
        loop = asyncio.get_running_loop()
        before = default_limiter(loop)
        await anyio.to_thread.run_sync(int)
        ours = anyio.to_thread.current_default_thread_limiter()
        from_outside = await anyio.to_thread.run_sync(default_limiter, loop)
        return before, default_limiter(loop) is ours, from_outside is ours

    assert run(main(), loop_name) == (None, True, True)


@pytest.mark.parametrize("where", ["inside", "outside"])
def test_a_limiter_is_described_as_a_pool(loop_name, where):
    """Its tokens count as threads. It may be created before there is a loop."""
    made = anyio.CapacityLimiter(2) if where == "outside" else None
    unused = limiter_pool("unused", made)[0] if made else Pool("unused", 0, 2, 0)
    assert unused == Pool("unused", 0, 2, 0)

    async def main():
        limiter, jobs = made or anyio.CapacityLimiter(2), [Job() for _ in range(5)]
        with ending(*jobs):
            tasks = [
                asyncio.create_task(anyio.to_thread.run_sync(hold, each, limiter=limiter))
                for each in jobs
            ]
            await until_begun(*jobs[:2])
            pool, waiting = limiter_pool("mine", limiter)
            for each in jobs:
                each.end.set()
            await asyncio.gather(*tasks)
        return pool, [tasks.index(each) for each in waiting]

    assert run(main(), loop_name) == (Pool("mine", 2, 2, 3), [2, 3, 4])


def test_a_limiter_without_a_limit_has_infinite_size(loop_name):
    """Infinity is a valid number of tokens."""

    async def main():
        return limiter_pool("all", anyio.CapacityLimiter(float("inf")))

    assert run(main(), loop_name) == (Pool("all", 0, float("inf"), 0), [])
