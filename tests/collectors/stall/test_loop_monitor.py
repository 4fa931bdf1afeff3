"""A loop monitor finds out from another thread what its loop does."""

from __future__ import annotations

import asyncio
import gc
import selectors
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asgi_pprof.collectors.stall import loop_monitor
from asgi_pprof.collectors.stall.causes import Wakeup
from asgi_pprof.collectors.stall.loop_monitor import (
    TRANSITIONS,
    Event,
    LoopMonitor,
    Observation,
    Probe,
    State,
    Threshold,
    divide,
)
from asgi_pprof.collectors.stall.watch import StallWatch
from asgi_pprof.runtime.gc_pauses import GcPauses
from asgi_pprof.runtime.proc import LoopThread
from tests.collectors.stall.watched import (
    FACTORIES,
    LONG_MS,
    SHORT_MS,
    all_stalls,
    counted,
    hold_by_sleeping,
    idle,
    monitor_of,
    no_stalls,
    of,
    run,
    stalls_of,
    waited_for_cpu_ns,
)
from tests.programs import run_program
from tests.servers import until

MS = 1_000_000


def test_at_a_threshold_of_zero_nothing_is_a_stall():
    """The watch thread may still be scanning when it is switched off."""
    assert not Threshold(0).is_stall(10**12)
    assert [Threshold(100).is_stall(delay_ns) for delay_ns in (99, 100)] == [False, True]


@pytest.mark.parametrize(
    ("seen", "scheduled", "began", "ran", "span"),
    [
        # The loop was seen in an iteration, which ends when the next one begins.
        (1000, 1060, 1300, 1301, (1000, 1300)),
        # The probe was scheduled when the iteration that runs it began.
        (1000, 1001, 1000, 1300, (1001, 1300)),
        # The loop was blocked in the iteration that runs the probe, before the probe.
        (1100, 1060, 1100, 1300, (1100, 1300)),
        (0, 1060, 1300, 1301, (1060, 1301)),  # the loop's iterations cannot be read
        (7, 1060, 8, 1301, (1060, 1301)),  # the loop's clock is behind
        (9000, 1060, 9001, 1301, (1060, 1301)),  # it is ahead
        (7, 1060, 7, 1301, (1060, 1301)),  # it stands still
    ],
)
def test_time_before_the_probe_counts_only_by_a_reliable_clock(seen, scheduled, began, ran, span):
    probe = Probe(scheduled * MS, Observation(iteration_ns=seen * MS))
    probe.iteration_ns, probe.ran_ns = began * MS, ran * MS
    assert tuple(at_ns // MS for at_ns in probe.span()) == span
    probe.is_clock_reliable = False
    assert tuple(at_ns // MS for at_ns in probe.span()) == (scheduled, ran)


@pytest.mark.parametrize(
    ("looks", "parts"),
    [
        ([], []),
        ([(300, 300)], [1000]),
        ([(100, 100), (300, 300), (900, 900)], [200, 400, 400]),
        ([(100, 100), (200, 800)], [150, 850]),  # the later scan was delayed for 600 ms
        ([(0, 1200)], [1000]),  # the scan came after the delay had ended
        ([(900, 900), (1300, 1300)], [1000, 0]),
    ],
)
def test_a_delay_of_one_second_is_divided_among_the_looks(looks, parts):
    seen = [Observation(due_ns=due_ns, seen_ns=seen_ns) for due_ns, seen_ns in looks]
    assert list(divide(seen, 0, 1000)) == list(zip(seen, parts, strict=True))


@pytest.mark.once
@given(st.lists(st.tuples(st.integers(0, 1000), st.integers(0, 1000)), min_size=1))
def test_the_parts_of_a_delay_add_up_to_it(steps):
    """That holds for scans at any times, before and after the delay too."""
    looks, now_ns = [], 0
    for sleep_ns, late_ns in steps:
        due_ns = now_ns + sleep_ns
        now_ns = due_ns + late_ns
        looks.append(Observation(due_ns=due_ns, seen_ns=now_ns))
    parts = [part_ns for _, part_ns in divide(looks, 300, 900)]
    assert sum(parts) == 600
    assert min(parts) >= 0


class FakeLoop:
    """A loop, and the clock of its iterations. It runs a scheduled probe when the test says so."""

    is_reliable = True

    def __init__(self):
        self.now_ns = 10**15
        self.iteration_ns = 0
        self.running = True
        self.scheduled = []

    def is_closed(self):
        return False

    def is_running(self):
        return self.running

    def call_soon_threadsafe(self, callback, *arguments, context):
        self.scheduled.append((callback, arguments))

    def start_ns(self, loop, stack):
        return self.iteration_ns

    def is_waiting(self, stack):
        return not self.iteration_ns

    def calibrate(self, stack):
        return True

    def run_probe(self):
        before, self.iteration_ns = self.iteration_ns, self.now_ns
        ((callback, arguments),) = self.scheduled
        self.scheduled.clear()
        callback(*arguments)
        self.iteration_ns = 0 if before == 0 else self.now_ns


class Monitored:
    """A monitor of a fake loop. The test says when to scan."""

    def __init__(self, monkeypatch):
        self.loop = FakeLoop()
        self.stalls = []
        monkeypatch.setattr(loop_monitor, "_clock_ns", lambda: self.loop.now_ns)
        self.monitor = LoopMonitor(
            self.loop,
            Threshold(100 * MS),
            self.stalls.append,
            lambda: None,
            lambda native_id: LoopThread(native_id, directory="/nowhere"),
            GcPauses(),
        )
        self.monitor._clock = self.loop

    def scan(self, after_ms=75, late_ms=0) -> State:
        self.loop.now_ns += after_ms * MS
        now_ns = self.loop.now_ns
        wakeup = Wakeup(now_ns, now_ns - late_ms * MS, 0)
        stacks = loop_monitor.current_frames((self.monitor.ident,))
        self.monitor.observe(wakeup, stacks)
        assert self.monitor.advance(wakeup)
        return self.monitor._state

    def become(self, state: State) -> None:
        if state is not State.UNKNOWN:
            self.scan()
        while self.monitor._state is not state:
            self.loop.run_probe()
            self.scan()


@pytest.fixture
def monitored(monkeypatch):
    return Monitored(monkeypatch)


@pytest.mark.parametrize(
    ("state", "event"), [(state, event) for state in State for event in TRANSITIONS[state]]
)
def test_each_transition(monitored, state, event):
    """From each state each event leads to the table's state, and schedules a probe if needed."""
    monitored.become(state)
    loop = monitored.loop
    before = len(loop.scheduled)
    if event is Event.STOPPED:
        loop.running = False
    elif event is not Event.PENDING and state is State.PROBED:
        loop.run_probe()
        monitored.scan()  # records the first answer, without which no wait is certain
        loop.run_probe()
        before = 0
    if event is Event.ITERATING:
        loop.iteration_ns = loop.now_ns
    after = monitored.scan(late_ms=6 if event is Event.UNCERTAIN else 0)
    assert after is TRANSITIONS[state][event]
    is_probed = after is State.PROBED and event is not Event.PENDING
    assert len(loop.scheduled) - before == is_probed
    assert not monitored.stalls


def test_an_idle_loop_is_probed_only_every_ten_seconds(monitored):
    """The loop may run on another thread by now."""
    monitored.become(State.IDLE)
    for _ in range(9):
        assert monitored.scan(after_ms=1000) is State.IDLE
    assert not monitored.loop.scheduled
    assert monitored.scan(after_ms=1000) is State.PROBED


def test_each_of_two_long_iterations_counts_before_the_probe_runs(monitored):
    """The probe then measures only the later one."""
    monitored.become(State.IDLE)
    loop = monitored.loop
    first_ns = loop.iteration_ns = loop.now_ns + 50 * MS
    monitored.scan()
    monitored.scan(after_ms=200)
    second_ns = loop.iteration_ns = loop.now_ns + 10 * MS
    monitored.scan()
    monitored.scan(after_ms=200)
    loop.run_probe()
    monitored.scan()
    delays_ns = [stall.delay_ns for stall in monitored.stalls]
    assert delays_ns == [second_ns - first_ns, loop.now_ns - 75 * MS - second_ns]


@pytest.mark.parametrize("is_over", [False, True])
def test_a_stall_counts_though_the_watch_thread_waits_for_the_gil_after_its_scan(
    monitored, is_over
):
    """It lasts to the next iteration, or until the scan if the loop has gone on since."""
    monitored.become(State.PROBED)
    loop = monitored.loop
    loop.run_probe()
    began_ns = loop.iteration_ns = loop.now_ns + 1 * MS

    def wait_for_gil():
        loop.now_ns += 7 * MS
        if is_over:
            loop.iteration_ns = 0
        return b""

    monitored.monitor._account._usage = wait_for_gil
    monitored.scan(after_ms=501)
    del monitored.monitor._account._usage
    loop.now_ns += 300 * MS
    loop.run_probe()
    loop.iteration_ns = 0
    monitored.scan()
    (stall,) = monitored.stalls
    assert [seen.iteration_ns for seen, _ in stall.parts] == [began_ns]
    assert stall.delay_ns == (500 if is_over else 807) * MS


def test_the_looks_at_a_stall_are_bounded(monitored):
    """All scans of the first two seconds look, and 220 of the 8,000 in ten minutes."""
    monitored.become(State.IDLE)
    loop = monitored.loop
    loop.iteration_ns = loop.now_ns
    for _ in range(26):
        monitored.scan()
    probe = monitored.monitor._probe
    assert len(probe.looks) == 26
    for _ in range(8000 - 26):
        monitored.scan()
    assert len(probe.looks) < 220
    assert loop.now_ns - probe.looks[-1].seen_ns < 600_000 * MS / 32 + 75 * MS
    loop.now_ns += 1 * MS
    loop.run_probe()
    monitored.scan()
    (stall,) = monitored.stalls
    assert sum(part_ns for _, part_ns in stall.parts) == stall.delay_ns == 600_001 * MS


@pytest.mark.parametrize(("own_ms", "counted_ms"), [(0, 400), (250, 150), (350, 0)])
def test_the_part_of_a_stall_that_is_ours_is_not_counted(
    monitored, monkeypatch, own_ms, counted_ms
):
    """If less than the threshold is left, nothing is."""
    monitored.become(State.IDLE)
    loop, seen = monitored.loop, Observation(seen_ns=1)
    parts = iter([(seen.as_own(), own_ms * MS), (seen, (400 - own_ms) * MS)])
    loop.iteration_ns = loop.now_ns
    monitored.scan(after_ms=400)
    monkeypatch.setattr(loop_monitor, "divide", lambda looks, began_ns, ended_ns: parts)
    loop.run_probe()
    monitored.scan()
    (stall,) = monitored.stalls
    lag = monitored.monitor.lag()
    assert stall.delay_ns == 400 * MS
    assert (lag.stalls, lag.stall_ns) == (counted_ms > 0, counted_ms * MS)


def test_a_collection_that_we_force_makes_stalls_of_all_loops_ours(monitored, monkeypatch):
    """The loop waits while another thread collects for most of the time."""
    monitored.become(State.IDLE)
    loop = monitored.loop
    began_ns = loop.iteration_ns = loop.now_ns
    spans = [(began_ns - 200 * MS, began_ns + 160 * MS)]
    monkeypatch.setattr(GcPauses, "forced_spans", lambda self: spans)
    monitored.scan(after_ms=300)
    loop.run_probe()
    monitored.scan()
    loop.iteration_ns = loop.now_ns
    monitored.scan(after_ms=300)
    loop.run_probe()
    monitored.scan()
    first, second = monitored.stalls
    assert [seen.is_own for seen, _ in first.parts] == [True]
    assert [seen.is_own for seen, _ in second.parts] == [False]


def test_a_loop_that_waits_or_works_little_does_not_stall(loop_name):
    """It sleeps, has short timers, or is woken all the time."""

    async def mostly_idle(watch):
        before_ns = waited_for_cpu_ns()
        with no_stalls(watch):
            await asyncio.sleep(0.5)
            for _ in range(5):
                await asyncio.sleep(0.05)
            for _ in range(3000):
                await asyncio.sleep(0)
            end = time.monotonic() + 0.5
            while time.monotonic() < end:
                await asyncio.to_thread(time.sleep, 0.001)
            await idle(watch)
        return watch.lag(asyncio.get_running_loop()).max_ns, waited_for_cpu_ns() - before_ns

    latest_ns, waited_ns = run(mostly_idle, loop_name, LONG_MS)
    assert latest_ns < 100 * MS + waited_ns


def test_many_short_iterations_are_no_stall(loop_name):
    """The loop has rested, and then works without a pause."""

    async def working(watch):
        await asyncio.sleep(0.3)
        with no_stalls(watch):
            for _ in range(60):
                end = time.perf_counter() + 0.01
                while time.perf_counter() < end:
                    sum(range(100))
                await asyncio.sleep(0)
            await idle(watch)

    run(working, loop_name, LONG_MS)


def test_loops_are_probed_where_the_system_has_no_figures():
    """Without /proc a blocked loop is found too, and a waiting loop has no stall."""

    async def blocked(watch):
        watch.set_threshold(LONG_MS)
        with no_stalls(watch):
            await asyncio.sleep(0.5)
            await idle(watch)
        watch.set_threshold(SHORT_MS)
        said_ns = hold_by_sleeping()
        return said_ns, await stalls_of(watch, "hold_by_sleeping")

    def open_thread(native_id):
        return LoopThread(native_id, directory="/nowhere")

    said_ns, (stall,) = run(blocked, open_thread=open_thread)
    assert stall["count"] == 1
    assert said_ns / 2 < stall["delay_ns"] < said_ns + 2e9


def test_each_of_many_blocking_iterations_counts(loop_name):
    """Iterations before the run of the previous one's probe count too."""

    async def block():
        return hold_by_sleeping()

    async def blocked(watch):
        await idle(watch)
        tasks = []
        for _ in range(4):
            tasks.append(asyncio.create_task(block()))
            await asyncio.sleep(0)
        said_ns = sum(await asyncio.gather(*tasks))
        return said_ns, await stalls_of(watch, "hold_by_sleeping", count=4)

    said_ns, found = run(blocked, loop_name)
    assert sum(stall["count"] for stall in found) == 4
    assert sum(stall["delay_ns"] for stall in found) > said_ns * 0.8


def watched_by_hand(loop_name):
    """Return a watch, a loop that the test runs, and a coroutine function that attaches it."""
    watch, loop = StallWatch(), FACTORIES[loop_name]()

    async def attach():
        watch.attach(loop)
        await idle(watch)

    return watch, loop, attach


def test_a_loop_that_does_not_run_does_not_stall(loop_name):
    """Between two calls of run_until_complete the loop need not iterate."""
    watch, loop, attach = watched_by_hand(loop_name)
    watch.set_threshold(LONG_MS)
    try:
        loop.run_until_complete(attach())
        with no_stalls(watch):
            time.sleep(0.5)
            loop.run_until_complete(idle(watch))
        watch.detach(loop)
    finally:
        loop.close()
    until(lambda: not watch._is_watching)


def test_a_loop_run_by_other_code_does_not_stall(loop_name):
    """The loop's callbacks are then below another function, or on another thread."""
    watch, loop, attach = watched_by_hand(loop_name)
    watch.set_threshold(LONG_MS)

    def run_elsewhere():
        loop.run_until_complete(asyncio.sleep(0.6))

    try:
        loop.run_until_complete(attach())
        with ThreadPoolExecutor(1) as pool, no_stalls(watch):
            run_elsewhere()
            pool.submit(run_elsewhere).result()
        watch.detach(loop)
    finally:
        loop.close()
    until(lambda: not watch._is_watching)


def test_a_loop_that_was_moved_to_another_thread_is_still_watched(loop_name):
    """The stack is that of the thread that runs the loop now."""
    watch, loop, attach = watched_by_hand(loop_name)
    found = []

    async def blocked():
        await idle(watch)
        hold_by_sleeping()
        found.extend(await stalls_of(watch, "hold_by_sleeping"))

    try:
        loop.run_until_complete(attach())
        until(lambda: monitor_of(watch, loop)._state is State.UNKNOWN)
        thread = threading.Thread(target=lambda: loop.run_until_complete(blocked()))
        thread.start()
        thread.join()
        watch.detach(loop)
    finally:
        loop.close()
    assert [stall["count"] for stall in found] == [1]
    until(lambda: not watch._is_watching)


@pytest.mark.timing
@pytest.mark.parametrize("shift_s", [-1000, 1000])
def test_a_loop_with_another_clock_has_no_false_stalls(shift_s):
    """Tests give loops clocks of their own. Then only times between a probe's two ends count."""
    watch = StallWatch()
    loop = asyncio.new_event_loop()
    loop.time = lambda: time.monotonic() + shift_s

    async def work():
        watch.set_threshold(LONG_MS)
        watch.attach(loop)
        with no_stalls(watch):
            for _ in range(80):
                threading.Event().wait(0.01)
                await asyncio.sleep(0)
        watch.set_threshold(SHORT_MS)
        start_ns = time.monotonic_ns()
        found = []
        while not found:
            # On a busy machine a late scan counts a stall without its stack.
            hold_by_sleeping()
            await idle(watch)
            found = of(await all_stalls(watch), "hold_by_sleeping")
        watch.detach(loop)
        return found[0]["delay_ns"], time.monotonic_ns() - start_ns

    try:
        delay_ns, passed_ns = loop.run_until_complete(work())
        assert delay_ns < passed_ns
    finally:
        loop.close()
    until(lambda: not watch._is_watching)


def test_loops_without_epoll_and_in_debug_mode_are_watched():
    """It makes no difference how a loop waits."""
    watch = StallWatch()

    async def blocked():
        watch.attach(asyncio.get_running_loop())
        await asyncio.sleep(0.2)
        hold_by_sleeping()
        found = await counted(watch, "hold_by_sleeping")
        watch.detach(asyncio.get_running_loop())
        return found

    def factory():
        return asyncio.SelectorEventLoop(selectors.SelectSelector())

    with asyncio.Runner(debug=True, loop_factory=factory) as runner:
        (stall,) = runner.run(blocked())
    assert stall["count"] == 1
    until(lambda: not watch._is_watching)


def test_an_iteration_that_wrappers_hide_is_found():
    """Some code has put a function around the loop's own; greenlets hide iterations likewise."""
    run_program(
        """
        import asyncio, time
        original = asyncio.BaseEventLoop._run_once
        asyncio.BaseEventLoop._run_once = lambda self: original(self)
        from asgi_pprof.collectors.stall.watch import StallWatch

        async def main():
            watch = StallWatch()
            loop = asyncio.get_running_loop()
            watch.attach(loop)
            for count in (1, 2):
                await asyncio.sleep(0.3)
                time.sleep(0.4)
                async with asyncio.timeout(20):
                    while watch.count() < count:
                        await asyncio.sleep(0.02)
            watch.detach(loop)

        asyncio.run(main(), debug=False)  # in debug mode the loop reports slow callbacks
        """
    )


def test_an_observation_that_is_old_when_the_probe_is_scheduled_is_no_stall():
    """Reading a thread's usage may wait for the GIL, while the loop goes on."""

    class Slow(LoopThread):
        def usage(self):
            time.sleep(0.15)
            return super().usage()

    async def main(watch):
        longest_s = 0.0
        end = before = time.monotonic()
        while time.monotonic() < end + 2:
            work_until = time.monotonic() + 0.02
            while time.monotonic() < work_until:
                sum(range(100))
            await asyncio.sleep(0)
            before, now = time.monotonic(), before
            longest_s = max(longest_s, before - now)
        found = of(await all_stalls(watch), "main")
        return max((each["delay_ns"] for each in found), default=0), longest_s

    delay_ns, longest_s = run(main, threshold_ms=100, open_thread=Slow)
    assert delay_ns == 0 or longest_s > 0.05  # else the machine was busy, and it may be a stall


def test_scanning_keeps_nothing_alive():
    """Variables of scanned functions are freed without a garbage collection."""

    class Kept:
        pass

    async def main(watch):
        watch.set_threshold(5)
        references = []

        def work():
            kept = Kept()
            references.append(weakref.ref(kept))
            time.sleep(0.03)

        for _ in range(20):
            await asyncio.to_thread(work)
        await idle(watch)
        return [each() for each in references]

    was_enabled = gc.isenabled()
    gc.disable()
    try:
        assert run(main) == [None] * 20
    finally:
        if was_enabled:
            gc.enable()
