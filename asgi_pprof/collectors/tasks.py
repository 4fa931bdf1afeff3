"""
goroutine: every asyncio task and where it waits.

What is measured: one count per task that is not done, of every event loop in
the process, with its whole await chain as the stack (leaf first), the labels of
its context, its name and its state: running, runnable, or waiting.

How: the coroutine's chain of awaits is followed from outside; nothing is
installed, and a task pays nothing until somebody asks. Collecting runs on the
serving loop in slices of 4 ms, with the loop's other work in between.

What it costs: about 20 us a task, on request only. Copying the list of tasks is
not divided: some tens of ms with 100,000 tasks.

What it misses: tasks change between two slices, so the profile is not one
moment. Loops that run in other threads are read while they run; on CPython
3.14 and later a loop is found only if it runs or has served a request, since
the interpreter's own list of tasks is not open to Python.

Source: runtime/pprof, writeGoroutine; CPython, Lib/asyncio/tasks.py.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import re
import sys
import threading
import time
import weakref
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from contextvars import Context
from types import FrameType
from typing import Any, cast

from asgi_pprof.labels import current, resolve
from asgi_pprof.profile import Goroutine, Label, Profile, Sample, Stack, ValueType
from asgi_pprof.stacks import UNKNOWN, Symbols, await_stack, call_stack

_SLICE_S = 0.004
_COUNT_EXACTLY = 5_000
_KIND = ValueType("goroutine", "count")
_DEFAULT_NAME = re.compile(r"Task-(\d+)")

_Task = asyncio.Task[Any]


class TaskCollector:
    """
    The asyncio tasks of this process.

    Args:
        clock: Test seam for `time.perf_counter`, which bounds the slices.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._loops: weakref.WeakSet[asyncio.AbstractEventLoop] = weakref.WeakSet()
        self._ids: weakref.WeakKeyDictionary[_Task, int] = weakref.WeakKeyDictionary()
        self._next_id = itertools.count(1)

    def count(self) -> int:
        """Return the number of tasks that are not done; of very many, those there are at all."""
        entries = self._registered()
        if len(entries) > _COUNT_EXACTLY:
            return len(entries)  # to look at each would hold the loop
        return sum(1 for _ in _alive(entries))

    def note(self) -> str:
        """Return nothing: it is always on."""
        return ""

    def window(self) -> AbstractContextManager[None]:
        """Return a manager that does nothing."""
        return nullcontext()

    async def snapshot(self) -> Callable[[], Profile]:
        """Give goroutine/count: one sample per stack, labels, name and state."""
        # Counted here and now, in the slices: 100,000 samples kept until the end
        # would set off collections of garbage that take longer than any slice.
        counts: Counter[tuple[Stack, tuple[Label, ...]]] = Counter()
        async for goroutine in self.goroutines():
            counts[goroutine.stack, _profile_labels(goroutine)] += 1
        samples = tuple(
            Sample(stack, (count,), labels) for (stack, labels), count in counts.items()
        )
        profile = Profile((_KIND,), samples, _KIND, period=1, time_ns=time.time_ns())
        return lambda: profile

    async def goroutines(self) -> AsyncIterator[Goroutine]:
        """Yield every task, the one that asks first, the others in no order."""
        symbols = Symbols()
        asking = asyncio.current_task()
        assert asking is not None
        yield self._goroutine(asking, symbols)
        slice_end = self._clock() + _SLICE_S
        for task in _alive(self._registered()):
            if self._clock() > slice_end:
                await asyncio.sleep(0)
                slice_end = self._clock() + _SLICE_S
            if task is not asking and not task.done():
                yield self._goroutine(task, symbols)

    def _goroutine(self, task: _Task, symbols: Symbols) -> Goroutine:
        running = asyncio.current_task(task.get_loop()) is task
        state = "running" if running else _state(task)
        stack = _running_stack(task, symbols) if running else ()
        stack = stack or await_stack(task.get_coro(), symbols) or (UNKNOWN,)
        labels = (*resolve(_context_labels(task)), ("task", task.get_name() or "?"))
        if task not in self._ids:
            self._ids[task] = next(self._next_id)
        return Goroutine(self._ids[task], state, stack, tuple(sorted(labels)))

    def _registered(self) -> list[_Task | weakref.ref[_Task]]:
        self._loops.add(asyncio.get_running_loop())
        if sys.version_info >= (3, 14):
            self._loops.update(running_loops())
        return _registered(self._loops)


def _alive(entries: Iterable[_Task | weakref.ref[_Task]]) -> Iterator[_Task]:
    """Yield each task that is not done when its turn comes."""
    seen: set[_Task] = set()
    for entry in entries:
        task = entry() if isinstance(entry, weakref.ref) else entry
        if task is not None and task not in seen and not task.done():
            seen.add(task)
            yield task


def _registered(
    loops: Iterable[asyncio.AbstractEventLoop],
) -> list[_Task | weakref.ref[_Task]]:
    """
    Return all tasks, or references to them, at once and as cheaply as can be.

    Up to 3.13 asyncio registers every task of the process in two sets of its
    module. Later these have only tasks of foreign classes, and the others are
    found by their loop. A set's copy is atomic; a WeakSet's iterator is not.
    """
    entries: list[_Task | weakref.ref[_Task]] = []
    for name in ("_all_tasks", "_scheduled_tasks", "_eager_tasks"):
        registry: Any = getattr(asyncio.tasks, name, set())
        entries += getattr(registry, "data", registry).copy()
    if sys.version_info >= (3, 14):
        for loop in loops:
            entries += asyncio.all_tasks(loop)
    return entries


def running_loops(
    current_frames: Callable[[], dict[int, FrameType]] = sys._current_frames,
) -> set[asyncio.AbstractEventLoop]:
    """
    Return the event loops that other threads run, as their stacks show them.

    asyncio's loop is the `self` of its `run_forever`; any other (uvloop) is
    found where `asyncio.Runner` or the code that called it holds it. For CPython
    3.14 and later: before 3.13 reading a frame's locals keeps them alive, and
    before 3.14 asyncio's registry leads to all loops that have tasks.
    """
    own = threading.get_ident()
    loops: set[asyncio.AbstractEventLoop] = set()
    for ident, frame in current_frames().items():
        if ident != own:
            loops.update(_loops_of(frame))
    return loops


def _loops_of(frame: FrameType | None) -> Iterator[asyncio.AbstractEventLoop]:
    while frame is not None:
        for value in _locals(frame):
            # By type(): isinstance asks the object, which may be a proxy.
            if issubclass(type(value), asyncio.Runner):
                value = getattr(value, "_loop", None)
            if issubclass(type(value), asyncio.AbstractEventLoop):
                yield cast(asyncio.AbstractEventLoop, value)
        frame = frame.f_back


def _locals(frame: FrameType) -> list[object]:
    names = ("self", "loop", "runner", "_loop", "event_loop")
    if not any(name in frame.f_code.co_varnames for name in names):
        return []
    values = frame.f_locals
    return [values.get(name) for name in names]


def age(goroutine: Goroutine) -> tuple[bool, int, int]:
    """Return a sort key: asyncio numbers the tasks it names, the others come as first seen."""
    match = _DEFAULT_NAME.fullmatch(str(dict(goroutine.labels)["task"]))
    return match is None, int(match[1]) if match else 0, goroutine.id


def _state(task: _Task) -> str:
    waiter = getattr(task, "_fut_waiter", None)
    return "runnable" if waiter is None or waiter.done() else "waiting"


def _running_stack(task: _Task, symbols: Symbols) -> Stack:
    """Return the live frames of a running task, down to its outermost coroutine."""
    outermost = getattr(task.get_coro(), "cr_frame", None)
    for frame in sys._current_frames().values():
        inner: FrameType | None = frame
        while inner is not None:
            if inner is outermost:
                return call_stack(frame, symbols, until=outermost)
            inner = inner.f_back
    return ()


def _context_labels(task: _Task) -> Any:
    context = task.get_context() if hasattr(task, "get_context") else _context_311(task)
    return context.get(current) if context is not None else None


def _context_311(task: _Task) -> Context | None:
    # Task.get_context came with 3.12. The C task shows its context only to the
    # garbage collector, before the contexts of its callbacks (_asynciomodule.c,
    # TaskObj_traverse); Python's own keeps it in an attribute.
    context = getattr(task, "_context", None)
    if context is None:
        referents = gc.get_referents(task)
        context = next((each for each in referents if isinstance(each, Context)), None)
    return cast("Context | None", context)


def _profile_labels(goroutine: Goroutine) -> tuple[Label, ...]:
    """Return labels with few values: the numbers of default names would keep equal tasks apart."""
    labels = dict(goroutine.labels)
    if _DEFAULT_NAME.fullmatch(str(labels["task"])):
        labels["task"] = "Task"
    labels["state"] = goroutine.state
    return tuple(sorted(labels.items()))
