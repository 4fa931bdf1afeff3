"""
What is recorded of tasks all the time: a number, who created them, since when they wait.

A record is an attribute of the task itself, so it needs no table and goes when
the task goes. Numbers are small, stable and never used again. Who created a task
is known where the loop's task factory is ours (`task_tracking`): measured
1.1 us a task on CPython 3.11, and a record of about 170 bytes. Since when a task
waits is found out by a scan every 15 s, in slices of 1 ms, and whenever a
profile is taken: the time is at most 15 s too short, never too long.

Source: runtime/proc.go, newproc1 (goid, gopc, parentGoid); CPython,
Lib/asyncio/base_events.py, create_task.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, cast

from asgi_pprof.runtime.modules import code_filename
from asgi_pprof.runtime.own_work import own_work
from asgi_pprof.runtime.task_records import (
    ATTRIBUTE,
    TaskRecord,
    record_of,
    task_records,
    update_wait,
)
from asgi_pprof.runtime.tasks import Task, TaskList, alive, is_done
from asgi_pprof.slices import Slices

logger = logging.getLogger("asgi_pprof")

SCAN_INTERVAL_S = 15.0
_SLICE_S = 0.001


class TaskTracking:
    """
    Records who creates tasks, and since when they wait, on the loops it is attached to.

    One for the process; the users of each loop are counted.

    Args:
        interval_s: Seconds from one scan to the next.
        clock: Test seam for `time.monotonic_ns`, by which waiting is measured.
    """

    def __init__(
        self, interval_s: float = SCAN_INTERVAL_S, clock: Callable[[], int] = time.monotonic_ns
    ) -> None:
        self._interval_s = interval_s
        self._clock = clock
        self._tasks = TaskList()
        self._has_failed = False
        self._tracked: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _TrackedLoop] = (
            weakref.WeakKeyDictionary()
        )

    def attach(self, loop: asyncio.AbstractEventLoop) -> None:
        """Start recording on the running loop; pair with `detach`."""
        tracked = self._tracked.get(loop)
        if tracked is None:
            tracked = self._tracked[loop] = _TrackedLoop(loop)
            tracked.begin_scan(self._clock())
            tracked.scan_later(self._interval_s, self._scan)
        tracked.users += 1

    def detach(self, loop: asyncio.AbstractEventLoop) -> None:
        """Put the loop's own task factory back when its last user leaves; from any thread."""
        tracked = self._tracked.get(loop)
        if tracked is None:
            return
        tracked.users -= 1
        if not tracked.users:
            del self._tracked[loop]
            tracked.end()

    def scan(self, loop: asyncio.AbstractEventLoop) -> None:
        """Start a scan of the tasks now, on a running loop it is attached to."""
        tracked = self._tracked[loop]
        tracked.cancel_scan()
        self._scan(tracked)

    def is_scanning(self, loop: asyncio.AbstractEventLoop) -> bool:
        """Return whether a scan is between two of its slices."""
        return self._tracked[loop].is_scanning

    @own_work
    def _scan(self, tracked: _TrackedLoop, tasks: Iterator[Task] | None = None) -> None:
        try:
            if tasks is None:
                tasks = alive(self._tasks.tasks())
            slices, now_ns = Slices(_SLICE_S), self._clock()
            tracked.begin_scan(now_ns)
            for task in tasks:
                update_wait(task, now_ns)
                if slices.is_over():
                    tracked.continue_scan(self._scan, tasks)
                    return
        except Exception:
            if not self._has_failed:
                logger.exception("asgi_pprof failed to scan the tasks; this is logged once")
            self._has_failed = True
        tracked.scan_later(self._interval_s, self._scan)


class _TrackedLoop:
    """One loop that is tracked: its task factory, and the next scan."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.users = 0
        self.is_scanning = False
        # Weakly: a value of a WeakKeyDictionary must not keep its key alive.
        self._loop = weakref.ref(loop)
        # Weakly as well: a handle refers to its loop, which keeps it while it is scheduled.
        self._next_scan: Callable[[], asyncio.Handle | None] = lambda: None
        self._before = loop.get_task_factory()
        self._recording = _RecordingFactory(self._before)
        self._factory = self._recording.factory()
        loop.set_task_factory(self._factory)

    def begin_scan(self, now_ns: int) -> None:
        """Record when the last slice of a scan began."""
        self._recording.latest_ns = now_ns

    def scan_later(self, delay_s: float, scan: Callable[[_TrackedLoop], None]) -> None:
        loop, self.is_scanning = self._loop(), False
        if self._recording.is_on and loop is not None:
            self._next_scan = weakref.ref(loop.call_later(delay_s, scan, self))

    def continue_scan(self, scan: Callable[..., None], tasks: Iterator[Task]) -> None:
        loop, self.is_scanning = self._loop(), True
        if self._recording.is_on and loop is not None:
            self._next_scan = weakref.ref(loop.call_soon(scan, self, tasks))

    def cancel_scan(self) -> None:
        handle = self._next_scan()
        if handle is not None:
            handle.cancel()

    def end(self) -> None:
        self._recording.is_on = False
        loop = self._loop()
        if loop is None:
            return
        # If the application has put a factory around ours, ours stays in place and only delegates.
        if loop.get_task_factory() is self._factory:
            loop.set_task_factory(self._before)
        if asyncio._get_running_loop() is loop or not loop.is_running():
            self.cancel_scan()
        else:
            with contextlib.suppress(RuntimeError):  # closed meanwhile
                loop.call_soon_threadsafe(self.cancel_scan)


class _RecordingFactory:
    """
    Creates tasks as a loop's task factory did before, and records who created each.

    It is called for every task that is created, so it makes no more calls than it takes.

    Args:
        before: The loop's factory, None if it had none.
    """

    __slots__ = ("_before", "_construct", "_libraries", "_task_class", "is_on", "latest_ns")

    def __init__(self, before: Any) -> None:
        self.is_on = True
        # The last scan: tasks are created after it. To ask the clock took 0.17 us a task.
        self.latest_ns = 0
        self._before = before
        self._libraries = _library_files()
        self._task_class: Any = _NamedTask if _takes_names_away() else asyncio.tasks.Task

    def factory(self) -> Callable[..., Any]:
        """Return the factory to be set on the loop."""
        if getattr(self._before, "__code__", None) is not _EAGER:
            return self._create
        # anyio recognizes an eager factory by its code, and takes the constructor out of
        # it to start its tasks in the usual way: so ours is made by the same function.
        self._construct = self._before.__closure__[0].cell_contents
        create: Any = asyncio.create_eager_task_factory  # type: ignore[attr-defined]
        return cast(Callable[..., Any], create(self._create_eagerly))

    def _create(self, loop: asyncio.AbstractEventLoop, coro: Any, **kwargs: Any) -> Any:
        if self._before is not None:
            task = self._before(loop, coro, **kwargs)
            is_new = False
        else:
            task = self._task_class(coro, loop=loop, **kwargs)
            is_new = "eager_start" not in kwargs
            if task._source_traceback:
                _hide(task, _CREATING_FILES)
        if self.is_on:
            self._record(task, loop, sys._getframe(1), is_new)
        return task

    def _create_eagerly(self, coro: Any, **kwargs: Any) -> Any:
        task = self._construct(coro, **kwargs)
        if self.is_on:
            _hide(task, _OWN_FILES)
            self._record(task, kwargs["loop"], sys._getframe(1), False)
        return task

    def _record(
        self, task: Any, loop: asyncio.AbstractEventLoop, frame: FrameType | None, is_new: bool
    ) -> None:
        try:
            if not is_new and is_done(task):
                return  # it was eager, and has ended
            while frame is not None and frame.f_code.co_filename in self._libraries:
                frame = frame.f_back
            creator = _current_task(loop)
            if creator is None:
                number = 0
            else:
                number = (getattr(creator, ATTRIBUTE, None) or record_of(creator)).id
            code, lasti = (None, 0) if frame is None else (frame.f_code, frame.f_lasti)
            known = None if is_new else getattr(task, ATTRIBUTE, None)
            if known is not None:  # it was eager, and has created tasks itself
                known.creator, known.code, known.lasti = number, code, lasti
                return
            record = TaskRecord(number, code, lasti, self.latest_ns)
            try:
                task._asgi_pprof_record = record
            except AttributeError:
                task_records.set(task, record)
        except AttributeError:
            pass  # a factory may return anything, and this is no task
        except Exception:
            self.is_on = False  # from now on ours only delegates
            logger.exception("asgi_pprof failed to record a task, and stops recording")


_current_task = asyncio.current_task


def _hide(task: Any, files: tuple[str, ...]) -> None:
    """Remove our frames from the traceback of its creation that a task has in debug mode."""
    traceback = getattr(task, "_source_traceback", None)
    while traceback and traceback[-1].filename in files:
        del traceback[-1]


_OWN_FILES = (_hide.__code__.co_filename,)
_CREATING_FILES = (*_OWN_FILES, code_filename(asyncio.base_events))


class _NamedTask(Task):
    """A task that keeps its default name."""

    __slots__ = ()

    def set_name(self, name: object) -> None:
        """Give it that name, unless that is None."""
        if name is not None:
            super().set_name(name)


class _Named:
    """Enough of a loop, and of a task, to see how asyncio names what a factory has created."""

    name: object = ""

    def _check_closed(self) -> None:
        pass

    def _task_factory(self, *_: object, **__: object) -> _Named:
        return self

    def set_name(self, name: object) -> None:
        self.name = name


@functools.cache
def _takes_names_away() -> bool:
    # 3.13.0 to 3.13.2 name tasks that a factory has created "None" (cpython#130033).
    named = _Named()
    asyncio.BaseEventLoop.create_task(cast(Any, named), cast(Any, None))
    return named.name is None


_EAGER = getattr(getattr(asyncio, "eager_task_factory", None), "__code__", object())


def _library_files() -> frozenset[str]:
    """Return the files whose functions create tasks for their callers: asyncio's and anyio's."""
    names = ("asyncio.", "anyio.")
    modules = [each for name, each in sys.modules.copy().items() if name.startswith(names)]
    return frozenset(filter(None, map(code_filename, modules)))


task_tracking = TaskTracking()
