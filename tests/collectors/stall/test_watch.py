"""The watch thread runs while it is needed, wakes seldom, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import time

import pytest

from asgi_pprof.collectors.stall.loop_monitor import Observation, Stall
from asgi_pprof.collectors.stall.watch import FURTHER, StallWatch, _Sleeper
from asgi_pprof.profile import Sample
from asgi_pprof.stacks import UNKNOWN, name_totals
from tests.collectors.stall.watched import (
    FACTORIES,
    LONG_MS,
    all_stalls,
    hold_by_sleeping,
    idle,
    no_stalls,
    of,
    run,
    stalls_of,
)
from tests.programs import run_program
from tests.servers import until


def test_a_watch_that_fails_says_so_once_and_is_off(caplog):
    """The loop is not affected."""

    def fails(native_id):
        raise ZeroDivisionError

    async def watched(watch):
        await asyncio.to_thread(until, lambda: not watch._is_watching)
        hold_by_sleeping()
        return watch.is_on(), await all_stalls(watch)

    assert run(watched, open_thread=fails) == (False, [])
    until(lambda: caplog.records)
    assert [record.name for record in caplog.records].count("asgi_pprof") == 1


def test_no_stall_is_counted_after_switching_off():
    """This holds if a stall ends at that moment, and short iterations never count as 0 ms."""

    async def switched(watch):
        for _ in range(20):
            watch.set_threshold(LONG_MS)
            with no_stalls(watch):
                await asyncio.sleep(0.01)
            watch.set_threshold(0)
            count = watch.count()
            threading.Event().wait(0.02)
            await asyncio.sleep(0)
            assert watch.count() == count

    run(switched)


def test_a_watch_of_many_loops_leaves_nothing(loop_name):
    """Loops are attached, closed and detached in any order, and one thread serves them all."""
    watch = StallWatch()

    async def short():
        loop = asyncio.get_running_loop()
        watch.attach(loop)
        await asyncio.sleep(0)
        if id(loop) % 32:
            watch.detach(loop)

    descriptors = len(os.listdir("/proc/self/fd"))
    for _ in range(200):
        with asyncio.Runner(loop_factory=FACTORIES[loop_name]) as runner:
            runner.run(short())
    until(lambda: not watch._is_watching)
    assert len(os.listdir("/proc/self/fd")) <= descriptors
    assert not watch._monitors


@pytest.fixture
def sleeps(monkeypatch):
    """The lengths of the sleeps that the watch thread asked for, in seconds."""
    asked = []
    sleep = _Sleeper.sleep

    def recording(self, until_ns):
        asked.append((until_ns - time.monotonic_ns()) / 1e9)
        return sleep(self, until_ns)

    monkeypatch.setattr(_Sleeper, "sleep", recording)
    return asked


def test_the_watch_thread_wakes_seldom(sleeps, loop_name):
    """An idle loop is scanned every 225 ms, any other at most twice in 75 ms."""

    async def doing(watch):
        loop = asyncio.get_running_loop()
        await asyncio.to_thread(until, lambda: sleeps and sleeps[-1] > 0.2)
        for pause_s in (0.001, 0):
            sleeps.clear()
            start = loop.time()
            while not sleeps or loop.time() - start < 0.4:  # noqa: ASYNC110 (iterations are the point)
                await asyncio.sleep(pause_s)
            assert len(sleeps) / (loop.time() - start) < 30

    run(doing, loop_name, threshold_ms=100)


def test_a_process_ends_with_loops_that_still_run(loop_name):
    """The watch thread is still asleep then."""
    run_program(
        """
        import asyncio, sys, threading, time, uvloop
        from asgi_pprof.recorders import stall_watch as watch

        async def work():
            watch.attach(asyncio.get_running_loop())
            while True:
                await asyncio.sleep(0.001)
                time.sleep(0.004)

        watch.set_threshold(5)
        factory = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}[sys.argv[1]]
        runner = asyncio.Runner(debug=False, loop_factory=factory)  # else it reports slow callbacks
        threading.Thread(target=lambda: runner.run(work()), daemon=True).start()
        time.sleep(0.3)
        """,
        loop_name,
    )


def test_a_loop_closed_without_detaching_is_forgotten(loop_name):
    """The watch thread ends, and no descriptor stays open."""
    watch = StallWatch()

    async def attach():
        watch.attach(asyncio.get_running_loop())
        await asyncio.sleep(0.05)

    with asyncio.Runner(loop_factory=FACTORIES[loop_name]) as runner:
        runner.run(attach())
    until(lambda: not watch._is_watching)
    assert watch.loops() == []


def test_loops_of_two_threads_are_distinguished():
    """One loop is blocked, and the other is idle."""

    async def other(watch, lags):
        loop = asyncio.get_running_loop()
        watch.attach(loop)
        await idle(watch)
        hold_by_sleeping(0.6)
        await stalls_of(watch, "hold_by_sleeping")
        lags.append(watch.lag(loop))
        watch.detach(loop)

    async def idling(watch):
        lags = []
        await asyncio.to_thread(lambda: asyncio.run(other(watch, lags)))
        return lags[0], watch.lag(asyncio.get_running_loop()), await all_stalls(watch)

    held, idled, found = run(idling, threshold_ms=LONG_MS)
    assert held.stalls >= 1
    assert held.stalls + idled.stalls == sum(stall["count"] for stall in found)
    (stall,) = of(found, "hold_by_sleeping")
    assert stall["count"] == 1
    assert stall["delay_ns"] <= held.stall_ns


def test_users_are_counted_and_nothing_is_left():
    """The watch is switched on and off many times. The last user ends it, even during a stall."""

    async def often(watch):
        loop = asyncio.get_running_loop()
        for _ in range(50):
            watch.attach(loop)
            watch.attach(loop)
            watch.detach(loop)
            await asyncio.sleep(0.001)
            watch.detach(loop)
        assert watch.loops() == [loop]  # `run` has attached it
        watch.detach(loop)
        hold_by_sleeping(0.6)
        await asyncio.to_thread(until, lambda: not watch._is_watching)
        assert watch.lag(loop) is None
        return watch.totals()

    assert run(often, threshold_ms=LONG_MS) == []


@pytest.mark.parametrize("threshold", [-1, float("nan"), float("inf")])
def test_a_threshold_is_a_number_of_milliseconds(threshold):
    with pytest.raises(ValueError, match="0 or more milliseconds"):
        StallWatch().set_threshold(threshold)


def test_stalls_without_a_stack_are_unknown():
    watch = StallWatch()
    watch._add(Stall(5, (), None))
    watch._add(Stall(6, (), None))
    (sample,) = name_totals(watch.totals())
    assert sample == Sample((UNKNOWN,), (2, 11))


def test_a_stall_counts_once_where_most_of_it_was():
    """Its other parts have the count 0. What was seen several times adds up."""
    watch = StallWatch()
    seen = {name: Observation((), (("task", name),)) for name in ("first", "second")}
    parts = (seen["first"], 30), (seen["second"], 40), (seen["first"], 30)
    watch._add(Stall(100, parts, None))
    samples = name_totals(watch.totals())
    found = {dict(sample.labels)["task"]: sample.values for sample in samples}
    assert found == {"first": (1, 60), "second": (0, 40)}
    assert watch.count() == 1


def test_the_number_of_stacks_is_bounded(monkeypatch):
    """Stalls of further stacks are added up under one name, and none is lost."""
    monkeypatch.setattr("asgi_pprof.collectors.stall.watch._MAX_STACKS", 2)
    watch = StallWatch()
    for number in range(5):
        seen = Observation((), (("tenant", str(number)),))
        watch._add(Stall(1, ((seen, 1),), None))
    samples = name_totals(watch.totals())
    assert sum(sample.values[0] for sample in samples) == watch.count() == 5
    assert [sample.values for sample in samples if sample.stack == (FURTHER,)] == [(3, 3)]


def test_a_forked_process_starts_again():
    """It has no watch thread until it attaches a loop, and none of its parent's stalls."""
    printed = run_program(
        """
        import asyncio, os, sys, time
        from asgi_pprof.recorders import stall_watch as watch

        async def hold():
            watch.attach(asyncio.get_running_loop())
            await asyncio.sleep(0.05)
            time.sleep(0.3)
            async with asyncio.timeout(20):
                while not watch.count():
                    await asyncio.sleep(0.01)
            return watch.count()

        async def parent():
            counted = await hold()
            child = os.fork()
            if child == 0:
                os._exit(in_child())
            _, status = os.waitpid(child, 0)
            watch.detach(asyncio.get_running_loop())
            return counted, os.waitstatus_to_exitcode(status)

        def in_child():
            asyncio._set_running_loop(None)
            before = [*watch.loops(), *watch.totals()]
            counted = asyncio.run(hold())
            return 10 * len(before) + counted

        print(*asyncio.run(parent()))
        """,
        options=("-W", "ignore::DeprecationWarning"),  # a fork beside threads
    )
    assert printed.split() == ["1", "1"]


def test_a_child_that_has_closed_all_descriptors_can_watch():
    """A daemon closes them; the numbers then belong to other files."""
    run_program(
        """
        import asyncio, os, socket
        from asgi_pprof.recorders import stall_watch as watch

        async def watched(taken=()):
            loop = asyncio.get_running_loop()
            watch.attach(loop)
            monitor = watch._monitors[id(loop)]
            async with asyncio.timeout(20):
                while monitor._state.name != "IDLE":
                    await asyncio.sleep(0.02)
            if taken:
                watch.detach(loop)
            for each in taken:
                each.getsockname()

        runner = asyncio.Runner()
        runner.run(watched())
        pid = os.fork()
        if pid == 0:
            os.closerange(3, 64)
            taken = [socket.socket() for _ in range(20)]
            asyncio.new_event_loop().run_until_complete(watched(taken))
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        runner.close()
        """,
        options=("-W", "ignore::DeprecationWarning"),  # a fork beside threads
    )


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="only 3.11 collects garbage there")
@pytest.mark.parametrize("native", ["1", "0"])
def test_finalizers_that_wait_do_not_hang_the_process(native):
    """Threads start and end meanwhile; on 3.11 CPython makes the list of frames under a lock."""
    run_program(
        """
        import asyncio, os, threading, time
        from asgi_pprof.collectors.stall.watch import StallWatch

        def make_frames():
            while True:
                (lambda: time.sleep(0.002))()

        def start_threads():
            while True:
                thread = threading.Thread(target=int)
                thread.start()
                thread.join()
                time.sleep(0.001)

        class LetsTheGilGo:
            def __init__(self):
                self.me = self

            def __del__(self):
                time.sleep(0)

        async def main():
            watch = StallWatch()
            watch.set_threshold(20)
            watch.attach(asyncio.get_running_loop())
            for target in (*[make_frames] * 30, start_threads):
                threading.Thread(target=target, daemon=True).start()
            end = time.monotonic() + 2
            while time.monotonic() < end:
                await asyncio.sleep(0.003)
                LetsTheGilGo()
            os._exit(0)

        asyncio.run(main(), debug=False)  # else it reports slow callbacks
        """,
        ASGI_PPROF_NATIVE=native,
    )
