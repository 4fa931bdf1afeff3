"""Waits of threads for primitives built on conditions, threads and executors are recorded."""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor, wait

import pytest

from asgi_pprof.collectors.contention.threading_waits import ThreadWaiters
from tests.collectors.contention.recorded import HOLD_NS, is_in, names, recording
from tests.loops import run
from tests.servers import until


def wait_for_event(event):
    event.wait()


def wait_for_condition(condition):
    with condition:
        condition.wait()


def wait_for_condition_for(condition):
    notified = iter((False, True))
    with condition:
        condition.wait_for(lambda: next(notified))


def notify(condition):
    with condition:
        condition.notify()


def wait_for_semaphore(semaphore):
    with semaphore:
        pass


def taken_semaphore():
    semaphore = threading.BoundedSemaphore(1)
    semaphore.acquire()
    return semaphore


def wait_for_barrier(barrier):
    barrier.wait()


def wait_to_get(items):
    items.get()


def wait_to_put(items):
    items.put(2)


def full_queue():
    return with_an_item(queue.PriorityQueue(1))


def with_an_item(items):
    items.put(1)
    return items


def wait_for_tasks(items):
    items.join()


def wait_for_thread(thread):
    thread.join()


class GatedThread(threading.Thread):
    """Runs until its gate is released."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Lock()  # no profile sees waits for it
        self.gate.acquire()
        self.start()

    def run(self) -> None:
        with self.gate:
            pass


def wait_for_result(future):
    assert future.result() == 1


def wait_for_futures(future):
    wait([future])


WAITS = {
    wait_for_event: ("Event.wait", threading.Event, lambda event: event.set()),
    wait_for_condition: ("Condition.wait", threading.Condition, notify),
    wait_for_condition_for: ("Condition.wait_for", threading.Condition, notify),
    wait_for_semaphore: ("Semaphore.acquire", taken_semaphore, lambda each: each.release()),
    wait_for_barrier: ("Barrier.wait", lambda: threading.Barrier(2), lambda each: each.wait()),
    wait_to_get: ("Queue.get", queue.Queue, lambda items: items.put(1)),
    wait_to_put: ("Queue.put", full_queue, lambda items: items.get()),
    wait_for_tasks: (
        "Queue.join",
        lambda: with_an_item(queue.LifoQueue()),
        lambda items: items.task_done(),
    ),
    wait_for_thread: ("Thread.join", GatedThread, lambda thread: thread.gate.release()),
    wait_for_result: ("Future.result", Future, lambda future: future.set_result(1)),
    wait_for_futures: ("Event.wait", Future, lambda future: future.set_result(1)),
}
"""By function that waits: the leaf, what makes the primitive, and what ends the wait."""


@pytest.mark.parametrize("wait_in", WAITS, ids=lambda each: each.__name__)
def test_one_wait_is_one_contention_of_the_outermost_primitive(wait_in, clock):
    """The leaf is the method that was called, whatever it uses inside, and the wait counts once."""
    leaf, make, wake = WAITS[wait_in]
    primitive = make()
    waiter = threading.Thread(target=wait_in, args=(primitive,))
    with recording() as seen:
        waiter.start()
        clock.wait_for_reading(waiter)
        clock.advance(HOLD_NS)
        wake(primitive)
        waiter.join()
    (sample,) = [each for each in seen.samples("block") if is_in(wait_in.__name__, each)]
    assert sample.values == (1, HOLD_NS)
    between = ["_base.wait"] if wait_in is wait_for_futures else []
    stack = [leaf, *between, f"test_threading_waits.{wait_in.__name__}"]
    assert names(sample)[: len(stack)] == stack


def test_threads_that_queue_for_a_semaphore_are_one_contention_each(clock):
    """All waiting time is recorded, and charged to the release by the semaphore's holder."""

    def contend_g() -> None:
        with semaphore:
            pass

    def hold_h() -> None:
        with semaphore:
            for thread in threads:
                thread.start()
            until(lambda: len(semaphore._cond._waiters) == 4)
            clock.advance(HOLD_NS)

    semaphore = threading.Semaphore(1)  # made before recording is switched on
    threads = [threading.Thread(target=contend_g) for _ in range(4)]
    with recording() as seen:
        hold_h()
        for thread in threads:
            thread.join()
    assert seen.of("block", "contend_g") == (4, 4 * HOLD_NS)
    (holder,) = [each for each in seen.samples("mutex") if is_in("hold_h", each)]
    assert holder.values == (1, 4 * HOLD_NS)
    assert names(holder)[0] == "Semaphore.release"


def test_a_release_is_charged_with_no_more_than_was_waited(clock):
    """Both profiles use the same reading of the clock, whatever runs in between."""
    semaphore = threading.Semaphore(0)
    threads = [threading.Thread(target=wait_for_semaphore, args=(semaphore,)) for _ in range(3)]

    def release_h() -> None:
        for _ in threads:
            semaphore.release()

    with recording() as seen:
        clock.tick_ns = HOLD_NS
        for thread in threads:
            thread.start()
        until(lambda: len(semaphore._cond._waiters) == 3)
        clock.tick_ns = 0
        release_h()
        for thread in threads:
            thread.join()
    assert seen.of("mutex", "release_h")[1] == seen.of("block", "wait_for_semaphore")[1] > 0


def test_waits_are_measured_in_real_time():
    """A wait is at least as long as another thread saw, and at most as long as the call took."""
    event, took_ns = threading.Event(), []

    def wait_in_time() -> None:
        began_ns = time.monotonic_ns()
        event.wait()
        took_ns.append(time.monotonic_ns() - began_ns)

    waiter = threading.Thread(target=wait_in_time)
    with recording() as seen:
        waiter.start()
        until(lambda: event._cond._waiters)
        seen_ns = time.monotonic_ns()
        time.sleep(0.01)
        seen_ns = time.monotonic_ns() - seen_ns
        event.set()
        waiter.join()
    count, delay_ns = seen.of("block", "wait_in_time")
    assert count == 1
    assert seen_ns <= delay_ns <= took_ns[0]


def test_calls_that_do_not_wait_are_not_recorded():
    """Calls that must not wait, and sleep, are not recorded either."""
    semaphore, items, event = threading.Semaphore(2), queue.Queue(), threading.Event()
    with recording() as seen:
        event.set()
        event.wait()
        threading.Event().wait(0)
        with semaphore, semaphore:
            assert not semaphore.acquire(blocking=False)
        with pytest.raises(queue.Empty):
            items.get_nowait()
        time.sleep(0.001)
    assert seen.samples("block") == ()
    assert seen.samples("mutex") == ()


def test_timeouts_count_with_their_waiting_time():
    """Giving up after 5 ms is a contention of at least 5 ms. Errors are the original ones."""
    with recording() as seen:
        assert not threading.Event().wait(0.005)
        with pytest.raises(queue.Empty):
            queue.Queue().get(timeout=0.005)
        with pytest.raises(RuntimeError, match="un-acquired"):
            threading.Condition().wait()
        with pytest.raises(RuntimeError, match="cannot join current thread"):
            threading.current_thread().join()
    count, delay_ns = seen.of("block", "test_timeouts_count_with_their_waiting_time")
    assert count == 2
    assert delay_ns >= 2 * 5_000_000


def test_work_of_a_full_executor_waits_for_a_worker_thread(loop_name, clock):
    """It waits from submit to start, with the submitter's stack. Idle workers do not count."""
    gate = threading.Lock()  # no profile sees waits for it

    def work() -> None:
        with gate:
            pass

    async def submit_i() -> None:
        await asyncio.get_running_loop().run_in_executor(executor, work)

    async def main() -> None:
        with gate:
            waiting = [asyncio.create_task(submit_i()) for _ in range(6)]
            await asyncio.sleep(0)
            clock.advance(HOLD_NS)
        await asyncio.gather(*waiting)

    executor = ThreadPoolExecutor(2)
    with recording() as seen, executor:
        run(main(), loop_name)
    worker = "<waiting for a worker thread>"
    assert seen.of("block", worker) == (4, 4 * HOLD_NS)
    stack = seen.stack("block", worker)
    assert stack[1] == "ThreadPoolExecutor.submit"
    assert stack[-1].endswith("submit_i")
    assert not any(is_in("_worker", each) for each in seen.samples("block"))


def test_a_cancelled_work_item_leaves_no_record():
    """A work item that never starts is not charged, and its future is like any other."""
    with recording() as seen, ThreadPoolExecutor(1) as executor:
        gate = threading.Event()
        executor.submit(gate.wait)
        future = executor.submit(time.sleep, 0)
        assert future.cancel()
        gate.set()
    assert future.cancelled()
    assert seen.of("block", "<waiting for a worker thread>")[0] <= 1


def test_the_stack_of_a_threads_primitive_in_a_task_is_the_tasks(loop_name):
    """It is the task's stack, without the event loop's frames."""

    async def block_the_loop() -> None:
        threading.Event().wait(0.001)

    with recording() as seen:
        run(block_the_loop(), loop_name)
    assert seen.stack("block", "block_the_loop")[-1].endswith("block_the_loop")


def test_a_release_is_charged_with_each_wait_since_it_began_or_since_the_last_release():
    """This is the same rule as for tasks. Without a waiter nothing is charged."""
    waiters = ThreadWaiters()
    assert waiters.release(50) is None
    waiters.enter(100)
    assert waiters.release(1000) == 900
    assert waiters.release(1500) == 500
    assert waiters.leave()
    assert waiters.release(2000) is None


def test_threads_that_interrupt_one_another_charge_no_time_twice():
    """A release counts only the time after the latest clock reading of any earlier release."""
    waiters = ThreadWaiters()
    waiters.enter(1000)
    assert waiters.release(900) == 0
    assert waiters.release(1500) == 500
    assert waiters.release(1200) == 0
    assert waiters.release(1600) == 100
    assert waiters.leave()
