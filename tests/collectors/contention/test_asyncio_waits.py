"""The waits of tasks for asyncio's and anyio's primitives are recorded."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import inspect
import queue
import sys
import threading
import time
import weakref

import anyio
import anyio.to_thread
import pytest

from asgi_pprof.collectors.contention import asyncio_waits
from asgi_pprof.collectors.contention.asyncio_waits import TaskWaiters
from tests.collectors.contention.recorded import HOLD_NS, is_in, names, recording
from tests.loops import run
from tests.servers import leaving_client, serve


async def others_run() -> None:
    """Let every other task run until it waits."""
    for _ in range(10):
        await asyncio.sleep(0)


async def until(condition) -> None:
    """Let other tasks and threads run until the condition is true."""
    while not condition():  # noqa: ASYNC110 (threads make it true)
        await asyncio.sleep(0.001)


MAKERS = {
    "asyncio.Lock": (lambda: asyncio.Lock(), "Lock.acquire", "Lock.release"),
    "asyncio.Semaphore": (lambda: asyncio.Semaphore(1), "Semaphore.acquire", "Semaphore.release"),
    "asyncio.BoundedSemaphore": (
        lambda: asyncio.BoundedSemaphore(1),
        "Semaphore.acquire",
        "Semaphore.release",
    ),
    "asyncio.Condition": (lambda: asyncio.Condition(), "Lock.acquire", "Lock.release"),
    "anyio.Lock": (lambda: anyio.Lock(), "Lock.acquire", "Lock.release"),
    "anyio.Semaphore": (lambda: anyio.Semaphore(1), "Semaphore.acquire", "Semaphore.release"),
    "anyio.CapacityLimiter": (
        lambda: anyio.CapacityLimiter(1),
        "CapacityLimiter.acquire",
        "CapacityLimiter.release_on_behalf_of",
    ),
}


@pytest.mark.parametrize("made", ["before", "while on"])
@pytest.mark.parametrize("kind", MAKERS)
def test_tasks_that_queue_for_a_lock_are_one_contention_each(kind, made, clock):
    """All but the first wait, and every nanosecond is charged to a holder of the lock."""
    make, acquire, release = MAKERS[kind]

    async def contend_c(lock) -> None:
        async with lock:
            await others_run()
            clock.advance(HOLD_NS)

    async def main():
        lock = make() if made == "before" else None
        with recording() as seen:
            lock = lock if lock is not None else make()
            await asyncio.gather(*(contend_c(lock) for _ in range(6)))
        return seen

    seen = asyncio.run(main())
    expected = 5, (1 + 2 + 3 + 4 + 5) * HOLD_NS
    assert seen.of("block", "contend_c") == expected
    stack = seen.stack("block", "contend_c")
    assert (stack[0], stack[-1]) == (acquire, "contend_c")
    if (kind, made) == ("asyncio.Condition", "before"):
        return  # this condition was made before and keeps its lock's own methods, as documented
    assert seen.of("mutex", "contend_c") == expected
    assert seen.stack("mutex", "contend_c")[0] == release


@pytest.mark.parametrize("kind", MAKERS)
def test_a_release_is_charged_with_no_more_than_was_waited(kind, clock):
    """Both profiles use the same reading of the clock, whatever runs in between."""
    make, _, _ = MAKERS[kind]

    async def contend_c(lock) -> None:
        async with lock:
            await others_run()
            clock.tick_ns = 0

    async def main() -> None:
        clock.tick_ns = HOLD_NS
        lock = make()
        await asyncio.gather(*(contend_c(lock) for _ in range(4)))

    with recording() as seen:
        asyncio.run(main())
    charged, waited = seen.of("mutex", "contend_c"), seen.of("block", "contend_c")
    assert charged[0] == waited[0] == 3
    assert HOLD_NS < charged[1] <= waited[1]


def test_waits_are_measured_in_real_time(loop_name):
    """A wait is at least as long as another task saw, and at most as long as the call took."""

    async def wait_in_time(event) -> int:
        began_ns = time.monotonic_ns()
        await event.wait()
        return time.monotonic_ns() - began_ns

    async def main() -> tuple[int, int]:
        event = asyncio.Event()
        waiter = asyncio.create_task(wait_in_time(event))
        await others_run()
        seen_ns = time.monotonic_ns()
        await asyncio.sleep(0.01)
        seen_ns = time.monotonic_ns() - seen_ns
        event.set()
        return seen_ns, await waiter

    with recording() as seen:
        seen_ns, took_ns = run(main(), loop_name)
    count, delay_ns = seen.of("block", "wait_in_time")
    assert count == 1
    assert seen_ns <= delay_ns <= took_ns


def test_the_holder_that_releases_is_charged_with_its_line(clock):
    """In mutex the task that held the lock is at the line of its release; waiters are not."""
    released_at = 0

    async def hold_d(lock) -> None:
        nonlocal released_at
        await lock.acquire()
        await others_run()
        clock.advance(HOLD_NS)
        released_at = sys._getframe().f_lineno + 1
        lock.release()

    async def contend_e(lock) -> None:
        await lock.acquire()
        lock.release()

    async def main() -> None:
        lock = asyncio.Lock()
        await asyncio.gather(hold_d(lock), contend_e(lock), contend_e(lock))

    with recording() as seen:
        asyncio.run(main())
    (sample,) = [each for each in seen.samples("mutex") if is_in("hold_d", each)]
    assert names(sample)[0] == "Lock.release"
    assert sample.stack[1].line == released_at
    assert not is_in("contend_e", sample)
    assert seen.of("block", "contend_e") == (2, 2 * HOLD_NS)
    assert sample.values == (1, 2 * HOLD_NS)


async def wait_for_event(event, _):
    await event.wait()


async def wait_for_condition(condition, _):
    async with condition:
        await condition.wait()


async def wait_for_condition_for(condition, _):
    notified = iter((False, True))
    async with condition:
        await condition.wait_for(lambda: next(notified))


async def notify(condition, clock):
    async with condition:
        condition.notify_all()
        await others_run()
        # The wait goes on until the waiter has got the lock back; it is counted once.
        clock.advance(HOLD_NS)


async def wait_for_barrier(barrier, _):
    await barrier.wait()


async def pass_barrier(barrier, _):
    await barrier.wait()


async def wait_to_get(queue, _):
    await queue.get()


def full_queue():
    return with_an_item(asyncio.LifoQueue(1))


def with_an_item(queue):
    queue.put_nowait(1)
    return queue


async def wait_to_put(queue, _):
    await queue.put(item=2)


async def wait_to_join(queue, _):
    await queue.join()


async def wait_to_receive(streams, _):
    with streams[0], streams[1]:
        await streams[1].receive()


async def wait_to_send(streams, _):
    with streams[0], streams[1]:
        await streams[0].send(1)


async def send(streams, _):
    streams[0].send_nowait(1)


async def receive(streams, _):
    streams[1].receive_nowait()


async def set_event(event, _):
    event.set()


async def put(queue, _):
    queue.put_nowait(1)


async def get(queue, _):
    queue.get_nowait()


async def finish(queue, _):
    queue.task_done()


def streams():
    return anyio.create_memory_object_stream(0)


WAITS = {
    "event": ("Event.wait", asyncio.Event, wait_for_event, set_event),
    "anyio event": ("Event.wait", anyio.Event, wait_for_event, set_event),
    "condition": ("Condition.wait", asyncio.Condition, wait_for_condition, notify),
    "wait_for": ("Condition.wait_for", asyncio.Condition, wait_for_condition_for, notify),
    "anyio condition": ("Condition.wait", anyio.Condition, wait_for_condition, notify),
    "barrier": ("Barrier.wait", lambda: asyncio.Barrier(2), wait_for_barrier, pass_barrier),
    "get": ("Queue.get", asyncio.Queue, wait_to_get, put),
    "put": ("Queue.put", full_queue, wait_to_put, get),
    "join": ("Queue.join", lambda: with_an_item(asyncio.PriorityQueue()), wait_to_join, finish),
    "receive": ("MemoryObjectReceiveStream.receive", streams, wait_to_receive, send),
    "send": ("MemoryObjectSendStream.send", streams, wait_to_send, receive),
}
"""For each case: the leaf, what makes the primitive, what waits for it, and what ends the wait."""


@pytest.mark.parametrize("case", WAITS)
def test_one_wait_is_one_contention_of_the_outermost_primitive(case, loop_name, clock):
    """The leaf is the method that was called, whatever it uses inside, and the wait counts once."""
    leaf, make, wait, wake = WAITS[case]

    async def main() -> int:
        primitive, began_ns = make(), clock.now_ns
        waiter = asyncio.create_task(wait(primitive, clock))
        await others_run()
        clock.advance(HOLD_NS)
        await wake(primitive, clock)
        await waiter
        return clock.now_ns - began_ns

    with recording() as seen:
        took_ns = run(main(), loop_name)
    assert seen.of("block", wait.__name__) == (1, took_ns)
    stack = [name for name in seen.stack("block", wait.__name__) if "lambda" not in name]
    assert stack == [leaf, f"test_asyncio_waits.{wait.__name__}"]


def test_calls_that_do_not_wait_are_not_recorded():
    """Free locks, set events and queues with items and room appear in neither profile."""

    async def pass_through() -> None:
        for make, _, _ in MAKERS.values():
            async with make():
                pass
        event, queue = asyncio.Event(), asyncio.Queue(1)
        event.set()
        await event.wait()
        await queue.put(1)
        await queue.get()
        queue.task_done()
        await queue.join()
        await asyncio.Barrier(1).wait()
        send, receive = anyio.create_memory_object_stream(1)
        with send, receive:
            await send.send(1)
            await receive.receive()
        await asyncio.sleep(0.001)

    with recording() as seen:
        asyncio.run(pass_through())
    assert seen.samples("block") == ()
    assert seen.samples("mutex") == ()


def test_timeouts_and_cancellations_count_with_their_waiting_time(clock):
    """A wait that is given up is a contention too, and the exceptions are the original ones."""

    async def give_up() -> None:
        lock = asyncio.Lock()
        await lock.acquire()
        asyncio.get_running_loop().call_soon(clock.advance, HOLD_NS)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.001):
                await lock.acquire()
        task = asyncio.create_task(lock.acquire(), name="cancelled")
        await others_run()
        clock.advance(HOLD_NS)
        task.cancel("enough")
        with pytest.raises(asyncio.CancelledError):
            await task
        lock.release()

    with recording() as seen:
        asyncio.run(give_up())
    assert seen.of("block", "Lock.acquire") == (2, 2 * HOLD_NS)
    assert seen.samples("mutex") == ()  # no task waited when the lock was released
    assert (asyncio_waits._blocked, asyncio_waits._waiters) == ({}, {})


def test_the_stack_is_the_whole_chain_of_awaits_and_ends_with_the_task(loop_name):
    """It goes through coroutines and async generators, without the event loop's frames."""

    async def generate(event):
        await event.wait()
        yield 1

    async def inner(event) -> None:
        async for _ in generate(event):
            pass

    async def outer(event) -> None:
        await inner(event)

    async def main() -> None:
        event = asyncio.Event()
        task = asyncio.create_task(outer(event))
        await others_run()
        event.set()
        await task

    with recording() as seen:
        run(main(), loop_name)
    assert [name.split(".")[-1] for name in seen.stack("block", "outer")] == [
        "wait",
        "generate",
        "inner",
        "outer",
    ]


def test_wrappers_behave_as_the_original_methods():
    """They are coroutine functions with the same name, signature and errors; overriding works."""
    before = {
        method: (inspect.signature(method), method.__qualname__)
        for method in (asyncio.Lock.acquire, asyncio.Queue.put, asyncio.Event.wait)
    }

    class Counting(asyncio.Queue):
        async def get(self):
            return "counted", await super().get()

    async def main() -> None:
        queue = Counting()
        queue.put_nowait(1)
        assert await queue.get() == ("counted", 1)
        with pytest.raises(RuntimeError, match="un-acquired"):
            await asyncio.Condition().wait()
        with pytest.raises(TypeError):
            await asyncio.Event().wait(1, 2)
        if sys.version_info >= (3, 13):
            queue.shutdown()
            with pytest.raises(asyncio.QueueShutDown):
                await asyncio.Queue.get(queue)

    with recording():
        for method in (asyncio.Lock.acquire, asyncio.Queue.put, asyncio.Event.wait):
            assert inspect.iscoroutinefunction(method)
            signature, qualname = before[method.__wrapped__]
            assert (inspect.signature(method), method.__qualname__) == (signature, qualname)
        asyncio.run(main())


def test_a_wait_leaves_no_cycles():
    """Locks and exceptions are freed with their last reference, without the garbage collector."""

    class Weak(asyncio.Lock):
        pass

    async def main() -> weakref.ref:
        lock = Weak()
        async with lock:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.001):
                    await lock.acquire()
        return weakref.ref(lock)

    gc.collect()
    gc.disable()
    try:
        with recording():
            assert asyncio.run(main())() is None
    finally:
        gc.enable()


def test_the_wait_of_a_task_that_is_thrown_away_is_not_recorded():
    """The task never continues: there is no record, no exception, and nothing keeps it alive."""

    async def forever(lock) -> None:
        await lock.acquire()

    lock = asyncio.Lock()
    with recording() as seen:
        loop = asyncio.new_event_loop()
        loop.run_until_complete(lock.acquire())
        task = loop.create_task(forever(lock))
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()
        task._log_destroy_pending = False
        del task, lock
        gc.collect()
    assert seen.of("block", "forever") == (0, 0)
    assert (asyncio_waits._blocked, asyncio_waits._waiters) == ({}, {})


async def all_workers_idle() -> None:
    """Wait until every worker thread of anyio waits for work."""
    workers = [each for each in threading.enumerate() if type(each).__name__ == "WorkerThread"]
    await until(lambda: all(worker.queue.not_empty._waiters for worker in workers))


@pytest.mark.parametrize("mutex", [0, 1])
def test_tasks_of_a_full_pool_wait_for_a_worker_thread(mutex, clock):
    """They have a pseudo-frame that says so. Idle worker threads are not recorded."""
    gate = threading.Lock()  # no profile sees waits for it

    def work() -> None:
        with gate:
            pass

    async def serve_f(limiter) -> None:
        await anyio.to_thread.run_sync(work, limiter=limiter)

    async def main() -> None:
        limiter = anyio.CapacityLimiter(2)
        with gate:
            tasks = [asyncio.create_task(serve_f(limiter)) for _ in range(5)]
            await until(lambda: limiter.statistics().tasks_waiting == 3)
            clock.advance(HOLD_NS)
        await asyncio.gather(*tasks)
        for _ in range(2):
            await all_workers_idle()
            await serve_f(limiter)

    with recording(mutex=mutex) as seen:
        asyncio.run(main())
    worker = "<waiting for a worker thread>"
    assert seen.of("block", worker) == (3, 3 * HOLD_NS)
    stack = seen.stack("block", worker)
    assert stack[0] == worker
    assert stack[-1].endswith("serve_f")
    assert not any(is_in("WorkerThread.run", each) for each in seen.samples("block"))
    assert seen.of("mutex", "serve_f")[0] == 3 * mutex


def test_work_on_a_worker_thread_may_wait():
    """A queue's `get` that is called as work does not count as an idle worker."""
    items: queue.Queue[int] = queue.Queue()

    async def main() -> None:
        getting = asyncio.create_task(anyio.to_thread.run_sync(items.get))
        await until(lambda: items.not_empty._waiters)
        items.put(1)
        await getting
        await all_workers_idle()
        await anyio.to_thread.run_sync(time.sleep, 0)  # ends the idle wait of that worker

    with recording() as seen:
        asyncio.run(main())
    assert seen.of("block", "WorkerThread.run")[0] == 1
    assert seen.stack("block", "WorkerThread.run")[0] == "Queue.get"


@pytest.mark.server
def test_a_server_that_waits_for_its_client_is_not_recorded():
    """uvicorn waits for bodies, and for clients to disconnect, through an event."""
    waiting, left = threading.Event(), threading.Event()

    async def app(scope, receive, send) -> None:
        if scope["type"] == "http":
            await receive()
            waiting.set()
            assert (await receive())["type"] == "http.disconnect"
            left.set()

    with recording() as seen, serve(app, lifespan="off") as port:
        with leaving_client(port, "/"):
            assert waiting.wait(20)
        assert left.wait(20)
    assert not any(is_in("app", each) for each in seen.samples("block"))


def test_estimates_of_short_waits_are_unbiased(clock):
    """For 2,000 waits of 0.3 ms at rate 1 ms, count and sum are right within 20 %."""
    waited_ns = []

    async def spin(lock, rounds: int) -> None:
        for _ in range(rounds):
            began_ns = clock.now_ns
            await lock.acquire()
            waited_ns.append(clock.now_ns - began_ns)
            await asyncio.sleep(0)  # so that the other task queues
            clock.advance(300_000)
            lock.release()

    async def main() -> None:
        lock = asyncio.Lock()
        await asyncio.gather(spin(lock, 1000), spin(lock, 1000))

    with recording(block=1_000_000) as seen:
        asyncio.run(main())
    waits = [each for each in waited_ns if each]
    assert len(waits) > 1900
    count, delay_ns = seen.of("block", "spin")
    assert count == pytest.approx(len(waits), rel=0.2)
    assert delay_ns == pytest.approx(sum(waits), rel=0.2)


def test_a_release_is_charged_with_each_wait_since_it_began_or_since_the_last_release():
    """The time from a grant until the task with the grant runs is not charged."""
    waiters = TaskWaiters()
    waiters.enter(100)
    waiters.enter(300)
    assert waiters.release(1000) == 900 + 700
    assert not waiters.leave(5000, acquired=True)
    assert waiters.release(6000) == 5000
    assert waiters.release(6500) is None  # the lock was granted to the last waiter already
    assert waiters.leave(7000, acquired=True)


def test_a_waiter_that_gives_up_is_charged_to_the_next_release():
    """This holds while others wait. A grant that was not taken goes to the next waiter."""
    waiters = TaskWaiters()
    waiters.enter(0)
    waiters.enter(0)
    assert not waiters.leave(100, acquired=False)
    assert waiters.release(200) == 100 + 200
    waiters.enter(300)
    assert not waiters.leave(400, acquired=False)
    assert waiters.release(500) is None
