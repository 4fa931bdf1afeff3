"""
Worker threads: what each runs, and for which future; how busy their pools are.

Two kinds are known: those of `concurrent.futures.ThreadPoolExecutor` (so
`run_in_executor` and `asyncio.to_thread`) and anyio's (so every `def` endpoint
of FastAPI). A thread is one of them by a frame of theirs on its stack; the
frame's local variables name the future it works for. Looking costs about 0.1 us
a frame of all threads, with the GIL held, on request only.

Source: CPython, Lib/concurrent/futures/thread.py; anyio, _backends/_asyncio.py.
"""

from __future__ import annotations

import concurrent.futures.thread
import functools
import gc
import re
import sys
import threading
from collections.abc import Callable
from contextvars import Context
from types import BuiltinFunctionType, CodeType, FrameType
from typing import Any, NamedTuple, cast

from asgi_pprof.collectors.loops import frame_local
from asgi_pprof.stacks import RawStack

_RUN_ITEM = concurrent.futures.thread._WorkItem.run.__code__
_NUMBER = re.compile(r"[-_]?\d*$")


class Work(NamedTuple):
    """
    What a worker thread does.

    Args:
        thread: The thread's name.
        stack: Its frames above the pool's own; () if it is in a C function.
        function: The name of the function it was given, "" if that has none.
        future: What it works for: an asyncio future, or a concurrent one.
    """

    thread: str
    stack: RawStack
    function: str
    future: object


class Pool(NamedTuple):
    """
    A pool of worker threads.

    Args:
        name: What its threads are called, without their numbers.
        busy: Threads that work.
        size: Threads there may be.
        queued: Work that waits for a thread.
    """

    name: str
    busy: int
    size: int
    queued: int


class Workers:
    """
    The worker threads of one moment, and the executors they belong to.

    Args:
        current_frames: Test seam for `sys._current_frames`.
    """

    def __init__(
        self, current_frames: Callable[[], dict[int, FrameType]] = sys._current_frames
    ) -> None:
        self._work: dict[int, Work] = {}
        busy = set()
        run = _anyio_run()
        threads = {thread.ident: thread for thread in threading.enumerate()}
        for ident, frame in current_frames().items():
            thread = threads.get(ident)
            work = _work(frame, run, thread.name) if thread else None
            if work is not None:
                busy.add(thread)
                self._work[id(work.future)] = work
        self.pools: list[Pool] = []
        """The executors that have threads. anyio has limiters in their place."""
        self._queued: dict[int, tuple[object, Pool]] = {}
        for queue, members in _executors():
            self._add_pool(queue, members, len(busy.intersection(members)))

    def _add_pool(self, queue: object, members: list[threading.Thread], busy: int) -> None:
        waiting = _queued_futures(queue)
        name = _NUMBER.sub("", members[0].name) or members[0].name
        pool = Pool(name, busy, _size(members), len(waiting))
        self.pools.append(pool)
        for future in waiting:
            self._queued[id(future)] = future, pool

    def working_for(self, future: object) -> Work | None:
        """Return what a thread does for an asyncio or a concurrent future, None if none does."""
        return self._work.get(id(future))  # by identity: the work keeps it alive

    def queued_in(self, future: object) -> Pool | None:
        """Return the executor in whose queue a concurrent future's work is, None if in none."""
        _, pool = self._queued.get(id(future), (None, None))
        return pool


def _work(frame: FrameType | None, anyio_run: CodeType | None, thread: str) -> Work | None:
    stack: list[tuple[CodeType, int]] = []
    while frame is not None:
        code = frame.f_code
        if code is _RUN_ITEM:
            item = frame_local(frame, "self")
            future = getattr(item, "future", None)
            # 3.14 keeps function and arguments together.
            task = getattr(item, "task", None) or (getattr(item, "fn", None), ())
            function, arguments = task[0], getattr(item, "args", task[1])
            # From 3.14 on another of the pool's frames stands between.
            if stack and stack[-1][0].co_filename == code.co_filename:
                stack.pop()
            break
        if code is anyio_run:
            future = frame_local(frame, "future")
            function, arguments = frame_local(frame, "func"), frame_local(frame, "args", ())
            break
        stack.append((code, frame.f_lasti))
        frame = frame.f_back
    else:
        return None
    if future is None:
        return None  # idle
    return Work(thread, tuple(stack), _name(function, arguments), future)


def _anyio_run() -> CodeType | None:
    module = sys.modules.get("anyio._backends._asyncio")
    run = getattr(getattr(module, "WorkerThread", None), "run", None)
    return getattr(run, "__code__", None)


def _name(function: Any, arguments: Any) -> str:
    """Return what is called in the end: pools get it inside partials and `Context.run`."""
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


def _executors() -> list[tuple[object, list[threading.Thread]]]:
    """Return the queue and the threads of every ThreadPoolExecutor that has any."""
    queues: dict[int, tuple[object, list[threading.Thread]]] = {}
    for reference, queue in list(cast(Any, concurrent.futures.thread._threads_queues).data.items()):
        thread = reference()
        if thread is not None and thread.is_alive():
            queues.setdefault(id(queue), (queue, []))[1].append(thread)
    return list(queues.values())


def _queued_futures(queue: object) -> list[object]:
    # The queue cannot be looked into; what it holds is asked of the garbage
    # collector's view: before 3.13 a list, later the items themselves.
    held = gc.get_referents(queue)
    items = [*held, *(item for each in held if type(each) is list for item in each)]
    return [item.future for item in items if type(item) is concurrent.futures.thread._WorkItem]


def _size(members: list[threading.Thread]) -> int:
    # A worker's first argument is a weak reference to its executor.
    arguments = getattr(members[0], "_args", ())
    executor = arguments[0]() if arguments else None
    size: int = getattr(executor, "_max_workers", len(members))
    return size
