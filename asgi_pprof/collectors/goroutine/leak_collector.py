"""
goroutineleak: tasks that nothing can wake any more.

What is measured: one count per task that waits for something which nothing
alive outside the leaked tasks themselves can complete. See `leak_search` for how they
are found, what that costs, and what it misses: nothing is searched until
somebody asks, and what is found stays marked in later dumps, as in Go.

Source: runtime/pprof, writeGoroutineLeak.
"""

from __future__ import annotations

import asyncio
import os
import threading
import weakref
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager, asynccontextmanager, nullcontext

from asgi_pprof.collectors.goroutine.collector import Rank, TaskCollector, profile_of
from asgi_pprof.collectors.goroutine.leak_search import find_leaked
from asgi_pprof.collectors.goroutine.waits import Task
from asgi_pprof.merge import SampleKey
from asgi_pprof.profile import Goroutine, Profile
from asgi_pprof.runtime.task_records import record_of

_PAUSE_S = 0.05

# By process: a fork may happen in the middle of a search.
_searching: dict[int, threading.Lock] = {}


@asynccontextmanager
async def _search_alone() -> AsyncIterator[None]:
    """Wait for searches on other loops as well: what one holds the other takes for alive."""
    lock = _searching.setdefault(os.getpid(), threading.Lock())
    # An Event would belong to one loop.
    while not lock.acquire(blocking=False):  # noqa: ASYNC110
        await asyncio.sleep(_PAUSE_S)
    try:
        yield
    finally:
        lock.release()


class LeakCollector:
    """
    The leaked tasks among those of the process.

    Args:
        tasks: Where tasks come from.
    """

    def __init__(self, tasks: TaskCollector) -> None:
        self._tasks = tasks
        self._leaked: weakref.WeakSet[Task] = weakref.WeakSet()

    def count(self) -> int:
        """Return how many the latest search has found, 0 before the first."""
        return sum(not task.done() for task in self._leaked.copy())

    def note(self) -> str:
        """Return nothing: it is always on."""
        return ""

    def window(self) -> AbstractContextManager[None]:
        """Return a manager that does nothing."""
        return nullcontext()

    async def snapshot(self) -> Callable[[], Profile]:
        """Search, and give goroutineleak/count: one sample per stack and labels."""
        await self._search()
        scan = await self._tasks.begin_scan()
        counts: Counter[SampleKey] = Counter()
        for task in list(self._leaked):
            counts[scan.sample_key(task)] += 1
            await scan.yield_if_due()
        profile = profile_of("goroutineleak", counts)
        return lambda: profile

    async def goroutines(self) -> AsyncIterator[tuple[Rank, Goroutine]]:
        """Search, and yield every task, leaked ones marked."""
        await self._search()
        async for each in self._tasks.goroutines():
            yield each

    async def _search(self) -> None:
        async with _search_alone():
            scan = await self._tasks.begin_scan()
            tasks = [task async for task in self._tasks.tasks(scan)]
            found = await find_leaked(tasks, scan.awaited)
            for task in self._leaked:
                record_of(task).leaked = task in found
            for task in found:
                record_of(task).leaked = True
            self._leaked = weakref.WeakSet(found)
