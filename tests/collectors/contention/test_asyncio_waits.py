"""Waits of tasks, on each kind of event loop: asyncio's primitives and anyio's."""

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

from asgi_pprof.collectors.contention import asyncio_waits as contention_asyncio
from asgi_pprof.collectors.contention.asyncio_waits import TaskWaiters
from tests.collectors.contention.test_collector import is_in, names, recording, run
from tests.servers import leaving_client, serve

HOLD_S = 0.02


class Stopwatch:
    """What a task has waited by its own clock."""

    def __init__(self) -> None:
        self.waited_ns: list[int] = []

    @contextlib.asynccontextmanager
    async def around(self, lock):
        began_ns = time.monotonic_ns()
        async with lock:
            self.waited_ns.append(time.monotonic_ns() - began_ns)
            yield


async def contend_c(lock, watch: Stopwatch) -> None:
    async with watch.around(lock):
        await asyncio.sleep(HOLD_S)


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
def test_tasks_queueing_on_a_lock(kind, made, loop_name):
    """All but the first are one contention each, and wait what their own clocks say, within 5 %."""
    make, acquire, release = MAKERS[kind]

    async def queue_up(lock) -> Stopwatch:
        watch = Stopwatch()
        await asyncio.gather(*(contend_c(lock, watch) for _ in range(6)))
        return watch

    async def main():
        lock = make() if made == "before" else None
        with recording() as seen:
            return seen, await queue_up(lock if lock is not None else make())

    seen, watch = run(loop_name, main())
    waited_ns = sum(watch.waited_ns[1:])
    count, delay_ns = seen.of("block", "contend_c")
    assert count == 5
    assert delay_ns == pytest.approx(waited_ns, rel=0.05)
    stack = seen.stack("block", "contend_c")
    assert stack[0] == acquire
    assert stack[-1] == "test_asyncio_waits.contend_c"
    if (kind, made) == ("asyncio.Condition", "before"):
        return  # it keeps its lock's own methods: not seen, as documented
    # All that was waited is charged, but for the moments from a release to the waiter's turn.
    count, caused_ns = seen.of("mutex", "contend_c")
    assert count == 5
    assert 0.95 * (5 + 4 + 3 + 2 + 1) * HOLD_S * 1e9 <= caused_ns <= delay_ns
    assert seen.stack("mutex", "contend_c")[0] == release


def test_the_holder_that_releases_is_charged_with_its_line(loop_name):
    """Who held the lock is in mutex at the line of its release; who waited is not."""
    released_at = 0

    async def hold_d(lock, held) -> None:
        nonlocal released_at
        await lock.acquire()
        held.set()
        await asyncio.sleep(HOLD_S)
        released_at = sys._getframe().f_lineno + 1
        lock.release()

    async def contend_e(lock) -> None:
        await lock.acquire()
        lock.release()

    async def main() -> None:
        lock, held = asyncio.Lock(), asyncio.Event()
        holder = asyncio.create_task(hold_d(lock, held))
        await held.wait()
        await asyncio.gather(contend_e(lock), contend_e(lock), holder)

    with recording() as seen:
        run(loop_name, main())
    (sample,) = [each for each in seen.samples("mutex") if is_in("hold_d", each)]
    assert names(sample)[0] == "Lock.release"
    assert sample.stack[1].line == released_at
    assert not is_in("contend_e", sample)
    block = seen.of("block", "contend_e")
    mutex = seen.of("mutex", "hold_d")
    assert block[0] == 2
    assert 0.5 * block[1] < mutex[1] <= block[1]


async def wait_for_event():
    event = asyncio.Event()
    asyncio.get_running_loop().call_later(HOLD_S, event.set)
    await event.wait()


async def wait_for_anyio_event():
    event = anyio.Event()
    asyncio.get_running_loop().call_later(HOLD_S, event.set)
    await event.wait()


async def wait_for_condition():
    condition = asyncio.Condition()
    async with condition:
        waiting = asyncio.create_task(_notify(condition))
        await condition.wait()
    await waiting


async def wait_for_condition_for():
    condition, done = asyncio.Condition(), []
    async with condition:
        waiting = asyncio.create_task(_notify(condition, done))
        await condition.wait_for(lambda: done)
    await waiting


async def wait_for_anyio_condition():
    condition = anyio.Condition()
    async with condition:
        waiting = asyncio.create_task(_notify(condition))
        await condition.wait()
    await waiting


async def _notify(condition, done=None):
    await asyncio.sleep(HOLD_S)
    async with condition:
        if done is not None:
            done.append(True)
        condition.notify_all()
        # The waiter has to get the lock back: its wait, counted once.
        await asyncio.sleep(HOLD_S)


async def wait_for_barrier():
    barrier = asyncio.Barrier(2)

    async def late():
        await asyncio.sleep(HOLD_S)
        await barrier.wait()

    task = asyncio.create_task(late())
    await barrier.wait()
    await task


async def wait_to_get():
    queue = asyncio.Queue()
    asyncio.get_running_loop().call_later(HOLD_S, queue.put_nowait, 1)
    await queue.get()


async def wait_to_put():
    queue = asyncio.LifoQueue(1)
    queue.put_nowait(1)
    asyncio.get_running_loop().call_later(HOLD_S, queue.get_nowait)
    await queue.put(item=2)


async def wait_to_join():
    queue = asyncio.PriorityQueue()
    queue.put_nowait(1)
    asyncio.get_running_loop().call_later(HOLD_S, queue.task_done)
    await queue.join()


async def wait_to_receive():
    send, receive = anyio.create_memory_object_stream(0)
    with send, receive:
        asyncio.get_running_loop().call_later(HOLD_S, send.send_nowait, 1)
        await receive.receive()


async def wait_to_send():
    send, receive = anyio.create_memory_object_stream(0)
    with send, receive:
        asyncio.get_running_loop().call_later(HOLD_S, receive.receive_nowait)
        await send.send(1)


WAITS = {
    wait_for_event: "Event.wait",
    wait_for_anyio_event: "Event.wait",
    wait_for_condition: "Condition.wait",
    wait_for_condition_for: "Condition.wait_for",
    wait_for_anyio_condition: "Condition.wait",
    wait_for_barrier: "Barrier.wait",
    wait_to_get: "Queue.get",
    wait_to_put: "Queue.put",
    wait_to_join: "Queue.join",
    wait_to_receive: "MemoryObjectReceiveStream.receive",
    wait_to_send: "MemoryObjectSendStream.send",
}


@pytest.mark.parametrize("wait", WAITS, ids=lambda wait: wait.__name__)
def test_one_wait_is_one_contention_of_the_outermost_primitive(wait, loop_name):
    """Whatever it uses inside, the leaf is the method that was called, and it counts once."""

    async def main() -> int:
        began_ns = time.monotonic_ns()
        await wait()
        return time.monotonic_ns() - began_ns

    with recording() as seen:
        took_ns = run(loop_name, main())
    count, delay_ns = seen.of("block", wait.__name__)
    assert count == 1
    assert 0.9 * HOLD_S * 1e9 < delay_ns <= took_ns
    stack = [name for name in seen.stack("block", wait.__name__) if "lambda" not in name]
    assert stack == [
        WAITS[wait],
        f"test_asyncio_waits.{wait.__name__}",
        stack[-1],
    ]
    assert stack[-1].endswith("main")


def test_what_need_not_wait_is_not_recorded(loop_name):
    """Free locks, set events and queues with items and room leave nothing in either profile."""

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
        await asyncio.sleep(HOLD_S)

    with recording() as seen:
        run(loop_name, pass_through())
    assert seen.samples("block") == ()
    assert seen.samples("mutex") == ()


def test_timeouts_and_cancellations_count_with_what_was_waited(loop_name):
    """Giving up is a contention too, and the exceptions are the same ones."""

    async def give_up() -> None:
        lock = asyncio.Lock()
        await lock.acquire()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(HOLD_S):
                await lock.acquire()
        task = asyncio.create_task(lock.acquire(), name="cancelled")
        await asyncio.sleep(HOLD_S)
        task.cancel("enough")
        with pytest.raises(asyncio.CancelledError):
            await task
        lock.release()

    with recording() as seen:
        run(loop_name, give_up())
    count, delay_ns = seen.of("block", "Lock.acquire")
    assert count == 2
    assert delay_ns > 1.8 * HOLD_S * 1e9
    assert seen.samples("mutex") == ()  # nobody waited when it was released
    assert (contention_asyncio._blocked, contention_asyncio._waiters) == ({}, {})


def test_the_stack_is_the_whole_chain_of_awaits_and_ends_with_the_task(loop_name):
    """Through coroutines and async generators, without the event loop's frames."""

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
        await asyncio.sleep(HOLD_S)
        event.set()
        await task

    with recording() as seen:
        run(loop_name, main())
    assert [name.split(".")[-1] for name in seen.stack("block", "outer")] == [
        "wait",
        "generate",
        "inner",
        "outer",
    ]


def test_wrappers_are_drop_ins():
    """Coroutine functions stay such, with name, signature and errors; overriding works."""
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


def test_a_wait_leaves_no_cycles(loop_name):
    """Locks and exceptions die with their last reference, without the garbage collector."""

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
            assert run(loop_name, main())() is None
    finally:
        gc.enable()


def test_a_task_that_is_thrown_away_is_no_contention():
    """Nobody wakes up: no record, no exception, and nothing is kept of it."""

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
    assert (contention_asyncio._blocked, contention_asyncio._waiters) == ({}, {})


@pytest.mark.parametrize("mutex", [0, 1])
def test_a_saturated_pool_shows_as_waiting_for_a_worker_thread(loop_name, mutex):
    """anyio's 40 threads busy: who waits for one is at the pseudo-frame, idle workers are not."""

    async def serve_f() -> None:
        await anyio.to_thread.run_sync(time.sleep, 0.05)

    async def main() -> None:
        await asyncio.gather(*(serve_f() for _ in range(60)))
        await asyncio.sleep(HOLD_S)
        await serve_f()  # a worker that was idle

    with recording(mutex=mutex) as seen:
        run(loop_name, main())
    worker = "<waiting for a worker thread>"
    count, delay_ns = seen.of("block", worker)
    assert count == 20
    assert delay_ns >= 20 * 0.045e9
    stack = seen.stack("block", worker)
    assert stack[0] == worker
    assert stack[-1].endswith("serve_f")
    assert not any(is_in("WorkerThread.run", each) for each in seen.samples("block"))
    assert seen.of("mutex", "serve_f")[0] == 20 * mutex


def test_what_a_worker_is_given_to_do_may_wait(loop_name):
    """A queue's own `get`, handed to a worker thread, is no idle worker."""
    items: queue.Queue[int] = queue.Queue()

    async def main() -> None:
        asyncio.get_running_loop().call_later(HOLD_S, items.put, 1)
        await anyio.to_thread.run_sync(items.get)
        await asyncio.sleep(HOLD_S)
        await anyio.to_thread.run_sync(time.sleep, 0)  # ends that worker's idle wait

    with recording() as seen:
        run(loop_name, main())
    assert seen.of("block", "WorkerThread.run")[0] == 1
    assert seen.stack("block", "WorkerThread.run")[0] == "Queue.get"


@pytest.mark.server
def test_a_server_that_waits_for_its_client_is_no_contention(loop_name):
    """uvicorn waits for bodies and for clients that leave behind an event."""
    left = threading.Event()

    async def app(scope, receive, send) -> None:
        if scope["type"] == "http":
            while (await receive())["type"] != "http.disconnect":
                pass
            left.set()

    with recording() as seen, serve(app, loop_name, lifespan="off") as port:
        with leaving_client(port, "/"):
            time.sleep(HOLD_S)
        assert left.wait(20)
    assert not any(is_in("app", each) for each in seen.samples("block"))


def test_unbiased_at_a_millisecond(loop_name):
    """2,000 waits of about 0.3 ms at rate 1 ms: count and sum are right, within 20 %."""
    waited_ns = []

    async def spin(lock, rounds: int) -> None:
        for _ in range(rounds):
            began_ns = time.monotonic_ns()
            await lock.acquire()
            waited_ns.append(time.monotonic_ns() - began_ns)
            await asyncio.sleep(0)  # so that the other one queues
            end_ns = time.monotonic_ns() + 300_000
            while time.monotonic_ns() < end_ns:
                pass
            lock.release()

    async def main() -> None:
        lock = asyncio.Lock()
        await asyncio.gather(spin(lock, 1000), spin(lock, 1000))

    with recording(block=1_000_000) as seen:
        run(loop_name, main())
    waits = [each for each in waited_ns if each > 100_000]
    assert len(waits) > 1900
    count, delay_ns = seen.of("block", "spin")
    assert count == pytest.approx(len(waits), rel=0.2)
    assert delay_ns == pytest.approx(sum(waits), rel=0.2)


def test_a_release_is_charged_with_each_wait_since_it_began_or_since_the_last_release():
    """And not with the time from a release to the turn of who was let go."""
    queue = TaskWaiters()
    queue.enter(100)
    queue.enter(300)
    assert queue.release(1000) == 900 + 700
    assert not queue.leave(5000, acquired=True)
    assert queue.release(6000) == 5000
    assert queue.release(6500) is None  # the last was let go
    assert queue.leave(7000, acquired=True)


def test_a_waiter_that_gives_up_is_charged_to_the_next_release():
    """As long as others wait then; a grant that was not taken goes to the next in line."""
    queue = TaskWaiters()
    queue.enter(0)
    queue.enter(0)
    assert not queue.leave(100, acquired=False)
    assert queue.release(200) == 100 + 200
    queue.enter(300)
    assert not queue.leave(400, acquired=False)
    assert queue.release(500) is None
