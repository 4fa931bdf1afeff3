"""
What is noted of tasks: a number, who made them, and since when they wait.

A note is an attribute of the task itself, so it costs no table and goes when
the task goes. Numbers are small, stable and never used again. Who made a task
is known where the loop's task factory is ours (`task_tracking`): measured
1.1 us a task on CPython 3.11, and a note of about 150 bytes. Since when a task
waits is learned by looking every 15 s, in slices of 1 ms, and whenever a
profile is taken: waiting is told 15 s too short at most, never too long.

Source: runtime/proc.go, newproc1 (goid, gopc, parentGoid); CPython,
Lib/asyncio/base_events.py, create_task.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import importlib
import logging
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, cast

from asgi_pprof.runtime.task_notes import ATTRIBUTE, Note, keep_note, note_of
from asgi_pprof.runtime.tasks import Task, TaskList, alive, waits_for

logger = logging.getLogger("asgi_pprof")

LOOK_S = 15.0
_SLICE_S = 0.001

_Factory = Callable[..., Any]


class TaskTracking:
    """
    Notes who makes tasks, and since when they wait, on the loops it is attached to.

    One for the process; loops count their users.

    Args:
        look_s: Seconds from one look to the next.
        clock: Test seam for `time.monotonic_ns`, by which waiting is told.
    """

    def __init__(
        self, look_s: float = LOOK_S, clock: Callable[[], int] = time.monotonic_ns
    ) -> None:
        self._look_s = look_s
        self._clock = clock
        self._tasks = TaskList()
        self._has_failed = False
        self._tracked: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Tracked] = (
            weakref.WeakKeyDictionary()
        )

    def attach(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begin to note on the running loop; pair with `detach`."""
        tracked = self._tracked.get(loop)
        if tracked is None:
            tracked = self._tracked[loop] = _Tracked(loop)
            tracked.look_later(self._look_s, self._look)
        tracked.users += 1

    def detach(self, loop: asyncio.AbstractEventLoop) -> None:
        """Put the loop's own task factory back, once nobody needs ours; from any thread."""
        tracked = self._tracked.get(loop)
        if tracked is None:
            return
        tracked.users -= 1
        if not tracked.users:
            del self._tracked[loop]
            tracked.end()

    def look(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begin to look at the tasks now, on a running loop it is attached to."""
        tracked = self._tracked[loop]
        tracked.cancel_look()
        self._look(tracked)

    def is_looking(self, loop: asyncio.AbstractEventLoop) -> bool:
        """Tell whether a look is in the middle of its slices."""
        return self._tracked[loop].is_looking

    def _look(self, tracked: _Tracked, tasks: Iterator[Task] | None = None) -> None:
        try:
            if tasks is None:
                tasks = alive(self._tasks.tasks())
            slice_end, now_ns = time.perf_counter() + _SLICE_S, self._clock()
            for task in tasks:
                note_of(task).look(waits_for(task), now_ns)
                if time.perf_counter() > slice_end:
                    tracked.look_on(self._look, tasks)
                    return
        except Exception:  # of a task of the application's own kind
            if not self._has_failed:
                logger.exception("asgi_pprof failed to look at a task; this is logged once")
            self._has_failed = True
        tracked.look_later(self._look_s, self._look)


class _Tracked:
    """One loop that is tracked: its factory before ours, and the next look."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.users = 0
        self.on = True
        self.is_looking = False
        # Weakly: what is kept by the loop it is a key of would never be let go.
        self._loop = weakref.ref(loop)
        # As well: a handle refers to its loop. While it is scheduled the loop has it.
        self._next_look: Callable[[], asyncio.Handle | None] = lambda: None
        self._before = loop.get_task_factory()
        self._ours = _noting(self._before, self)
        loop.set_task_factory(self._ours)

    def look_later(self, delay_s: float, look: Callable[[_Tracked], None]) -> None:
        loop, self.is_looking = self._loop(), False
        if self.on and loop is not None:
            self._next_look = weakref.ref(loop.call_later(delay_s, look, self))

    def look_on(self, look: Callable[..., None], tasks: Iterator[Task]) -> None:
        loop, self.is_looking = self._loop(), True
        if self.on and loop is not None:
            self._next_look = weakref.ref(loop.call_soon(look, self, tasks))

    def cancel_look(self) -> None:
        handle = self._next_look()
        if handle is not None:
            handle.cancel()

    def end(self) -> None:
        self.on = False
        loop = self._loop()
        if loop is None:
            return
        # Whoever has put a factory around ours keeps it; it then only passes on.
        if loop.get_task_factory() is self._ours:
            loop.set_task_factory(self._before)
        if asyncio._get_running_loop() is loop or not loop.is_running():
            self.cancel_look()
        else:
            with contextlib.suppress(RuntimeError):  # closed meanwhile
                loop.call_soon_threadsafe(self.cancel_look)


def _noting(before: Any, tracked: _Tracked) -> Any:
    """Return a task factory that notes who makes tasks, around the one there was."""
    libraries = _library_files()
    current_task, getframe = asyncio.current_task, sys._getframe

    def note_creation(
        task: Any, loop: asyncio.AbstractEventLoop, frame: FrameType | None, is_new: bool
    ) -> None:
        # In the path of every task that is made: no more calls than it takes.
        try:
            if not is_new and task.done():
                return  # eagerly
            while frame is not None and frame.f_code.co_filename in libraries:
                frame = frame.f_back
            maker = current_task(loop)
            if maker is None:
                creator = 0
            else:
                creator = (getattr(maker, ATTRIBUTE, None) or note_of(maker)).id
            code, lasti = (None, 0) if frame is None else (frame.f_code, frame.f_lasti)
            known = None if is_new else getattr(task, ATTRIBUTE, None)
            if known is not None:  # it has begun eagerly, and made tasks itself
                known.creator, known.code, known.lasti = creator, code, lasti
                return
            note = Note(creator, code, lasti)
            try:
                task._asgi_pprof_note = note
            except AttributeError:
                keep_note(task, note)
        except AttributeError:
            pass  # a factory may return what it likes, and this is no task
        except Exception:
            tracked.on = False  # ours only passes on from now
            logger.exception("asgi_pprof failed to note a task, and stops to")

    if getattr(before, "__code__", None) is _EAGER:
        # anyio knows an eager factory by its code, and takes the constructor out of it
        # to start its tasks in the usual way: so ours is one like it.
        construct = before.__closure__[0].cell_contents

        def construct_and_note(coro: Any, **kwargs: Any) -> Any:
            task = construct(coro, **kwargs)
            if tracked.on:
                _hide(task, _OWN_FILES)
                note_creation(task, kwargs["loop"], getframe(1), False)
            return task

        create: Callable[..., Any] = asyncio.create_eager_task_factory  # type: ignore[attr-defined]
        return create(construct_and_note)

    takes_away = _takes_names_away()

    def make_and_note(loop: asyncio.AbstractEventLoop, coro: Any, **kwargs: Any) -> Any:
        if before is not None:
            task = before(loop, coro, **kwargs)
        else:
            kind = _NamedTask if takes_away else asyncio.tasks.Task
            task = cast(Any, kind(coro, loop=loop, **kwargs))
            if task._source_traceback:
                _hide(task, _CREATING_FILES)
        if tracked.on:
            is_new = before is None and "eager_start" not in kwargs
            note_creation(task, loop, getframe(1), is_new)
        return task

    return make_and_note


_OWN_FILES = (__file__,)
_CREATING_FILES = (__file__, asyncio.base_events.__file__)


def _hide(task: Any, files: tuple[str, ...]) -> None:
    """In debug mode, end the traceback of where a task was made as if we were not there."""
    traceback = getattr(task, "_source_traceback", None)
    while traceback and traceback[-1].filename in files:
        del traceback[-1]


class _NamedTask(Task):
    """A task that keeps its default name."""

    __slots__ = ()

    def set_name(self, name: object) -> None:
        """Give it that name, unless that is None."""
        if name is not None:
            super().set_name(name)


class _Named:
    """Enough of a loop, and of a task, to see how asyncio names what a factory has made."""

    name: object = ""

    def _check_closed(self) -> None:
        pass

    def _task_factory(self, *_: object, **__: object) -> _Named:
        return self

    def set_name(self, name: object) -> None:
        self.name = name


@functools.cache
def _takes_names_away() -> bool:
    # 3.13.0 to 3.13.2 name tasks that a factory has made "None" (cpython#130033).
    named = _Named()
    asyncio.BaseEventLoop.create_task(cast(Any, named), cast(Any, None))
    return named.name is None


_EAGER = getattr(getattr(asyncio, "eager_task_factory", None), "__code__", object())


def _library_files() -> frozenset[str]:
    """Return the files that make tasks for others: asyncio's and anyio's."""
    with contextlib.suppress(ImportError):
        importlib.import_module("anyio._backends._asyncio")  # which it loads at its first use
    names = ("asyncio.", "anyio.")
    modules = [each for name, each in sys.modules.copy().items() if name.startswith(names)]
    files = (getattr(module, "__file__", None) for module in modules)
    return frozenset(file for file in files if file)


task_tracking = TaskTracking()
