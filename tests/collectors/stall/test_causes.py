"""The cause of a stall is named if it was not the loop's own code."""

from __future__ import annotations

import asyncio
import gc
import json
import threading
import time

import pytest

from asgi_pprof.collectors.stall.causes import (
    COLLECTING,
    NOT_RUNNING,
    WAITING_FOR_GIL,
    ThreadAccount,
    Wakeup,
)
from asgi_pprof.recorders import gc_pauses
from asgi_pprof.runtime.gc_pauses import GcPauses
from tests.collectors.stall.watched import (
    all_stalls,
    cpu_ns,
    hold_by_parsing,
    hold_by_sleeping,
    idle,
    long_document,
    monitor_of,
    of,
    run,
    stalls_of,
)
from tests.programs import run_program
from tests.servers import until

MS = 1_000_000


class FakeThread:
    """A thread whose usage is what the test says."""

    def __init__(self, *usages: bytes):
        self.usages = list(usages)

    def usage(self) -> bytes:
        return self.usages.pop(0)

    def close(self) -> None:
        self.usages.clear()


def after(cpu_ms: int, waited_ms: int, runs: int) -> FakeThread:
    """Return a thread that has used this much after the first reading."""
    return FakeThread(b"7 8 9\n", b"%d %d %d\n" % (7 + cpu_ms * MS, 8 + waited_ms * MS, 9 + runs))


@pytest.mark.parametrize(
    ("thread", "late_ms", "for_gil_ms", "cause"),
    [
        (after(0, 0, 2), 950, 0, NOT_RUNNING),
        (after(0, 0, 2), 300, 0, None),  # the watch thread was late by less than half of the second
        (after(0, 0, 9), 950, 0, None),  # a stopped thread does not run so often
        (after(1, 0, 200), 950, 900, WAITING_FOR_GIL),
        (after(600, 0, 200), 950, 900, None),  # it worked
        (after(1, 600, 200), 950, 900, None),  # it waited for a CPU
        (after(1, 0, 90), 950, 900, None),  # it asked for the GIL for less than half of the second
        (after(1, 0, 200), 950, 200, None),  # the watch thread got the GIL: the loop released it
        (FakeThread(b"", b""), 950, 0, None),  # the system has no figures
        (FakeThread(b"7 8 9", b""), 950, 0, None),  # the thread has ended
    ],
)
def test_the_cause_of_a_stall_of_one_second(thread, late_ms, for_gil_ms, cause):
    account = ThreadAccount(1, lambda native_id: thread, GcPauses())
    account.restart()
    account.add(Wakeup(late_ms * MS, 0, for_gil_ms * MS))
    assert account.cause(ended_ns=10**15, delay_ns=1000 * MS) == cause


def test_usage_before_a_restart_is_no_cause():
    account = ThreadAccount(
        1, lambda native_id: FakeThread(b"1 1 1", b"2 1 1", b"2 1 1"), GcPauses()
    )
    assert account.restart() is None
    account.add(Wakeup(950 * MS, 0, 0))
    assert account.restart() == 1
    assert account.cause(ended_ns=10**15, delay_ns=1000 * MS) is None


def test_a_thread_is_opened_again_after_close():
    opened = []

    def open_thread(native_id):
        opened.append(native_id)
        return FakeThread(b"1 1 1")

    account = ThreadAccount(1, open_thread, GcPauses())
    assert opened == []
    account.restart()
    account.follow(2)
    account.restart()
    account.close()
    account.restart()
    assert opened == [1, 2, 2]


def test_a_stopped_process_is_named_as_the_cause(loop_name):
    """No code used the time between SIGSTOP and SIGCONT."""
    printed = run_program(
        """
        import asyncio, json, os, subprocess, sys, time
        from asgi_pprof.collectors.stall.watch import StallWatch
        from tests.collectors.stall.watched import FACTORIES, all_stalls, monitor_of
        from tests.servers import until

        def stop(watch, monitor):
            until(lambda: monitor.is_quiet)
            program = f"kill -STOP {os.getpid()}; sleep 1; kill -CONT {os.getpid()}"
            subprocess.run(["sh", "-c", program], check=True)
            until(watch.count)

        async def main():
            watch = StallWatch()
            loop = asyncio.get_running_loop()
            watch.attach(loop)
            # Meanwhile the loop has nothing to do, and gets no requests for a state.
            await asyncio.to_thread(stop, watch, monitor_of(watch))
            print(json.dumps(await all_stalls(watch)))
            watch.detach(loop)

        # In debug mode the loop would report the time as a slow callback.
        with asyncio.Runner(debug=False, loop_factory=FACTORIES[sys.argv[1]]) as runner:
            runner.run(main())
        """,
        loop_name,
    )
    found = of(json.loads(printed), NOT_RUNNING.function.name)
    assert [stall["functions"] for stall in found] == [[NOT_RUNNING.function.name]]
    # An idle loop's stall counts only from the last scan before it.
    assert sum(stall["delay_ns"] for stall in found) > 0.5e9


def test_a_garbage_collection_is_named_as_the_cause():
    """The stack that triggered the collection is below its name."""

    async def collecting(watch):
        await idle(watch)
        cycles = []
        while cpu_ns(gc.collect) < 0.1e9:
            for _ in range(200_000):
                cycle = []
                cycle.append(cycle)
                cycles.append(cycle)
        await idle(watch)
        gc.collect()
        return await stalls_of(watch, COLLECTING.function.name)

    was_enabled = gc.isenabled()
    gc.disable()
    gc_pauses.enable()  # a middleware does this
    try:
        found = run(collecting)
    finally:
        gc_pauses.disable()
        if was_enabled:
            gc.enable()
    for stall in found:
        assert stall["functions"][0] == COLLECTING.function.name
        assert any(name.endswith("collecting") for name in stall["functions"])


def test_waiting_for_the_gil_is_named_as_the_cause():
    """Another thread's call in C keeps the GIL while the loop has work to do."""
    document = long_document()

    async def waiting(watch):
        found = []
        async with asyncio.timeout(60):
            while not of(found, WAITING_FOR_GIL.function.name):
                # On a busy machine threads may ask for the GIL too late.
                thread = threading.Thread(target=hold_by_parsing, args=(document,))
                thread.start()
                while thread.is_alive():  # noqa: ASYNC110 (gives the loop work to do)
                    await asyncio.sleep(0.01)
                await idle(watch)
                found = await all_stalls(watch)
        return found

    assert not of(run(waiting, threshold_ms=100), "hold_by_parsing")


@pytest.mark.timing
def test_another_threads_long_call_is_no_stall_of_an_idle_loop(loop_name):
    """The call keeps the GIL from the watch thread, but the idle loop does not need it."""
    document = long_document()

    def parse(monitor) -> bool:
        """Parse while the loop is idle; return whether nothing else delayed the watch thread."""
        until(lambda: monitor.is_quiet)
        start_ns = time.monotonic_ns()
        used_ns = cpu_ns(hold_by_parsing, document)
        had_cpu = time.monotonic_ns() - start_ns < used_ns * 1.2
        probe = monitor._probe  # with an earlier probe, the loop would have waited for the GIL
        return had_cpu and (probe is None or probe.scheduled_ns > start_ns)

    async def beside(watch):
        for _ in range(5):
            before = watch.count()
            is_alone = await asyncio.to_thread(parse, monitor_of(watch))
            await asyncio.sleep(0.2)
            await idle(watch)
            found = await all_stalls(watch)
            assert not of(found, "hold_by_parsing")
            if is_alone:
                assert watch.count() == before, found
                break

    run(beside, loop_name, threshold_ms=100)


def test_a_sleep_beside_busy_threads_is_not_waiting_for_the_gil():
    """Threads that burn CPU get the GIL by turns; the loop's own sleep is the cause."""
    stop = threading.Event()

    def burn():
        while not stop.is_set():
            sum(range(1000))

    async def blocked(watch):
        thread = threading.Thread(target=burn)
        thread.start()
        await idle(watch)
        hold_by_sleeping()
        stop.set()
        thread.join()
        return await stalls_of(watch, "hold_by_sleeping")

    (stall,) = run(blocked, threshold_ms=100)
    assert WAITING_FOR_GIL.function.name not in stall["functions"]
