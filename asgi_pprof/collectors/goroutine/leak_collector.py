"""
goroutineleak: tasks that nothing can wake any more.

What is measured: one count per task that waits for something which nothing
reachable can complete. `leak_search` says how they are found, what that costs,
and what it misses: nothing is searched until a profile is requested, and what is
found stays marked in later dumps, as in Go.

Source: runtime/pprof, writeGoroutineLeak.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

from asgi_pprof.collectors import AlwaysOn
from asgi_pprof.collectors.goroutine.collector import TaskCollector, profile_of
from asgi_pprof.collectors.goroutine.leak_search import find_leaked
from asgi_pprof.collectors.goroutine.leaked_tasks import leaked_tasks
from asgi_pprof.merge import SampleKey
from asgi_pprof.profile import Goroutine, Profile


class LeakCollector(AlwaysOn):
    """
    The leaked tasks among those of the process.

    Args:
        tasks: Where tasks come from.
    """

    def __init__(self, tasks: TaskCollector) -> None:
        self._tasks = tasks

    def count(self) -> int:
        """Return how many the latest search of the process has found, 0 before the first."""
        return leaked_tasks.count()

    async def snapshot(self) -> Callable[[], Profile]:
        """Search, and give goroutineleak/count: one sample per stack and labels."""
        await self._search()
        scan = await self._tasks.begin_scan()
        counts: Counter[SampleKey] = Counter()
        for task in leaked_tasks:
            counts[scan.sample_key(task)] += 1
            await scan.yield_if_due()
        profile = profile_of("goroutineleak", counts)
        return lambda: profile

    async def goroutines(self) -> AsyncGenerator[Goroutine, None]:
        """Search, and yield every task, leaked ones marked."""
        await self._search()
        async with aclosing(self._tasks.goroutines()) as goroutines:
            async for each in goroutines:
                yield each

    async def _search(self) -> None:
        async with leaked_tasks.alone():
            scan = await self._tasks.begin_scan()
            tasks = [task async for task in self._tasks.tasks(scan)]
            leaked_tasks.replace(await find_leaked(tasks, scan.awaited))
