"""
Worker threads: what each runs, for which future, and how busy their pools are.

What is measured: the threads of `concurrent.futures.ThreadPoolExecutor` (so
`run_in_executor` and `asyncio.to_thread`) and anyio's (so every `def` endpoint
of FastAPI). In place of pools anyio has limiters: each loop's default one, and
those that are passed with the work.

How: a worker thread has a frame of its pool on its stack; that frame's local
variables name the future it works for.

What it costs: about 0.1 us a frame of all threads, and 2 ms for 100,000 pieces
of queued work, with the GIL held, on request only.

What it misses: a task that waits for a thread is known if it awaits the queued
work itself, or through functions of asyncio such as `gather`, `shield` and `wait`;
of each queue only the first ten are read.

Source: CPython, Lib/concurrent/futures/thread.py, Modules/_queuemodule.c;
anyio, _backends/_asyncio.py, lowlevel.py.
"""

from __future__ import annotations

import asyncio
import concurrent.futures.thread
import functools
import gc
import itertools
import operator
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from contextvars import Context
from types import BuiltinFunctionType, CodeType, FunctionType
from typing import Any, NamedTuple, cast

from asgi_pprof.runtime.chains import await_chain
from asgi_pprof.runtime.frames import (
    CurrentFrames,
    LocalsOf,
    RawStack,
    ThreadStack,
    current_frames,
    generator_local,
    is_generator,
)
from asgi_pprof.runtime.tasks import coroutine_of, loop_of
from asgi_pprof.runtime.threads import known_threads

Task = asyncio.Task[Any]

_WorkItem = concurrent.futures.thread._WorkItem
_RUN_ITEM = _WorkItem.run.__code__
_NUMBER = re.compile(r"[-_]?\d*$")
_FIRST = 10  # of each queue; work is done in the order in which it was queued


class Work(NamedTuple):
    """
    What a worker thread does.

    Args:
        thread: The thread's name.
        stack: Its frames above the pool's own; () if it is in a C function.
        function: The name of the function that was submitted, "" if that has none.
        future: The future of this work: asyncio's or a concurrent one.
    """

    thread: str
    stack: RawStack
    function: str
    future: object


class Pool(NamedTuple):
    """
    A pool of worker threads.

    Args:
        name: The name of its threads without their numbers.
        busy: How many threads work.
        size: How many threads there may be; for a limiter it can be infinite.
        queued: How much work waits for a thread.
    """

    name: str
    busy: int
    size: float
    queued: int


class Workers:
    """
    The worker threads at one moment, and the executors they belong to.

    Args:
        current_frames: Test seam for `frames.current_frames`.
    """

    def __init__(self, current_frames: CurrentFrames = current_frames) -> None:
        self._work: dict[int, Work] = {}
        busy: set[threading.Thread] = set()
        wanted = _wanted()
        threads = known_threads()
        for ident, stack in current_frames(locals_of=wanted).items():
            thread = threads.get(ident)
            work = _work(stack, thread.name) if thread else None
            if thread is not None and work is not None:
                busy.add(thread.thread)
                self._work[id(work.future)] = work
        self._executors = [
            _executor(queue, members, busy) for queue, members in _threads_by_queue()
        ]

    @property
    def pools(self) -> list[Pool]:
        """The executors that have threads; anyio has limiters instead."""
        return [pool for pool, _ in self._executors]

    def waiting(self) -> Iterator[tuple[Pool, list[Task]]]:
        """Yield each of `pools` with the tasks that wait for the first of its queued work."""
        for pool, items in self._executors:
            first = itertools.islice(_work_items(items), _FIRST)
            yield pool, [task for item in first for task in _tasks_for(item.future)]

    def limited(self) -> Iterator[tuple[asyncio.AbstractEventLoop, Any] | None]:
        """
        Yield, for each working thread, the loop and the limiter that was passed with its work.

        None if none was passed: then it is the loop's default. Each takes up to
        50 us, so the caller should yield to the loop in between.
        """
        run_sync = _anyio_run_sync()
        for work in self._work.values():
            tasks = list(tasks_woken_by(work.future)) if run_sync else []
            limiter = _limiter_of(tasks[0], run_sync) if tasks else None
            loop = loop_of(tasks[0]) if limiter is not None else None
            yield None if loop is None else (loop, limiter)

    def working_for(self, future: object) -> Work | None:
        """Return a thread's work for an asyncio or concurrent future, None if there is none."""
        return self._work.get(id(future))  # by identity: the work keeps it alive

    def queued_in(self, future: object) -> Pool | None:
        """Return the executor in whose queue a concurrent future's work is, None if in none."""
        _, pool = self._queued.get(id(future), (None, None))
        return pool

    @functools.cached_property
    def _queued(self) -> dict[int, tuple[object, Pool]]:
        return {
            id(item.future): (item.future, pool)
            for pool, items in self._executors
            for item in _work_items(items)
        }


def default_limiter(loop: asyncio.AbstractEventLoop) -> Any:
    """Return the limiter of the threads that anyio starts for a loop, None if there are none."""
    run_vars = getattr(sys.modules.get("anyio.lowlevel"), "_run_vars", {})
    with suppress(TypeError):  # a foreign loop that cannot be referenced weakly
        for variable, value in dict(run_vars.get(loop, {})).items():
            # A `RunVar`, or in anyio's older versions its name.
            if getattr(variable, "_name", variable) == "_default_thread_limiter":
                return value if _is_limiter(value) else None
    return None


def limiter_pool(name: str, limiter: Any) -> tuple[Pool, list[Task]]:
    """Return anyio's limiter as a pool of that name, and the first ten tasks that wait for it."""
    statistics = limiter.statistics()
    pool = Pool(name, statistics.borrowed_tokens, statistics.total_tokens, statistics.tasks_waiting)
    # A limiter that was created outside of any loop wraps another.
    limiter = getattr(limiter, "_internal_limiter", None) or limiter
    queue = list(getattr(limiter, "_wait_queue", ()))  # in one go: another thread's loop changes it
    return pool, [each for each in queue[:_FIRST] if isinstance(each, asyncio.Task)]


def _limiter_of(task: Task, run_sync: CodeType | None) -> Any:
    for awaitable, code, _ in await_chain(coroutine_of(task)):
        if code is not None and code is run_sync and is_generator(awaitable):
            limiter = generator_local(awaitable, "limiter")
            return limiter if _is_limiter(limiter) else None
    return None


def _is_limiter(value: object) -> bool:
    kind = getattr(sys.modules.get("anyio"), "CapacityLimiter", None)
    return kind is not None and issubclass(type(value), kind)


def _wanted() -> LocalsOf:
    """Return the code that identifies worker threads, and the variables to read of its frames."""
    run = _anyio_run()
    anyio = () if run is None else ((run, "future", "func", "args"),)
    return ((_RUN_ITEM, "self"), *anyio)


def _work(thread_stack: ThreadStack, thread: str) -> Work | None:
    if thread_stack.found < 0:
        return None
    stack = thread_stack.places()[: thread_stack.found]
    item = thread_stack.local("self")
    if item is not None:
        future = getattr(item, "future", None)
        # 3.14 keeps function and arguments together.
        task = getattr(item, "task", None) or (getattr(item, "fn", None), ())
        function, arguments = task[0], getattr(item, "args", task[1])
        # From 3.14 on another of the pool's frames stands between.
        if stack and stack[-1][0].co_filename == _RUN_ITEM.co_filename:
            stack = stack[:-1]
    else:
        future = thread_stack.local("future")
        function, arguments = thread_stack.local("func"), thread_stack.local("args") or ()
    if future is None:
        return None  # idle
    return Work(thread, stack, _name(function, arguments), future)


def _anyio_run() -> CodeType | None:
    module = sys.modules.get("anyio._backends._asyncio")
    run = getattr(getattr(module, "WorkerThread", None), "run", None)
    return getattr(run, "__code__", None)


def _name(function: Any, arguments: Any) -> str:
    """Return the name of the function inside partials and `Context.run`, which pools are given."""
    while True:
        if type(function) is functools.partial:
            function, arguments = function.func, (*function.args, *arguments)
        elif (
            type(function) is BuiltinFunctionType
            and type(function.__self__) is Context
            and arguments
        ):
            function, arguments = arguments[0], arguments[1:]
        else:
            break
    name = getattr(function, "__qualname__", None)
    module = getattr(function, "__module__", None)
    if type(name) is not str:
        return ""
    return f"{module}.{name}" if type(module) is str else name


def _anyio_run_sync() -> CodeType | None:
    module = sys.modules.get("anyio._backends._asyncio")
    backend = getattr(module, "AsyncIOBackend", module)  # a function of the module in anyio 3
    run_sync = getattr(backend, "run_sync_in_worker_thread", None)
    return getattr(run_sync, "__code__", None)


def _threads_by_queue() -> list[tuple[object, list[threading.Thread]]]:
    """Return the queue and the threads of every ThreadPoolExecutor that has any."""
    queues: dict[int, tuple[object, list[threading.Thread]]] = {}
    known = cast(Any, concurrent.futures.thread._threads_queues).data
    for reference, queue in known.copy().items():  # other threads start workers meanwhile
        thread = reference()
        if thread is not None and thread.is_alive():
            queues.setdefault(id(queue), (queue, []))[1].append(thread)
    return list(queues.values())


def _executor(
    queue: object, members: list[threading.Thread], busy: set[threading.Thread]
) -> tuple[Pool, list[object]]:
    items = _items(queue)
    name = _NUMBER.sub("", members[0].name) or members[0].name
    # Counted by C functions: a queue may hold a hundred thousand items.
    queued = operator.countOf(map(type, items), _WorkItem)
    return Pool(name, len(busy.intersection(members)), _size(members), queued), items


def _items(queue: object) -> list[object]:
    # A queue does not show its items, except to the garbage collector: before 3.13 a
    # list of them, later the items themselves. Both are in the order of the queue.
    held = gc.get_referents(queue)
    if sys.version_info < (3, 13):
        return next((list(each) for each in held if type(each) is list), [])
    return held


def _work_items(items: list[object]) -> Iterator[Any]:
    return (item for item in items if type(item) is _WorkItem)


def _tasks_for(future: concurrent.futures.Future[Any]) -> Iterator[Task]:
    """Yield the tasks that wait for a concurrent future, through asyncio futures chained to it."""
    for callback in list(getattr(future, "_done_callbacks", ())):
        for cell in getattr(callback, "__closure__", None) or ():
            with suppress(ValueError):  # an empty cell
                if isinstance(cell.cell_contents, asyncio.Future):
                    yield from tasks_woken_by(cell.cell_contents)


def tasks_woken_by(future: Any) -> Iterator[Task]:
    """Yield the tasks that an asyncio future will wake, itself or through another of asyncio's."""
    for callback, *_ in getattr(future, "_callbacks", None) or ():
        task = getattr(callback, "__self__", None)
        if isinstance(task, asyncio.Task):
            yield task
        elif (outer := _completed_by(callback)) is not None:
            yield from tasks_woken_by(outer)


_ASYNCIO_TASKS = asyncio.wait_for.__code__.co_filename


def _completed_by(callback: Any) -> object:
    """Return the future that a callback of shield, gather, wait, or 3.11's wait_for completes."""
    completed: object = None
    if type(callback) is functools.partial and callback.args:
        completed = callback.args[0]
    elif type(callback) is FunctionType and callback.__code__.co_filename == _ASYNCIO_TASKS:
        cells = zip(callback.__code__.co_freevars, callback.__closure__ or (), strict=True)
        cell = next((cell for name, cell in cells if name in ("outer", "waiter")), None)
        with suppress(ValueError):  # an empty cell
            completed = cell and cell.cell_contents
    return completed if isinstance(completed, asyncio.Future) else None


def _size(members: list[threading.Thread]) -> int:
    # A worker's first argument is a weak reference to its executor.
    arguments = getattr(members[0], "_args", ())
    executor = arguments[0]() if arguments else None
    size: int = getattr(executor, "_max_workers", len(members))
    return size
