"""
Runs slow work on threads of its own, off the event loop.

Not on the loop's default executor or in anyio's pool: profiles are wanted most when
those are exhausted.
"""

from __future__ import annotations

import _thread
import asyncio
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import anyio
import anyio.to_thread

from asgi_pprof.forks import Renewed, process_lock
from asgi_pprof.native.core import native
from asgi_pprof.runtime.own_work import begin_own_thread, own_work

_Result = TypeVar("_Result")

_MOST_THREADS = 2
_HOLD_GIL_S = 0.0005
_PAUSE_S = 0.0001  # a sleep of 0 ends before the waiting thread has woken


class _CallerGone(BaseException):
    """Ends work whose caller has been cancelled."""


class _GilHold(threading.local):
    ends = math.inf  # on threads that are not ours
    is_wanted: Callable[[], bool] = bool  # whether anybody waits for the result


_gil_hold = _GilHold()


def yield_gil() -> None:
    """
    Release the GIL for 0.1 ms if a thread of `run_in_thread` has held it for 0.5 ms.

    Every loop over samples calls this, at about 0.1 us a call: a thread that keeps
    the GIL until CPython takes it away delays the event loop by 5 ms each time. It
    also ends the work, by an exception, if its caller has been cancelled.
    """
    if time.perf_counter() > _gil_hold.ends:
        time.sleep(_PAUSE_S)
        _gil_hold.ends = time.perf_counter() + _HOLD_GIL_S
        if not _gil_hold.is_wanted():
            raise _CallerGone


class _Work(Generic[_Result]):
    """A function to run, and the future of its result."""

    def __init__(
        self,
        function: Callable[[], _Result],
        loop: asyncio.AbstractEventLoop,
        future: asyncio.Future[_Result],
    ) -> None:
        self._function = function
        self._loop = loop
        self._future = future

    def is_wanted(self) -> bool:
        """Return whether anybody waits for the result."""
        return not self._future.cancelled()

    def run(self, on_end: Callable[[], None]) -> None:
        """
        Run the function, call `on_end`, and deliver the result.

        The function is called though nobody waits for it any more: it may have to free
        what its caller has begun. It ends where it calls `yield_gil`.
        """
        result, error = None, None
        _gil_hold.ends, _gil_hold.is_wanted = 0, self.is_wanted
        try:
            result = self._function()
        except BaseException as raised:
            error = raised
        _gil_hold.is_wanted = bool
        on_end()
        try:
            self._loop.call_soon_threadsafe(self._deliver, result, error)
        except RuntimeError:
            pass  # the loop has been closed, and with it the caller

    @own_work
    def _deliver(self, result: _Result | None, error: BaseException | None) -> None:
        if self._future.cancelled():
            return
        if error is not None:
            self._future.set_exception(error)
        else:
            self._future.set_result(result)  # type: ignore[arg-type]  # None only with an error


class Workers(Renewed):
    """
    The threads that run slow work, at most two at a time; more work waits.

    The C library gives each thread a part of the heap, and keeps what a thread has
    freed there for the next. With a new thread for each profile a service came to
    hold 15 MB more than it does with one thread that is kept.
    """

    def __init__(self) -> None:
        self._users = 0
        self._threads = 0
        self._busy = 0
        self._waiting: deque[_Work[Any]] = deque()
        self._idle: _thread.LockType | None = None  # held; its release wakes the idle thread
        super().__init__()

    def keep(self) -> None:
        """Keep one thread from now on; pair with `release`."""
        with process_lock():
            self._users += 1

    def release(self) -> None:
        """Without users, threads end when there is no work."""
        with process_lock():
            self._users -= 1
            self._wake()

    def add(self, work: _Work[Any]) -> None:
        """
        Run this work as soon as a thread is free.

        Raises:
            RuntimeError: There is no thread, and none can be started.
        """
        with process_lock():
            self._waiting.append(work)
            self._wake()
            free = self._threads - self._busy
            if len(self._waiting) > free and self._threads < _MOST_THREADS:
                self._start()

    def _start(self) -> None:
        self._threads += 1
        try:
            # Not threading.Thread: applications patch and count those, as `threadcreate` does.
            _thread.start_new_thread(self._run, ())
        except RuntimeError:
            self._threads -= 1
            if not self._threads:
                self._waiting.pop()
                raise

    def _wake(self) -> None:
        if self._idle is not None:
            self._idle.release()
            self._idle = None

    @own_work
    def _run(self) -> None:
        begin_own_thread()
        while (work := self._next()) is not None:
            work.run(self._end_work)
            del work  # with its result, which may be large

    def _end_work(self) -> None:
        with process_lock():
            self._busy -= 1

    def _next(self) -> _Work[Any] | None:
        """Wait for work; None if this thread must end."""
        while True:
            with process_lock():
                if self._waiting:
                    self._busy += 1
                    return self._waiting.popleft()
                # Without the C core this may be a sub-interpreter, which must not end before it.
                if not (self._users and native) or self._idle is not None:
                    self._threads -= 1
                    return None
                wakeup = self._idle = _thread.allocate_lock()
                wakeup.acquire()
            wakeup.acquire()

    def _renew_after_fork(self) -> None:
        # The parent's threads and loops do not exist here.
        self._threads = self._busy = 0
        self._idle = None
        self._waiting.clear()


workers = Workers()


async def run_in_thread(function: Callable[[], _Result]) -> _Result:
    """
    Run a function on another thread; return its result.

    Cancelling the caller stops the function where it calls `yield_gil`. If no thread
    can be started, the function runs here and blocks the loop: a slow answer is
    better than none. On another library's loop anyio starts the thread.
    """
    loop = asyncio._get_running_loop()
    if loop is None:
        return await anyio.to_thread.run_sync(function, limiter=anyio.CapacityLimiter(1))
    future: asyncio.Future[_Result] = loop.create_future()
    try:
        workers.add(_Work(function, loop, future))
    except RuntimeError:
        return function()
    return await future
