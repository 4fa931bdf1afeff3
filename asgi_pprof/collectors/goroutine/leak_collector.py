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
from asgi_pprof.collectors.goroutine.leak_search import MAX_OBJECTS, find_leaked
from asgi_pprof.collectors.goroutine.leaked_tasks import leaked_tasks
from asgi_pprof.merge import SampleKey
from asgi_pprof.profile import Goroutine, Profile
from asgi_pprof.stacks import UNKNOWN

_CUT = f"the search was cut at {MAX_OBJECTS:,} objects: leaks may be missing"


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
        is_cut = await self._search()
        scan = await self._tasks.begin_scan()
        counts: Counter[SampleKey] = Counter()
        for task in leaked_tasks:
            counts[scan.sample_key(task)] += 1
            await scan.yield_if_due()
        profile = profile_of("goroutineleak", counts, (_CUT,) if is_cut else ())
        return lambda: profile

    async def goroutines(self) -> AsyncGenerator[Goroutine, None]:
        """Search, and yield every task, leaked ones marked."""
        is_cut = await self._search()
        async with aclosing(self._tasks.goroutines()) as goroutines:
            async for each in goroutines:
                yield each
        if is_cut:
            yield Goroutine(0, _CUT, (UNKNOWN,))

    async def _search(self) -> bool:
        async with leaked_tasks.alone():
            scan = await self._tasks.begin_scan()
            tasks = [task async for task in self._tasks.tasks(scan)]
            found, is_cut = await find_leaked(tasks, scan.awaited)
            leaked_tasks.replace(found)
            return is_cut
