"""Waits of threads: what ends in a condition, joins, semaphores and executors."""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor, wait

import pytest

from asgi_pprof.collectors.contention.threading_waits import ThreadWaiters
from tests.collectors.contention.test_collector import is_in, names, recording, run
from tests.servers import until

HOLD_S = 0.03


def wait_for_event():
    event = threading.Event()
    _later(event.set)
    event.wait()


def wait_for_condition():
    condition = threading.Condition()
    _later(lambda: _notify(condition))
    with condition:
        condition.wait()


def wait_for_condition_for():
    condition, done = threading.Condition(), []
    _later(lambda: (done.append(1), _notify(condition)))
    with condition:
        condition.wait_for(lambda: done)


def _notify(condition):
    with condition:
        condition.notify()


def wait_for_semaphore():
    semaphore = threading.BoundedSemaphore(1)
    semaphore.acquire()
    _later(semaphore.release)
    with semaphore:
        pass


def wait_for_barrier():
    barrier = threading.Barrier(2)
    _later(barrier.wait)
    barrier.wait()


def wait_to_get():
    items = queue.Queue()
    _later(lambda: items.put(1))
    items.get()


def wait_to_put():
    items = queue.PriorityQueue(1)
    items.put(1)
    _later(items.get)
    items.put(2)


def wait_for_tasks():
    items = queue.LifoQueue()
    items.put(1)
    _later(items.task_done)
    items.join()


def wait_for_thread():
    thread = threading.Thread(target=time.sleep, args=(HOLD_S,))
    thread.start()
    thread.join()


def wait_for_result():
    future = Future()
    _later(lambda: future.set_result(1))
    assert future.result() == 1


def wait_for_futures():
    future = Future()
    _later(lambda: future.set_result(1))
    wait([future])


_timers: list[threading.Thread] = []


def _later(call) -> None:
    def sleep_and_call():
        time.sleep(HOLD_S)
        call()

    _timers.append(threading.Thread(target=sleep_and_call))
    _timers[-1].start()


WAITS = {
    wait_for_event: "Event.wait",
    wait_for_condition: "Condition.wait",
    wait_for_condition_for: "Condition.wait_for",
    wait_for_semaphore: "Semaphore.acquire",
    wait_for_barrier: "Barrier.wait",
    wait_to_get: "Queue.get",
    wait_to_put: "Queue.put",
    wait_for_tasks: "Queue.join",
    wait_for_thread: "Thread.join",
    wait_for_result: "Future.result",
    wait_for_futures: "Event.wait",
}


@pytest.mark.parametrize("wait_in", WAITS, ids=lambda each: each.__name__)
def test_one_wait_is_one_contention_of_the_outermost_primitive(wait_in):
    """Whatever it uses inside, the leaf is the method that was called, and it counts once."""
    with recording() as seen:
        began_ns = time.monotonic_ns()
        wait_in()
        took_ns = time.monotonic_ns() - began_ns
        while _timers:
            _timers.pop().join()
    waits = [
        each
        for each in seen.samples("block")
        if is_in(wait_in.__name__, each) and not is_in("start", each)
    ]
    (sample,) = waits
    count, delay_ns = sample.values
    assert count == 1
    assert 0.5 * HOLD_S * 1e9 < delay_ns <= took_ns
    assert names(sample)[0] == WAITS[wait_in]
    between = ["_base.wait"] if wait_in is wait_for_futures else []
    assert names(sample)[1 : len(between) + 2] == [
        *between,
        f"test_threading_waits.{wait_in.__name__}",
    ]


def test_threads_queueing_on_a_semaphore():
    """One contention each, as long as their own clocks say; who releases is charged with it."""
    waited_ns: list[int] = []

    def contend_g() -> None:
        began_ns = time.monotonic_ns()
        with semaphore:
            waited_ns.append(time.monotonic_ns() - began_ns)

    def hold_h() -> None:
        with semaphore:
            for thread in threads:
                thread.start()
            until(lambda: len(semaphore._cond._waiters) == 4)
            time.sleep(0.2)

    semaphore = threading.Semaphore(1)  # before it is switched on
    threads = [threading.Thread(target=contend_g) for _ in range(4)]
    with recording() as seen:
        hold_h()
        for thread in threads:
            thread.join()
    count, delay_ns = seen.of("block", "contend_g")
    assert count == 4
    assert delay_ns == pytest.approx(sum(waited_ns), rel=0.05)
    holder = [each for each in seen.samples("mutex") if is_in("hold_h", each)]
    assert [each.values[0] for each in holder] == [1]
    assert names(holder[0])[0] == "Semaphore.release"
    # The first release ends nearly all of the waiting there is.
    assert 0.7 * delay_ns < holder[0].values[1] <= delay_ns


def test_what_need_not_wait_is_not_recorded():
    """Nor what must not wait, nor sleep, nor waiting for a client that reads."""
    semaphore, items, event = threading.Semaphore(2), queue.Queue(), threading.Event()
    with recording() as seen:
        event.set()
        event.wait()
        threading.Event().wait(0)
        with semaphore, semaphore:
            assert not semaphore.acquire(blocking=False)
        with pytest.raises(queue.Empty):
            items.get_nowait()
        time.sleep(HOLD_S)
    assert seen.samples("block") == ()
    assert seen.samples("mutex") == ()


def test_timeouts_count_with_what_was_waited():
    """Giving up after 30 ms is a contention of 30 ms; errors are the same ones."""
    with recording() as seen:
        assert not threading.Event().wait(HOLD_S)
        with pytest.raises(queue.Empty):
            queue.Queue().get(timeout=HOLD_S)
        with pytest.raises(RuntimeError, match="un-acquired"):
            threading.Condition().wait()
        with pytest.raises(RuntimeError, match="cannot join current thread"):
            threading.current_thread().join()
    count, delay_ns = seen.of("block", "test_timeouts_count_with_what_was_waited")
    assert count == 2
    assert delay_ns >= 2 * HOLD_S * 1e9


def test_a_full_executor_shows_as_waiting_for_a_worker_thread(loop_name):
    """From submit to start, at the stack that submitted; workers with nothing to do do not show."""

    def work() -> None:
        while not done:
            time.sleep(0.001)  # which is no contention, as waiting for an event would be

    async def submit_i() -> None:
        await asyncio.get_running_loop().run_in_executor(executor, work)

    async def main() -> None:
        waiting = [asyncio.create_task(submit_i()) for _ in range(6)]
        await asyncio.sleep(0)
        await asyncio.sleep(HOLD_S)
        done.append(True)
        await asyncio.gather(*waiting)

    executor = ThreadPoolExecutor(2)
    done: list[bool] = []
    with recording() as seen, executor:
        run(loop_name, main())
        time.sleep(HOLD_S)
    worker = "<waiting for a worker thread>"
    count, delay_ns = seen.of("block", worker)
    assert count == 4
    assert delay_ns >= 4 * 0.95 * HOLD_S * 1e9
    stack = seen.stack("block", worker)
    assert stack[1] == "ThreadPoolExecutor.submit"
    assert stack[-1].endswith("submit_i")
    assert not any(is_in("_worker", each) for each in seen.samples("block"))


def test_a_cancelled_work_item_leaves_nothing():
    """What is never started is never charged, and its future is as any other."""
    with recording() as seen, ThreadPoolExecutor(1) as executor:
        gate = threading.Event()
        executor.submit(gate.wait)
        future = executor.submit(time.sleep, 0)
        assert future.cancel()
        gate.set()
    assert future.cancelled()
    assert seen.of("block", "<waiting for a worker thread>")[0] <= 1


def test_waits_in_a_task_end_with_the_task(loop_name):
    """A thread's primitive on the loop: the task's stack, without the event loop's frames."""

    async def block_the_loop() -> None:
        threading.Event().wait(HOLD_S)

    with recording() as seen:
        run(loop_name, block_the_loop())
    assert seen.stack("block", "block_the_loop")[-1].endswith("block_the_loop")


def test_a_release_is_charged_with_each_wait_since_it_began_or_since_the_last_release():
    """The same rule as for tasks; with nobody waiting there is nothing to charge."""
    waiters = ThreadWaiters()
    assert waiters.release(50) is None
    waiters.enter(100)
    assert waiters.release(1000) == 900
    assert waiters.release(1500) == 500
    assert waiters.leave()
    assert waiters.release(2000) is None
