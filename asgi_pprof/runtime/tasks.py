"""
All tasks of the process, of any loop and class, and what would wake each.

How: up to CPython 3.13 asyncio registers all tasks in two sets of its module.
Later versions link them in lists of the interpreter that only the C core can read;
tasks of other classes are in sets of the C module's own.

What it costs: 3 to 5 ms for 100,000 tasks, copied in one go, and 1 to 3 ms up to
3.13. Without the C core 9 to 21 ms on 3.14 and later.

What it misses: nothing with the C core, nor up to 3.13. Without the C core, on
3.14 and later, it misses the tasks of loops that it never saw running.

Source: CPython, Modules/_asynciomodule.c, Lib/asyncio/tasks.py.
"""

from __future__ import annotations

import asyncio
import gc
import sys
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeAlias, cast

from asgi_pprof.native.core import native
from asgi_pprof.runtime import type_info
from asgi_pprof.runtime.loops import running_loops

_asyncio: Any
try:
    import _asyncio
except ImportError:  # asyncio in Python alone
    _asyncio = None

Task = asyncio.Task[Any]
_Entry: TypeAlias = "Task | weakref.ref[Task]"


class TaskList:
    """
    Lists all tasks of all loops; without the C core it remembers, weakly, the loops it has seen.

    May be used on several loops at a time.
    """

    def __init__(self) -> None:
        self._loops: weakref.WeakSet[asyncio.AbstractEventLoop] = weakref.WeakSet()

    def tasks(self) -> list[_Entry]:
        """
        Return every registered task, or a weak reference to it; to be called on a running loop.

        A task may be listed twice, and may be done. All registries are copied in one
        go, so that no task is missed that is registered before and after.
        """
        entries = _registered()
        if sys.version_info >= (3, 14):
            linked = _linked()
            if linked is not None:
                linked += entries  # the long list is not copied once more
                return linked
            self._remember_loops()
            remembered = cast(Any, self._loops).data  # a copy of its set is atomic
            for loop in list(remembered):
                entries += _tasks_of(loop())
        return entries

    def _remember_loops(self) -> None:
        for running in running_loops():
            with suppress(TypeError):  # a foreign loop that cannot be referenced weakly
                self._loops.add(running.loop)


_hidden: set[int] = set()


@contextmanager
def hidden(task: Task) -> Iterator[None]:
    """Leave a task out of all that is said of tasks: it is not the application's."""
    _hidden.add(id(task))
    try:
        yield
    finally:
        _hidden.remove(id(task))


def alive(entries: Iterable[_Entry]) -> Iterator[Task]:
    """Yield each task of the application once, unless it is done by the time it is reached."""
    seen: dict[int, Task] = {}
    for entry in entries:
        task = entry() if isinstance(entry, weakref.ref) else entry
        if task is None or id(task) in seen or id(task) in _hidden:
            continue
        if not is_done(task):
            seen[id(task)] = task
            yield task


def is_done(task: Task) -> bool:
    """Return whether a task is done; False if its class raises an error instead of telling."""
    try:
        return bool(task.done())
    except Exception:
        return False


def loop_of(task: Task) -> asyncio.AbstractEventLoop | None:
    """Return a task's loop; None if its class raises an error instead of telling."""
    try:
        return task.get_loop()
    except Exception:
        return None


def coroutine_of(task: Task) -> object:
    """Return a task's coroutine; None if its class raises an error instead of telling."""
    try:
        return task.get_coro()
    except Exception:
        return None


_IN_C = type_info.addresses(*filter(None, [getattr(_asyncio, "Task", None)]))
_IN_PYTHON = type_info.addresses(asyncio.tasks._PyTask)  # type: ignore[attr-defined]
_attributes = asyncio.futures._PyFuture.__dict__["__dict__"].__get__  # type: ignore[attr-defined]


def cancelling(task: Task) -> int:
    """
    Return how many requests to cancel a task are open: `Task.cancelling`.

    No code of the task's class runs. 0 for a class that is not derived from asyncio's.
    """
    if type_info.is_subclass(type(task), _IN_C):
        return cast(int, _asyncio.Task.cancelling(task))
    if type_info.is_subclass(type(task), _IN_PYTHON):
        count = _attributes(task).get("_num_cancels_requested")
        return count if type(count) is int else 0
    return 0


def _tasks_of(loop: asyncio.AbstractEventLoop | None) -> list[Task]:
    return [] if loop is None else list(asyncio.all_tasks(loop))


def _registered() -> list[_Entry]:
    """
    Return the tasks in asyncio's sets: all up to 3.13, later those of foreign classes.

    The copy of a set is atomic; a WeakSet's iterator is not. The eager tasks come
    first: a task that becomes a scheduled one meanwhile is then in both sets, not in none.
    """
    entries: list[_Entry] = []
    for name in ("_eager_tasks", "_scheduled_tasks", "_all_tasks"):
        registry: Any = getattr(asyncio.tasks, name, ())
        entries += list(getattr(registry, "data", registry))
    if sys.version_info >= (3, 14):
        entries += _registered_by_c()
    return entries


def _registered_by_c() -> list[_Entry]:
    # From 3.14 on the C module has a WeakSet and a set of its own, besides a set of
    # types of coroutines. It shows them only to the garbage collector.
    entries: list[_Entry] = []
    for each in gc.get_referents(_asyncio):
        if type(each) is weakref.WeakSet:
            entries += list(cast(Any, each).data)
        elif type(each) is set:
            entries += [task for task in list(each) if not isinstance(task, type)]
    return entries


class _NoLoop:
    """What a task needs of its loop when it is created; it never runs the task."""

    def get_debug(self) -> bool:
        return False

    def call_soon(self, *_: object, **__: object) -> None:
        pass


async def _nothing() -> None:
    pass


def _linked() -> list[_Entry] | None:
    """Return the tasks in the interpreter's own lists; None where they cannot be read."""
    if native is None or _asyncio is None:
        return None
    tasks = native.asyncio_tasks()
    if tasks is None and _learn_layout():
        tasks = native.asyncio_tasks()
    return cast("list[_Entry] | None", tasks)


def _learn_layout() -> bool:
    """Show the C core a new task, the last in this thread's list; no loop knows of it."""
    coroutine = _nothing()
    # With a name: a default name would use up a number of the application's tasks.
    task = _asyncio.Task(coroutine, loop=_NoLoop(), name="asgi_pprof")
    task._log_destroy_pending = False
    coroutine.close()
    return cast(bool, native.learn_tasks(task))


def waits_for(task: Task) -> Any:
    """Return the future, or other awaitable, that would wake a task; None if it can run."""
    waiter = getattr(task, "_fut_waiter", None)
    return None if waiter is None or waiter.done() else waiter
