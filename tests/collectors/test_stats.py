"""The stats endpoint: figures of loops, pools, garbage collection and the process."""

from __future__ import annotations

import _thread
import asyncio
import contextlib
import gc
import itertools
import math
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from html import unescape

import anyio
import anyio.to_thread
import pytest
from fastapi import Depends, FastAPI

from asgi_pprof import PprofMiddleware
from asgi_pprof.collectors.goroutine.task_tracking import task_tracking
from asgi_pprof.collectors.stats import NAMES, Stats
from asgi_pprof.encoders.prometheus import Figure, figures_text, label_value, unique
from asgi_pprof.native.core import native
from asgi_pprof.recorders import gc_pauses, memory_bytes, stall_watch
from asgi_pprof.runtime.gc_pauses import PythonTimer
from tests.loops import LOOPS, run
from tests.programs import run_program
from tests.servers import PROFILES, ask, serve, until

# Prometheus's exposition_formats.md: a metric name, labels with escaped values, a number.
NAME = r"[a-zA-Z_:][a-zA-Z0-9_:]*"
LABEL = r'[a-zA-Z_][a-zA-Z0-9_]*="(?:[^"\\\n]|\\\\|\\"|\\n)*"'
LINE = re.compile(
    rf"(({NAME})(?:\{{{LABEL}(?:,{LABEL})*\}})?) ([+-]?(?:Inf|\d+(?:\.\d+)?(?:e[+-]\d+)?))"
)


def parse(text):
    """Return the values by series; every line must follow Prometheus's grammar."""
    values = {}
    assert text.endswith("\n")
    for line in text[:-1].split("\n"):
        match = LINE.fullmatch(line)
        assert match, line
        assert line.split() == [match[1], match[3]]
        assert match[1] not in values, line
        values[match[1]] = float(match[3])
    return values


def names_of(text):
    """Return the metric name of each line."""
    return [LINE.fullmatch(line)[2] for line in text.splitlines()]


def of_loop(name, values):
    """Return the figures of one loop, by name and quantile."""
    return {
        key.replace(f'loop="{name}"', "").replace("{}", "").replace("{,", "{"): value
        for key, value in values.items()
        if f'loop="{name}"' in key
    }


def of_pool(name, values):
    """Return threads, busy, queued and longest wait of one pool; None for each missing line."""
    kinds = ("threads", "busy", "queued", "longest_wait_seconds")
    return [values.get(f'thread_pool_{kind}{{pool="{name}"}}') for kind in kinds]


async def figures():
    return parse(await Stats(stall_watch, gc_pauses, memory_bytes).text())


class OtherLoop:
    """A loop that runs in a thread of its own and can be blocked."""

    def __init__(self, loop_name, name, tasks=0):
        self._begun, self._free = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=run, args=(self._main(tasks), loop_name), name=name)

    async def _main(self, number):
        self.loop, self._end = asyncio.get_running_loop(), asyncio.Event()
        tasks = [asyncio.create_task(self._end.wait()) for _ in range(number)]
        await asyncio.sleep(0)
        self._begun.set()
        await self._end.wait()
        await asyncio.gather(*tasks)

    def __enter__(self):
        self._thread.start()
        assert self._begun.wait(20)
        return self

    def __exit__(self, *_):
        self._free.set()
        self.soon(self._end.set)
        self._thread.join(20)

    def soon(self, function, *arguments):
        self.loop.call_soon_threadsafe(function, *arguments)

    def call(self, function, *arguments):
        """Call a function on the loop's thread, and wait until it has returned."""
        done = threading.Event()
        self.soon(function, *arguments)
        self.soon(done.set)
        assert done.wait(20)

    @contextlib.contextmanager
    def held(self):
        """Block the loop."""
        holding = threading.Event()

        def hold():
            holding.set()
            self._free.wait(60)

        self.soon(hold)
        assert holding.wait(20)
        try:
            yield
        finally:
            self._free.set()


def nothing():
    pass


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.0, "0"),
        (3.0, "3"),
        (1.5, "1.5"),
        (1e-09, "1e-09"),
        (2**63, "9223372036854775808"),
        (math.inf, "+Inf"),
    ],
)
def test_numbers_are_as_short_as_they_can_be(value, text):
    """Integers have no decimal point; infinity is spelled as in Prometheus."""
    assert Figure("loop_tasks", (), value).line() == f"loop_tasks {text}"


def test_label_values_are_escaped():
    """The format requires this for quotes and backslashes."""
    line = Figure("loop_tasks", (("loop", 'a"b\\c'), ("quantile", "1")), 2).line()
    assert line == 'loop_tasks{loop="a\\"b\\\\c",quantile="1"} 2'
    assert LINE.fullmatch(line)


@pytest.mark.parametrize("odd", [" ", "\t", "\n", "\r", "\x0b", "\x1c", "\x85", "\u2028", "\x00"])
def test_no_label_breaks_a_line_or_a_word(odd):
    """Thread names may contain any character."""
    assert label_value(f"a{odd}b") == "a_b"


def test_lone_surrogates_are_no_label():
    """The format has no escape sequence for them."""
    assert label_value("a\udcffb") == "a?b"


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ([], []),
        (["a", "b"], ["a", "b"]),
        (["a", "a", "a"], ["a", "a#2", "a#3"]),
        (["a", "a#2", "a"], ["a", "a#2", "a#3"]),
        (["a#2", "a", "a"], ["a#2", "a", "a#3"]),
    ],
)
def test_equal_names_get_numbers(names, expected):
    """Every series is unique, even if threads have equal names."""
    assert unique(names) == expected


def test_lines_have_a_fixed_order():
    """They are sorted by the listed order of names, then by label."""
    made = [
        Figure("process_threads", (), 1),
        Figure("loop_ready", (("loop", "b"),), 2),
        Figure("loop_ready", (("loop", "a"),), 3),
        Figure("loop_tasks", (("loop", "b"),), 4),
    ]
    expected = 'loop_tasks{loop="b"} 4\nloop_ready{loop="a"} 3\nloop_ready{loop="b"} 2\n'
    for order in itertools.permutations(made):
        assert figures_text(order, NAMES) == f"{expected}process_threads 1\n"


def test_exactly_the_counters_end_in_total():
    """By Prometheus's convention, these are the metrics that only grow."""
    growing = {"collections", "collected", "uncollectable", "stalls", "stall_seconds"}
    totals = {name.removesuffix("_total") for name in NAMES if name.endswith("_total")}
    assert {
        re.sub(r"^(loop|python_gc_objects|python_gc|process)_", "", each) for each in totals
    } == {
        *growing,
        "pause_seconds",
        "cpu_seconds",
        "children_cpu_seconds",
    }


def test_the_number_of_tasks_equals_asyncios(loop_name):
    """The count equals `asyncio.all_tasks`: it includes the current task, not done ones."""

    async def main():
        event = asyncio.Event()
        tasks = [asyncio.create_task(event.wait()) for _ in range(17)]
        done = asyncio.create_task(asyncio.sleep(0))
        await done
        found, all_tasks = await figures(), len(asyncio.all_tasks())
        event.set()
        await asyncio.gather(*tasks)
        return found, all_tasks

    found, all_tasks = run(main(), loop_name)
    assert found['loop_tasks{loop="MainThread"}'] == all_tasks == 18


def test_ready_callbacks_are_counted(loop_name):
    """Callbacks that are ready when stats is requested are counted."""

    async def main():
        await asyncio.sleep(0)
        before = await figures()
        for _ in range(5):
            asyncio.get_running_loop().call_soon(nothing)
        return before, await figures()

    before, after = run(main(), loop_name)
    ready = 'loop_ready{loop="MainThread"}'
    assert after[ready] - before[ready] == 5


def test_loops_of_other_threads_have_their_own_figures(loop_name):
    """A loop is labelled with its thread's name; white space in it is replaced."""
    with OtherLoop(loop_name, "second loop", tasks=4):
        found = run(figures(), loop_name)
    assert found['loop_tasks{loop="second_loop"}'] == 5
    assert found['loop_tasks{loop="MainThread"}'] == 1
    assert found['loop_ready{loop="second_loop"}'] == 0


def test_a_younger_thread_of_the_same_name_gets_a_number(loop_name):
    """Threads with one name are numbered by age."""
    with OtherLoop(loop_name, "twin", tasks=1), OtherLoop(loop_name, "twin", tasks=2):
        found = run(figures(), loop_name)
    assert found['loop_tasks{loop="twin"}'] == 2
    assert found['loop_tasks{loop="twin#2"}'] == 3


def test_a_thread_that_threading_does_not_know_is_named_by_its_number(loop_name):
    """A library in C may start such a thread."""
    begun, end, ended = threading.Event(), threading.Event(), threading.Event()

    async def wait():
        begun.set()
        while not end.is_set():  # noqa: ASYNC110 - another thread sets the event
            await asyncio.sleep(0.002)

    def run_loop():
        loop = LOOPS[loop_name]()
        loop.run_until_complete(wait())
        loop.close()
        ended.set()

    ident = _thread.start_new_thread(run_loop, ())
    assert begun.wait(20)
    try:
        found = run(figures(), loop_name)
    finally:
        end.set()
        assert ended.wait(20)
    assert found[f'loop_tasks{{loop="{ident}"}}'] == 1
    assert found['loop_tasks{loop="MainThread"}'] == 1


def test_a_blocked_loop_is_read_without_waiting_for_it(loop_name):
    """Its ready callbacks and tasks are read from another thread."""
    ready = 'loop_ready{loop="held"}'
    with OtherLoop(loop_name, "held", tasks=2) as other, other.held():
        before = run(figures(), loop_name)
        for _ in range(3):
            other.soon(nothing)
        found = run(figures(), loop_name)
    assert found[ready] - before[ready] == 3
    assert found['loop_tasks{loop="held"}'] == 3


def test_lag_and_stalls_come_from_the_stall_watch(loop_name):
    """The lag grows while a loop is blocked, and afterwards one stall is counted."""

    def ask_for():
        return of_loop("watched", run(figures()))

    with OtherLoop(loop_name, "watched") as other:
        assert "loop_stalls_total" not in ask_for()
        other.call(lambda: stall_watch.attach(other.loop))
        try:
            assert ask_for()["loop_stalls_total"] == 0
            before = time.monotonic()
            with other.held():
                until(lambda: ask_for()['loop_lag_seconds{quantile="1"}'] > 0.15)
            until(lambda: ask_for()["loop_stalls_total"] == 1)
            found = ask_for()
            assert 0.15 < found["loop_stall_seconds_total"] < time.monotonic() - before
            late = [found[f'loop_lag_seconds{{quantile="{each}"}}'] for each in (0.5, 0.9, 0.99, 1)]
            assert late == sorted(late)
            assert late[-1] > 0.15
        finally:
            other.call(lambda: stall_watch.detach(other.loop))
        assert set(ask_for()) == {"loop_tasks", "loop_ready"}


def test_a_loop_that_is_not_watched_has_no_lag_line(loop_name):
    """A threshold of 0 records nothing, so the line is missing instead of 0."""

    async def main():
        loop = asyncio.get_running_loop()
        stall_watch.attach(loop)
        threshold_ms = stall_watch.threshold_ms
        try:
            stall_watch.set_threshold(0)
            return await figures()
        finally:
            stall_watch.set_threshold(threshold_ms)
            stall_watch.detach(loop)

    assert set(of_loop("MainThread", run(main(), loop_name))) == {"loop_tasks", "loop_ready"}


@pytest.mark.skipif(
    native is None and sys.version_info >= (3, 14),
    reason="without the C core such loops are not found",
)
def test_tasks_of_a_loop_that_does_not_run_are_counted(loop_name):
    """They are counted under not_running."""
    stopped = asyncio.Runner(loop_factory=LOOPS[loop_name])
    with stopped:
        event = asyncio.Event()

        async def start():
            return [asyncio.create_task(event.wait()) for _ in range(3)]

        tasks = stopped.run(start())
        with ThreadPoolExecutor(1, thread_name_prefix="asking") as thread:
            found = thread.submit(run, _asked_with(stopped.get_loop()), loop_name).result()
        assert found['loop_tasks{loop="asking_0"}'] == 1
        assert found['loop_tasks{loop="not_running"}'] == len(tasks)


async def _asked_with(_loop):
    return await figures()


class Lane:
    """A queue of callbacks of another type than asyncio's."""

    def __init__(self):
        self._handles = []

    def __len__(self):
        return len(self._handles)

    def append(self, handle):
        self._handles.append(handle)

    def popleft(self):
        return self._handles.pop(0)

    def clear(self):
        self._handles.clear()


def test_a_foreign_loop_has_no_line_for_ready_callbacks():
    """Its queue is not known, so they cannot be counted."""

    class Foreign(asyncio.SelectorEventLoop):
        def __init__(self):
            super().__init__()
            self._ready = Lane()

    with asyncio.Runner(loop_factory=Foreign) as runner:
        found = of_loop("MainThread", runner.run(figures()))
    assert set(found) == {"loop_tasks"}


def test_the_loop_iterates_while_many_tasks_are_read(loop_name):
    """If each task uses up a slice, the loop iterates between any two tasks."""

    async def main():
        event = asyncio.Event()
        tasks = [asyncio.create_task(event.wait()) for _ in range(50)]
        iterations = 0

        def iterate():
            nonlocal iterations
            iterations += 1
            if not event.is_set():
                loop.call_soon(iterate)

        iterations_at_readings = []

        def clock():
            iterations_at_readings.append(iterations)
            return len(iterations_at_readings)

        loop = asyncio.get_running_loop()
        loop.call_soon(iterate)
        found = parse(await Stats(stall_watch, gc_pauses, memory_bytes, clock).text())
        event.set()
        await asyncio.gather(*tasks)
        return found, iterations_at_readings

    found, iterations_at_readings = run(main(), loop_name)
    assert found['loop_tasks{loop="MainThread"}'] == 51
    assert len(set(iterations_at_readings)) > 50


def test_an_executor_has_busy_threads_and_a_queue(loop_name):
    """The lines give its limit of threads, busy threads, queued work and the longest wait."""

    async def main():
        loop, end, begun = asyncio.get_running_loop(), threading.Event(), threading.Semaphore(0)

        def work():
            begun.release()
            end.wait(60)

        started = time.monotonic()
        with ThreadPoolExecutor(2, thread_name_prefix="my pool") as pool:
            try:
                jobs = [
                    asyncio.create_task(_awaited(loop.run_in_executor(pool, work)))
                    for _ in range(5)
                ]
                await asyncio.sleep(0)
                for _ in range(2):
                    assert begun.acquire(timeout=20)
                first, seen = await figures(), time.monotonic()
                await asyncio.sleep(0.05)
                asked = time.monotonic()
                second = await figures()
                times = asked - seen, time.monotonic() - started
            finally:
                end.set()
            await asyncio.gather(*jobs)
            return first, second, await figures(), times

    first, second, last, (least, most) = run(main(), loop_name)
    assert of_pool("my_pool", first)[:3] == [2, 2, 3]
    *known, waited = of_pool("my_pool", second)
    assert known == [2, 2, 3]
    assert least <= waited <= most
    assert of_pool("my_pool", last)[2:] == [0, 0]


async def _awaited(future):
    return await future


def test_queued_work_that_no_task_awaits_has_no_longest_wait():
    """The line is missing, since it is not known how long the work has waited."""
    end, begun = threading.Event(), threading.Event()

    def work():
        begun.set()
        end.wait(60)

    with ThreadPoolExecutor(1, thread_name_prefix="plain") as pool:
        try:
            pool.submit(work)
            pool.submit(nothing)
            assert begun.wait(20)
            found = run(figures())
        finally:
            end.set()
    assert of_pool("plain", found) == [1, 1, 1, None]


def test_equal_names_of_pools_get_numbers():
    """They are numbered as loops are."""
    with contextlib.ExitStack() as stack:
        for size in (2, 3):
            pool = stack.enter_context(ThreadPoolExecutor(size, thread_name_prefix="same"))
            pool.submit(nothing).result()
        found = run(figures())
    assert [of_pool(name, found)[0] for name in ("same", "same#2")] == [2, 3]


class Shop:
    """A service whose anyio threads work until an event is set."""

    def __init__(self):
        self.end, self.begun = threading.Event(), threading.Semaphore(0)
        self.app = FastAPI()
        self.app.add_middleware(PprofMiddleware)
        self.app.get("/hold")(self.hold)
        self.app.get("/limit/{number}")(self.limit)
        self.app.get("/own/{number}")(self.own)
        self.app.get("/leave")(self.leave)
        self.app.get("/spawn/{number}")(self.spawn)
        self.limiter = anyio.CapacityLimiter(1)
        self.tasks: list[asyncio.Task[None]] = []

    def work(self):
        self.begun.release()
        self.end.wait(60)

    def hold(self) -> int:
        self.work()
        return 0

    async def limit(self, number: int) -> int:
        anyio.to_thread.current_default_thread_limiter().total_tokens = number
        return number

    async def own(self, number: int) -> int:
        async with anyio.create_task_group() as group:
            for _ in range(number):
                group.start_soon(self.work_limited)
        return number

    async def work_limited(self):
        await anyio.to_thread.run_sync(self.work, limiter=self.limiter)

    def dependency(self):
        yield 1
        self.work()  # FastAPI runs this with a limiter of its own

    async def leave(self) -> int:
        return 0

    async def spawn(self, number: int) -> int:
        event = asyncio.Event()
        self.tasks += [asyncio.create_task(event.wait()) for _ in range(number)]
        return number

    @contextlib.contextmanager
    def asked(self, port, *paths):
        """Let clients wait for these paths; set the event at the end."""
        clients = [threading.Thread(target=ask, args=(port, path)) for path in paths]
        for client in clients:
            client.start()
        try:
            yield
        finally:
            self.end.set()
            for client in clients:
                client.join(20)


def stats(port):
    answer = ask(port, f"{PROFILES}/stats")
    assert answer.status == 200
    return parse(answer.text)


@pytest.mark.server
def test_a_saturated_pool_has_queued_work(loop_name):
    """Three threads are busy and two requests wait, counted from when they were first seen."""
    shop = Shop()
    with serve(shop.app, loop_name) as port:
        ask(port, "/limit/3")
        assert of_pool("anyio:test_server", stats(port)) == [3, 0, 0, 0]
        started = time.monotonic()
        with shop.asked(port, *["/hold"] * 5):
            until(lambda: of_pool("anyio:test_server", stats(port))[:3] == [3, 3, 2])
            seen = time.monotonic()
            time.sleep(0.05)
            asked = time.monotonic()
            waited = of_pool("anyio:test_server", stats(port))[3]
            assert asked - seen <= waited <= time.monotonic() - started
        until(lambda: of_pool("anyio:test_server", stats(port)) == [3, 0, 0, 0])


@pytest.mark.server
def test_a_limiter_of_the_applications_has_lines_while_tasks_wait_for_it(loop_name):
    """The task that holds the limiter need not be the one that waits for it."""
    shop = Shop()
    with serve(shop.app, loop_name) as port:
        with shop.asked(port, "/own/4"):
            until(lambda: of_pool("limiter:test_server", stats(port))[:3] == [1, 1, 3])
            assert of_pool("limiter:test_server", stats(port))[3] > 0
        until(lambda: of_pool("limiter:test_server", stats(port)) == [None] * 4)


@pytest.mark.server
def test_limiters_without_waiting_tasks_have_no_lines(loop_name):
    """FastAPI creates one for each dependency that it exits."""
    shop = Shop()
    shop.app.get("/depend")(_depending(shop.dependency))
    with serve(shop.app, loop_name) as port, shop.asked(port, "/depend", "/depend"):
        for _ in range(2):
            assert shop.begun.acquire(timeout=20)
        found = stats(port)
    assert [key for key in found if "limiter" in key] == []


def _depending(dependency):
    async def depend(value: int = Depends(dependency)) -> int:
        return value

    return depend


def test_collections_and_pauses_are_reported():
    """Collections are counted by generation. Pauses are those that were timed."""
    gc_pauses.enable()
    try:
        gc.collect()
        gc.disable()
        for _ in range(300):
            gc.collect(0)
        found = run(figures())
        counted = gc.get_stats()
        longest = gc_pauses.quantiles([1.0])
    finally:
        gc.enable()
        gc_pauses.disable()
    for generation, counts in enumerate(counted):
        for name, key in (
            ("collections", "collections"),
            ("objects_collected", "collected"),
            ("objects_uncollectable", "uncollectable"),
        ):
            assert found[f'python_gc_{name}_total{{generation="{generation}"}}'] == counts[key]
    for generation in (0, 2):
        pauses = [
            found[f'python_gc_pause_seconds{{generation="{generation}",quantile="{each}"}}']
            for each in (0.5, 0.9, 0.99, 1)
        ]
        assert pauses == sorted(pauses)
        assert pauses[-1] == longest[generation][0] / 1e9 > 0
    assert found["python_gc_pause_seconds_total"] == gc_pauses.total_ns / 1e9 > 0


def test_pauses_that_were_never_timed_have_no_lines(monkeypatch):
    """Pauses are timed only once the process has a middleware."""
    monkeypatch.setattr(gc_pauses, "_timer", PythonTimer())
    assert [key for key in run(figures()) if "pause" in key] == []


def test_figures_of_the_process_are_the_systems():
    """CPU time grows with use; memory and threads equal /proc's."""
    before, cpu_s = run(figures()), time.process_time()
    ballast = bytearray(64 * 2**20)
    for index in range(0, len(ballast), 4096):
        ballast[index] = 1
    with OtherLoop("asyncio", "one more"):
        after = run(figures())
    assert before["process_cpu_seconds_total"] < cpu_s < after["process_cpu_seconds_total"]
    grown = after["process_resident_memory_bytes"] - before["process_resident_memory_bytes"]
    assert grown > 48 * 2**20
    assert after["process_virtual_memory_bytes"] > after["process_resident_memory_bytes"]
    assert after["process_threads"] >= 2


def test_children_and_process_pools_have_figures():
    """A pool of one process with two jobs: one runs, one waits."""
    run_program(
        """
        import concurrent.futures, multiprocessing, time
        from tests.collectors.test_stats import figures, run, until

        before = run(figures())
        assert before["process_children"] == 0
        assert not [name for name in before if name.startswith("process_pool")]
        pool = concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        jobs = [pool.submit(time.sleep, 3600) for _ in range(2)]
        label = '{pool="process_pool"}'
        names = "cpu_seconds_total", "resident_memory_bytes"

        def are_started():
            global found
            found = run(figures())
            return found.get(f"process_pool_queued{label}") == 1 and all(
                found[f"process_children_{name}"] > before[f"process_children_{name}"]
                for name in names
            )

        until(are_started)
        for process in list(pool._processes.values()):
            process.kill()
        concurrent.futures.wait(jobs, timeout=60)
        pool.shutdown()
        assert found[f"process_pool_processes{label}"] == 1
        assert found[f"process_pool_busy{label}"] == 1
        assert found["process_children"] == 2  # spawning starts a process that tracks resources
        """
    )


@pytest.mark.server
def test_all_lines_match_the_grammar_and_are_in_order(loop_name, monkeypatch):
    """All names appear, in the listed order."""
    monkeypatch.setattr("asgi_pprof.runtime.malloc._SMALL", 10**12)  # of a test run
    shop = Shop()
    with serve(shop.app, loop_name) as port:
        ask(port, "/limit/3")
        text = ask(port, f"{PROFILES}/stats").text
        parse(text)
        names = names_of(text)
    assert [name for name, _ in itertools.groupby(names)] == [
        name for name in NAMES if name in names
    ]
    assert {name for name in NAMES if name not in names} <= {
        *("python_gc_pause_seconds", "python_gc_pause_seconds_total"),
        *("process_pool_processes", "process_pool_busy", "process_pool_queued"),
    }


@pytest.mark.server
def test_the_tasks_of_a_service_are_counted(loop_name):
    """The number of tasks rises by the number of tasks that were started."""
    shop = Shop()
    tasks = 'loop_tasks{loop="test_server"}'
    with serve(shop.app, loop_name) as port:
        before = stats(port)[tasks]
        ask(port, "/spawn/23")
        until(lambda: stats(port)[tasks] == before + 23)


@pytest.mark.server
def test_awk_can_extract_a_value(any_shop):
    """A one-line awk program extracts one number."""
    text = any_shop.get("stats").text
    program = '$1 == "loop_tasks{loop=\\"MainThread\\"}" { print $2 }'
    done = subprocess.run(["awk", program], input=text, capture_output=True, text=True, check=True)
    assert int(done.stdout) >= 1


@pytest.mark.server
@pytest.mark.parametrize("query", ["", "?debug=1", "?seconds=x", "?%zz&;", "?gc=1&debug=99"])
def test_parameters_change_nothing(any_shop, query):
    """The answer is plain text, whatever the query is."""
    answer = any_shop.get(f"stats{query}")
    assert answer.status == 200
    assert answer.headers["content-type"] == "text/plain; charset=utf-8"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert 'loop_tasks{loop="MainThread"}' in parse(answer.text)


@pytest.mark.server
def test_only_get_and_head_are_allowed(any_shop):
    """This is so for all endpoints except symbol."""
    head = any_shop.get("stats", method="HEAD")
    assert (head.status, head.body) == (200, b"")
    assert head.headers["content-type"] == "text/plain; charset=utf-8"
    post = any_shop.get("stats", method="POST", body=b"x")
    assert (post.status, post.headers["allow"]) == (405, "GET, HEAD")


@pytest.mark.server
def test_the_index_shows_the_same_lines(any_shop):
    """The index ends with the lines and links to stats."""
    page, text = any_shop.get("").text, any_shop.get("stats").text
    shown = re.search(r"(?s)<p><a href='stats'>stats</a>:</p>\n<pre>\n(.*)</pre>\n</body>\n", page)
    assert shown is not None
    # A generation may have been collected between the two for the first time in a minute.
    on_page, alone = (
        [name for name in parse(lines) if not name.startswith("python_gc_pause")]
        for lines in (unescape(shown[1]), text)
    )
    assert on_page == alone


def test_the_longest_wait_counts_from_a_scan_of_the_tasks(loop_name):
    """A scan by task tracking has seen the work before the first request for stats."""

    async def main():
        loop, end, begun = asyncio.get_running_loop(), threading.Event(), threading.Event()

        def work():
            begun.set()
            end.wait(60)

        task_tracking.attach(loop)
        before = time.monotonic()
        with ThreadPoolExecutor(1, thread_name_prefix="scanned") as pool:
            try:
                jobs = [
                    asyncio.create_task(_awaited(loop.run_in_executor(pool, work)))
                    for _ in range(2)
                ]
                await asyncio.sleep(0)
                assert begun.wait(20)
                task_tracking.scan(loop)
                while task_tracking.is_scanning(loop):  # noqa: ASYNC110
                    await asyncio.sleep(0)
                seen = time.monotonic()
                await asyncio.sleep(0.05)
                asked = time.monotonic()
                found = await figures()
            finally:
                end.set()
                task_tracking.detach(loop)
            await asyncio.gather(*jobs)
        most = found['thread_pool_longest_wait_at_most_seconds{pool="scanned"}']
        return of_pool("scanned", found)[3], most, asked - seen, time.monotonic() - before

    waited, at_most, least, most = run(main(), loop_name)
    assert least <= waited <= at_most <= most


def test_the_longest_wait_of_a_young_wait_is_bounded(loop_name):
    """Nobody has seen the wait before; its task was created after tracking began."""

    async def main():
        loop, end, begun = asyncio.get_running_loop(), threading.Event(), threading.Event()

        def work():
            begun.set()
            end.wait(60)

        with ThreadPoolExecutor(1, thread_name_prefix="young") as pool:
            before = asyncio.create_task(_awaited(loop.run_in_executor(pool, work)))
            await asyncio.to_thread(begun.wait)
            task_tracking.attach(loop)
            try:
                job = asyncio.create_task(_awaited(loop.run_in_executor(pool, work)))
                created = time.monotonic()
                await asyncio.sleep(0.2)
                asked = time.monotonic()
                await figures()
                found = await figures()
            finally:
                end.set()
                task_tracking.detach(loop)
            await asyncio.gather(before, job)
        most = found['thread_pool_longest_wait_at_most_seconds{pool="young"}']
        return of_pool("young", found)[3], most, asked - created, asked

    waited, at_most, truth, asked = run(main(), loop_name)
    assert waited <= time.monotonic() - asked
    assert truth <= at_most


def test_without_tracking_it_is_not_known_how_long_a_young_wait_is(loop_name):
    """Its task may be of any age."""

    async def main():
        loop, end, begun = asyncio.get_running_loop(), threading.Event(), threading.Event()

        def work():
            begun.set()
            end.wait(60)

        with ThreadPoolExecutor(1, thread_name_prefix="untracked") as pool:
            try:
                jobs = [
                    asyncio.create_task(_awaited(loop.run_in_executor(pool, work)))
                    for _ in range(2)
                ]
                await asyncio.to_thread(begun.wait)
                await figures()
                found = await figures()
            finally:
                end.set()
            await asyncio.gather(*jobs)
        return found

    found = run(main(), loop_name)
    assert of_pool("untracked", found)[3] > 0
    assert 'thread_pool_longest_wait_at_most_seconds{pool="untracked"}' not in found
