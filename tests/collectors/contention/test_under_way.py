"""Waits that have not ended are in the block profile, with the part inside the recording."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import os
import queue
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import anyio
import pytest
from fastapi import FastAPI

from asgi_pprof import PprofMiddleware
from asgi_pprof.collectors.contention.collector import ContentionCollector
from asgi_pprof.collectors.contention.under_way import waits
from asgi_pprof.merge import subtract
from asgi_pprof.recorders import contention
from tests.collectors.contention.recorded import HOLD_NS, is_in, names, recording, take
from tests.decode import decode
from tests.loops import run
from tests.programs import run_program
from tests.servers import ask, serve
from tests.servers import until as until_in_thread


async def until(condition) -> None:
    """Let other tasks and threads run until the condition is true."""
    while not condition():  # noqa: ASYNC110 (threads make it true)
        await asyncio.sleep(0.001)


async def others_run() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


_streams: list[Any] = []


@pytest.fixture(autouse=True)
def streams_closed():
    yield
    while _streams:
        _streams.pop().close()


# Each makes something, and returns what waits for it and what ends the wait.


def lock():
    made = asyncio.Lock()
    made._locked = True
    return made.acquire, made.release


def event():
    made = asyncio.Event()
    return made.wait, made.set


def items():
    made: asyncio.Queue[int] = asyncio.Queue()
    return made.get, lambda: made.put_nowait(1)


def room():
    made: asyncio.Queue[int] = asyncio.Queue(1)
    made.put_nowait(1)
    return lambda: made.put(2), made.get_nowait


def barrier():
    made = asyncio.Barrier(2)
    return made.wait, lambda: asyncio.ensure_future(made.wait())


def anyio_event():
    made = anyio.Event()
    return made.wait, made.set


def stream():
    send, receive = anyio.create_memory_object_stream[int](1)
    _streams.extend((send, receive))
    return receive.receive, lambda: send.send_nowait(1)


def limiter():
    made = anyio.CapacityLimiter(1)
    made.acquire_on_behalf_of_nowait(made)
    return made.acquire, lambda: made.release_on_behalf_of(made)


FOR_TASKS = {
    "Lock.acquire": lock,
    "Event.wait": event,
    "Queue.get": items,
    "Queue.put": room,
    "Barrier.wait": barrier,
    "anyio Event.wait": anyio_event,
    "MemoryObjectReceiveStream.receive": stream,
    "CapacityLimiter.acquire": limiter,
}


async def waiting(wait) -> None:
    await wait()


def of_waiting(samples) -> list[tuple[int, int]]:
    return [sample.values for sample in samples if is_in("waiting", sample)]


@pytest.mark.parametrize("leaf", FOR_TASKS)
def test_a_wait_of_a_task_counts_when_it_ends(leaf, clock):
    """Until then it has the count 0 and the time since it began, with the same stack."""

    async def main() -> None:
        wait, end = FOR_TASKS[leaf]()
        task = asyncio.create_task(waiting(wait))
        await others_run()
        clock.advance(HOLD_NS)
        assert of_waiting(seen.samples("block")) == [(0, HOLD_NS)]
        stack = seen.stack("block", "waiting")
        assert stack[0] == leaf.removeprefix("anyio ")
        clock.advance(HOLD_NS)
        assert of_waiting(seen.samples("block")) == [(0, 2 * HOLD_NS)]
        clock.advance(HOLD_NS)
        end()
        await task
        assert of_waiting(seen.samples("block")) == [(1, 3 * HOLD_NS)]
        assert seen.stack("block", "waiting") == stack

    with recording() as seen:
        run(main())
    assert not waits.of_tasks


@contextlib.asynccontextmanager
async def window(clock):
    """Give a function that returns what the window has, as `seconds=N` does."""
    collector = ContentionCollector(contention, "block")
    with collector.window():
        before = (await collector.snapshot())()

        async def delta():
            return subtract((await collector.snapshot())(), before).samples

        yield delta


@pytest.mark.parametrize("leaf", FOR_TASKS)
def test_a_window_has_the_part_of_a_wait_that_lies_inside(leaf, clock):
    """One that began before has no wrapper. One that ends inside counts."""

    async def main() -> None:
        hung, _ = FOR_TASKS[leaf]()
        wait, end = FOR_TASKS[leaf]()
        tasks = [asyncio.create_task(waiting(each)) for each in (hung, wait)]
        await others_run()
        clock.advance(1000 * HOLD_NS)
        async with window(clock) as delta:
            assert of_waiting(await delta()) == []
            clock.advance(HOLD_NS)
            assert of_waiting(await delta()) == [(0, 2 * HOLD_NS)]
            clock.advance(HOLD_NS)
            end()
            await tasks[1]
            await others_run()
            clock.advance(HOLD_NS)
            (found,) = [each for each in await delta() if is_in("waiting", each)]
            assert found.values == (1, 5 * HOLD_NS)
            assert names(found)[0] == leaf.removeprefix("anyio ")
            begun, _ = FOR_TASKS[leaf]()
            tasks.append(asyncio.create_task(waiting(begun)))
            await others_run()
            clock.advance(HOLD_NS)
            assert of_waiting(await delta()) == [(1, 7 * HOLD_NS)]
        await others_run()
        futures = [task._fut_waiter for task in (tasks[0], tasks[2])]
        assert all(len(future._callbacks) == 1 for future in futures)  # the task's own
        clock.advance(1000 * HOLD_NS)
        async with window(clock) as delta:  # the wait of the last one has an old wrapper
            clock.advance(HOLD_NS)
            assert of_waiting(await delta()) == [(0, 2 * HOLD_NS)]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    run(main())
    assert not waits.of_tasks


def thread_event():
    made = threading.Event()
    return made.wait, made.set, lambda: made._cond._waiters


def thread_items():
    made: queue.Queue[int] = queue.Queue()
    return made.get, lambda: made.put(1), lambda: made.not_empty._waiters


def thread_future():
    made: concurrent.futures.Future[int] = concurrent.futures.Future()
    return made.result, lambda: made.set_result(1), lambda: made._condition._waiters


def joined():
    end = threading.Event()
    thread = threading.Thread(target=end.wait, daemon=True)
    thread.start()

    def has_begun() -> bool:
        time.sleep(0.05)
        return True

    return lambda: thread.join(), end.set, has_begun


FOR_THREADS = {
    "Event.wait": thread_event,
    "Queue.get": thread_items,
    "Future.result": thread_future,
    "Thread.join": joined,
}


def thread_waiting(wait) -> None:
    wait()


def of_threads(samples) -> list[tuple[int, int]]:
    return [sample.values for sample in samples if is_in("thread_waiting", sample)]


@pytest.mark.parametrize("leaf", FOR_THREADS)
@pytest.mark.parametrize("is_older", [False, True])
def test_a_window_has_the_part_of_a_threads_wait_that_lies_inside(leaf, is_older, clock):
    """One that began before the window is looked at every 50 ms."""

    async def main() -> None:
        wait, end, has_begun = FOR_THREADS[leaf]()
        thread = threading.Thread(target=thread_waiting, args=(wait,), daemon=True)
        if is_older:
            thread.start()
            until_in_thread(has_begun)
            clock.advance(1000 * HOLD_NS)
        async with window(clock) as delta:
            if not is_older:
                thread.start()
                until_in_thread(has_begun)
            assert of_threads(await delta()) == []
            clock.advance(HOLD_NS)
            (found,) = [each for each in await delta() if is_in("thread_waiting", each)]
            assert found.values == (0, HOLD_NS)
            assert names(found)[0] == leaf
            end()
            await until(lambda: not thread.is_alive())
            await asyncio.sleep(0.3)
            assert of_threads(await delta()) == [(1, HOLD_NS)]
            clock.advance(HOLD_NS)
            assert of_threads(await delta()) == [(1, HOLD_NS)]

    run(main())
    assert not waits.of_threads


def test_the_end_of_an_older_wait_of_a_thread_is_noticed_without_a_profile(clock):
    """Otherwise it would seem to last to the end of the window."""

    async def main() -> None:
        wait, end, has_begun = thread_event()
        thread = threading.Thread(target=thread_waiting, args=(wait,), daemon=True)
        thread.start()
        until_in_thread(has_begun)
        async with window(clock) as delta:
            clock.advance(HOLD_NS)
            end()
            await until(lambda: not thread.is_alive())
            await asyncio.sleep(0.3)
            clock.advance(1000 * HOLD_NS)
            assert of_threads(await delta()) == [(1, HOLD_NS)]

    run(main())


def test_no_timer_is_left_when_the_recording_ends():
    """Threads that wait since before are looked at again while the recording lasts only."""
    over = threading.Event()
    thread = threading.Thread(target=over.wait)
    thread.start()

    def timers() -> list[str]:
        scheduled = asyncio.get_running_loop()._scheduled
        return [str(each) for each in scheduled if not each.cancelled() and "_poll" in str(each)]

    async def main() -> None:
        with recording():
            await ContentionCollector(contention, "block").snapshot()
            assert len(timers()) == 1
        assert timers() == []

    try:
        asyncio.run(main(), debug=False)
    finally:
        over.set()
        thread.join()


def test_work_in_the_queue_of_an_executor_is_under_way(clock):
    """It has the stack that submitted it. Work that is cancelled waits until a thread sees that."""

    def submit_to(pool):
        return pool.submit(int)

    with recording() as seen, ThreadPoolExecutor(1) as pool:
        free = threading.Event()
        pool.submit(free.wait)
        until_in_thread(lambda: free._cond._waiters)
        work = submit_to(pool)
        clock.advance(HOLD_NS)
        assert seen.of("block", "submit_to") == (0, HOLD_NS)
        assert seen.stack("block", "submit_to")[0] == "<waiting for a worker thread>"
        free.set()
        work.result()
        assert seen.of("block", "submit_to") == (1, HOLD_NS)
    del work
    assert not waits.of_work


def test_a_wait_that_a_profile_has_shown_is_kept_when_its_task_is_thrown_away(clock):
    """Totals never fall. If none has shown it, it leaves nothing, as it never ends."""

    async def main(is_shown: bool) -> None:
        coroutine = waiting(asyncio.Event().wait)
        task = asyncio.create_task(coroutine)
        await others_run()
        clock.advance(HOLD_NS)
        if is_shown:
            assert of_waiting(seen.samples("block")) == [(0, HOLD_NS)]
        with contextlib.suppress(RuntimeError):
            coroutine.close()
        shown = of_waiting(seen.samples("block"))
        assert shown == ([(0, HOLD_NS)] if is_shown else [])
        task.cancel()
        await asyncio.wait([task])

    for is_shown in (False, True):
        with recording() as seen:
            asyncio.run(main(is_shown))


def test_waits_shorter_than_the_rate_are_left_out_until_they_end(clock):
    """They would have to be sampled. So is everything that is no contention, and what is ours."""

    async def main() -> None:
        task = asyncio.create_task(waiting(asyncio.Event().wait))
        await anyio.to_thread.run_sync(int)  # then that thread waits for work
        await others_run()
        clock.advance(HOLD_NS - 1)
        assert of_waiting(seen.samples("block")) == []
        clock.advance(1)
        assert of_waiting(seen.samples("block")) == [(0, HOLD_NS)]
        assert not any(is_in("WorkerThread.run", each) for each in seen.samples("block"))
        task.cancel()
        await asyncio.wait([task])

    with recording(block=HOLD_NS) as seen:
        run(main())


def test_a_wait_that_is_about_to_end_is_still_there(clock):
    """Its future is done, and its task has not run yet. Totals never fall."""

    async def main() -> None:
        older, event = asyncio.Event(), asyncio.Event()
        tasks = [asyncio.create_task(waiting(older.wait))]
        await others_run()
        async with window(clock) as delta:
            tasks.append(asyncio.create_task(waiting(event.wait)))
            await others_run()
            clock.advance(HOLD_NS)
            assert of_waiting(await delta()) == [(0, 2 * HOLD_NS)]
            older.set()
            event.set()
            assert of_waiting(await delta()) == [(0, 2 * HOLD_NS)]
            await asyncio.gather(*tasks)
            assert of_waiting(await delta()) == [(2, 2 * HOLD_NS)]

    run(main())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_has_none_of_its_parents_waits():
    """Neither those inside wrappers nor those that began before."""
    run_program(
        """
        import os, threading, time, warnings
        from asgi_pprof.recorders import contention, set_block_profile_rate
        from tests.collectors.contention.recorded import take
        from tests.servers import until

        def begin(wait):
            event = threading.Event()
            threading.Thread(target=wait, args=(event,), daemon=True).start()
            until(lambda: event._cond._waiters)

        begin(lambda event: event.wait())
        set_block_profile_rate(1)
        begin(lambda event: event.wait())
        take("block")
        time.sleep(0.05)
        assert [each.values[0] for each in take("block").samples].count(0) == 2
        warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads
        child = os.fork()
        if not child:
            os._exit(len(take("block").samples))
        assert os.waitpid(child, 0)[1] == 0
        set_block_profile_rate(0)
        """
    )


def test_many_waits_at_one_place_share_their_stack_and_further_stacks_have_one(monkeypatch):
    """A service may have 100,000 waits, and their stacks would take 250 MB."""
    monkeypatch.setattr("asgi_pprof.collectors.contention.under_way.MAX_STACKS", 1)

    async def elsewhere(wait) -> None:
        await wait()

    async def main() -> None:
        event = asyncio.Event()
        tasks = [asyncio.create_task(waiting(event.wait)) for _ in range(10)]
        await others_run()
        take("block")
        assert len({id(waits.of_tasks[id(task)].stack) for task in tasks}) == 1
        tasks += [asyncio.create_task(elsewhere(event.wait)) for _ in range(2)]
        await asyncio.sleep(0.01)
        assert any(names(each) == ["<other stacks>"] for each in seen.samples("block"))
        event.set()
        await asyncio.gather(*tasks)

    with recording() as seen:
        run(main())


def test_profiles_off_look_at_no_task(monkeypatch):
    monkeypatch.setattr("asgi_pprof.collectors.contention.under_way.alive", None)
    take("block")
    with recording(block=0, mutex=1):
        take("block")


hung = FastAPI()
hung.add_middleware(PprofMiddleware)


@hung.get("/hang")
async def hang() -> None:
    await hung.state.lock.acquire()


@pytest.mark.server
def test_a_window_of_a_hung_service_names_what_all_wait_for(loop_name):
    """Nobody's wait ends."""
    hung.state.lock = asyncio.Lock()
    hung.state.lock._locked = True
    with serve(hung, loop_name) as port, ThreadPoolExecutor(3) as clients:
        waiting = [clients.submit(ask, port, "/hang") for _ in range(3)]
        until_in_thread(lambda: len(hung.state.lock._waiters or ()) == 3)
        began_ns = time.monotonic_ns()
        profile = decode(ask(port, "/debug/pprof/block?seconds=1").body)
        asked_ns = time.monotonic_ns() - began_ns
        for waiter in list(hung.state.lock._waiters):
            waiter.get_loop().call_soon_threadsafe(waiter.set_result, True)
        assert [each.result().status for each in waiting] == [200] * 3
    ((stack, (count, delay_ns), _),) = [each for each in profile["samples"] if each[1][1] > 0.5e9]
    assert [place[0].rpartition(".")[2] for place in stack[:2]] == ["acquire", "hang"]
    assert count == 0
    assert 3e9 <= delay_ns < 3 * asked_ns
    assert any(each.startswith("waits under way: ") for each in profile["comments"])
