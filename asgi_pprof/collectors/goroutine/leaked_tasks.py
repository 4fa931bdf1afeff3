"""Which tasks of the process leak, as the latest search has found: the same for all its apps."""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

from asgi_pprof.collectors.goroutine.references import Task
from asgi_pprof.forks import Renewed, expect_forks
from asgi_pprof.runtime.task_records import record_of
from asgi_pprof.runtime.tasks import is_done

_RETRY_S = 0.05  # from one attempt to begin a search to the next


class LeakedTasks(Renewed):
    """The leaked tasks of this process, and the right to search for them, one search at a time."""

    def __init__(self) -> None:
        super().__init__()
        self._tasks: weakref.WeakSet[Task] = weakref.WeakSet()
        self._renew_after_fork()

    def _renew_after_fork(self) -> None:
        self._searching = threading.Lock()

    def __iter__(self) -> Iterator[Task]:
        return iter(list(self._tasks))

    def count(self) -> int:
        """Return how many there are that are not done, 0 before the first search."""
        return sum(not is_done(task) for task in self._tasks.copy())

    @asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        """Wait for other searches, on other loops as well: each would hide tasks from the other."""
        expect_forks()
        lock = self._searching
        # An Event would belong to one loop.
        while not lock.acquire(blocking=False):  # noqa: ASYNC110
            await asyncio.sleep(_RETRY_S)
        try:
            yield
        finally:
            lock.release()

    def replace(self, found: set[Task]) -> None:
        """Mark the tasks that a search has found, and unmark those it has not found again."""
        for task in self:
            record_of(task).leaked = task in found
        for task in found:
            record_of(task).leaked = True
        self._tasks = weakref.WeakSet(found)


leaked_tasks = LeakedTasks()
