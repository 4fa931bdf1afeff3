"""Measures what tracking and reading tasks costs: per created task, and for 100,000 at once."""

from __future__ import annotations

import asyncio
import gc
import resource
import statistics
import time
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

import uvloop

from asgi_pprof.collectors.goroutine.collector import TaskCollector
from asgi_pprof.collectors.goroutine.leak_collector import LeakCollector
from asgi_pprof.collectors.goroutine.task_tracking import TaskTracking, task_tracking
from asgi_pprof.collectors.stats import Stats
from asgi_pprof.encoders.text import goroutine_text
from asgi_pprof.recorders import gc_pauses, memory_bytes, stall_watch

BATCH = 1000
MANY = 100_000
_NEVER_S = 3600.0


class Creation(NamedTuple):
    """Microseconds to create a task and run it to its end, without tracking and with it."""

    plain_us: float
    tracked_us: float


class Reading(NamedTuple):
    """
    One way to read all tasks.

    Args:
        seconds: From the request to the answer.
        gap_ms: The longest time in which the loop ran nothing else meanwhile.
        idle_gap_ms: The same in an equally long time without a request.
        memory_mb: How much the peak of the process's memory grew.
    """

    what: str
    seconds: float
    gap_ms: float
    idle_gap_ms: float
    memory_mb: float


def measure_creation(loop: str, rounds: int) -> Creation:
    """Create tasks alternately without tracking and with it, and return the medians."""

    async def nothing() -> None:
        pass

    async def batch() -> float:
        start = time.perf_counter()
        tasks = [asyncio.create_task(nothing()) for _ in range(BATCH)]
        await asyncio.sleep(0)
        elapsed = time.perf_counter() - start
        await asyncio.gather(*tasks)
        return 1e6 * elapsed / BATCH

    async def main() -> Creation:
        plain, tracked = [], []
        here = asyncio.get_running_loop()
        for _ in range(rounds):
            plain.append(await batch())
            task_tracking.attach(here)
            tracked.append(await batch())
            task_tracking.detach(here)
        return Creation(statistics.median(plain), statistics.median(tracked))

    return _run(main, loop)


def measure_reading(loop: str, number: int, alike: bool) -> list[Reading]:
    """
    Read many waiting tasks in each way, on a loop that also has other work.

    Args:
        loop: "asyncio" or "uvloop".
        number: How many tasks.
        alike: Whether all wait at one place; else at one of a thousand.
    """

    async def main() -> list[Reading]:
        event = asyncio.Event()
        waits = [_waiter(0 if alike else each) for each in range(1 if alike else 1000)]
        task_tracking.attach(asyncio.get_running_loop())
        tasks = [asyncio.create_task(waits[each % len(waits)](event)) for each in range(number)]
        await asyncio.sleep(0)
        gc.collect()
        collector, tracking = TaskCollector(), TaskTracking(interval_s=_NEVER_S)
        leaks = LeakCollector(collector)
        found = [
            await _measure(what, read)
            for what, read in (
                ("a scan of since when they wait", lambda: _scan(tracking)),
                ("goroutine", lambda: _snapshot(collector, number)),
                ("goroutine?debug=2", lambda: _dump(collector)),
                ("goroutineleak", lambda: _search(leaks)),
                ("stats", lambda: _count(number)),
            )
        ]
        event.set()
        await asyncio.gather(*tasks)
        task_tracking.detach(asyncio.get_running_loop())
        return found

    return _run(main, loop)


async def _search(collector: LeakCollector) -> None:
    profile = (await collector.snapshot())()
    assert not profile.samples


async def _scan(tracking: TaskTracking) -> None:
    loop = asyncio.get_running_loop()
    tracking.attach(loop)
    tracking.scan(loop)
    while tracking.is_scanning(loop):  # noqa: ASYNC110
        await asyncio.sleep(0)
    tracking.detach(loop)


async def _snapshot(collector: TaskCollector, number: int) -> None:
    profile = (await collector.snapshot())()
    assert sum(sample.values[0] for sample in profile.samples) >= number


async def _count(number: int) -> None:
    text = await Stats(stall_watch, gc_pauses, memory_bytes).text()
    assert int(text.split(maxsplit=2)[1]) > number  # loop_tasks is the first line


async def _dump(collector: TaskCollector) -> None:
    async for task in collector.goroutines():
        assert goroutine_text(task)


async def _measure(what: str, read: Callable[[], Awaitable[None]]) -> Reading:
    await read()  # the first time creates records and frames, which are kept
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    ticker = asyncio.create_task(_longest_gap())
    await asyncio.sleep(0)
    start = time.perf_counter()
    await read()
    seconds = time.perf_counter() - start
    ticker.cancel()
    gap = await ticker
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    ticker = asyncio.create_task(_longest_gap())
    await asyncio.sleep(seconds)
    ticker.cancel()
    return Reading(what, seconds, 1e3 * gap, 1e3 * await ticker, grown / 1024)


async def _longest_gap() -> float:
    longest, last = 0.0, time.perf_counter()
    try:
        while True:
            await asyncio.sleep(0)
            now = time.perf_counter()
            longest, last = max(longest, now - last), now
    except asyncio.CancelledError:
        return longest


def _waiter(number: int) -> Callable[[asyncio.Event], Awaitable[None]]:
    """Return a coroutine function of its own for each number, three awaits deep."""
    names: dict[str, Any] = {}
    code = (
        "async def inner(event): await event.wait()\n"
        "async def middle(event): await inner(event)\n"
        f"async def outer_{number}(event): await middle(event)\n"
    )
    exec(compile(code, f"<waiter {number}>", "exec"), names)
    function: Callable[[asyncio.Event], Awaitable[None]] = names[f"outer_{number}"]
    return function


def _run(main, loop: str):
    factory = uvloop.new_event_loop if loop == "uvloop" else asyncio.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(main())
