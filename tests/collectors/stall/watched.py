"""Watched event loops, functions that block a loop, and the resulting profiles."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import time
from pathlib import Path

import uvloop

from asgi_pprof.collectors.stall.collector import StallCollector
from asgi_pprof.collectors.stall.loop_monitor import State
from asgi_pprof.collectors.stall.watch import StallWatch
from asgi_pprof.recorders import gc_pauses
from asgi_pprof.runtime.proc import LoopThread
from tests.servers import until
from tests.valid import check_valid

FACTORIES = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}

HOLD_S = 0.3
SHORT_MS = 40
"""A threshold at which a scan comes during each `HOLD_S`, even after the loop was idle."""

LONG_MS = 400
"""A threshold that a harmless loop hardly exceeds, even on a busy machine."""


def hold_by_sleeping(seconds: float = HOLD_S) -> int:
    start = time.perf_counter_ns()
    time.sleep(seconds)  # the line
    return time.perf_counter_ns() - start


def hold_by_parsing(document: str) -> int:
    start = time.perf_counter_ns()
    json.loads(document)  # the line
    return time.perf_counter_ns() - start


def cpu_ns(function, *arguments) -> int:
    """Return the CPU time of a call, which other processes do not affect."""
    start = time.thread_time_ns()
    function(*arguments)
    return time.thread_time_ns() - start


@functools.cache
def long_document() -> str:
    """Return a document that takes at least `HOLD_S` to parse, in one call that keeps the GIL."""
    numbers = "1"
    while cpu_ns(hold_by_parsing, f"[{numbers}]") < HOLD_S * 1e9:
        numbers = f"{numbers},{numbers}"
    return f"[{numbers}]"


def run(function, loop_name="asyncio", threshold_ms=SHORT_MS, open_thread=LoopThread):
    """Run a coroutine function on a watched loop, with the watch as its argument."""
    watch = StallWatch(gc_pauses, open_thread)
    watch.set_threshold(threshold_ms)

    async def main():
        loop = asyncio.get_running_loop()
        watch.attach(loop)
        try:
            return await function(watch)
        finally:
            watch.detach(loop)

    with asyncio.Runner(loop_factory=FACTORIES[loop_name]) as runner:
        try:
            return runner.run(main())
        finally:
            until(lambda: not watch._is_watching)


def waited_for_cpu_ns() -> int:
    """Return how long the threads of this process have waited for a CPU."""
    return sum(
        int(schedstat.read_text().split()[1])
        for schedstat in Path("/proc/self/task").glob("*/schedstat")
    )


@contextlib.contextmanager
def no_stalls(watch):
    """Check that no stall is counted inside the `with`, except those that other processes cause."""
    waited_ns, count = waited_for_cpu_ns(), watch.count()
    yield
    found = watch.totals()
    waited_ns = waited_for_cpu_ns() - waited_ns
    assert watch.count() == count or waited_ns > watch.threshold_ms * 1e6, found


def monitor_of(watch, loop=None):
    return watch._monitors[id(loop or asyncio.get_running_loop())]


async def idle(watch) -> None:
    """
    Wait until the watch has found the running loop idle.

    From then on a whole stall is counted, not only the part after the first probe.
    """
    async with asyncio.timeout(20):
        while monitor_of(watch)._state is not State.IDLE:  # noqa: ASYNC110 (set by another thread)
            await asyncio.sleep(SHORT_MS / 1000)


async def stalls_of(watch, function, count=1):
    """Wait until `count` stalls with this function are counted; return them."""
    await counted(watch, function, count)
    await idle(watch)  # a further stall would have been counted by now
    return await counted(watch, function, count)


async def counted(watch, function, count=1):
    """Do the same for loops that are never found idle."""
    async with asyncio.timeout(20):
        found = []
        while sum(each["count"] for each in found) < count:
            await asyncio.sleep(0.01)
            found = of(await all_stalls(watch), function)
        return found


async def all_stalls(watch):
    return [as_json(sample) for sample in (await taken(watch)).samples]


async def taken(watch):
    """Return the collector's profile after checking that it is valid."""
    profile = (await StallCollector(watch).snapshot())()
    check_valid(profile)
    return profile


def as_json(sample) -> dict[str, object]:
    functions = [location.function.name.rpartition(".")[2] for location in sample.stack]
    lines = [location.line for location in sample.stack]
    count, delay_ns = sample.values
    return {
        "functions": functions,
        "lines": dict(reversed(list(zip(functions, lines, strict=True)))),
        "labels": dict(sample.labels),
        "count": count,
        "delay_ns": delay_ns,
    }


def of(found, function):
    return [each for each in found if function in each["functions"]]
