"""
Runs slow work on a new thread, off the event loop.

Not on the loop's default executor or in anyio's pool: profiles are wanted most when
those are exhausted.
"""

from __future__ import annotations

import _thread
import asyncio
import math
import threading
import time
from collections.abc import Callable
from typing import TypeVar

import anyio
import anyio.to_thread

_Result = TypeVar("_Result")

_HOLD_GIL_S = 0.0005
_PAUSE_S = 0.0001  # a sleep of 0 ends before the waiting thread has woken


class _CallerGone(BaseException):
    """Ends work whose caller has been cancelled."""


class _GilHold(threading.local):
    ends = math.inf  # on threads that `run_in_thread` did not start
    is_wanted: Callable[[], bool]  # whether anybody waits for the result


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


async def run_in_thread(function: Callable[[], _Result]) -> _Result:
    """
    Run a function on a new thread; return its result.

    Cancelling the caller stops the function where it calls `yield_gil`. If no thread
    can be started, the function runs here and blocks the loop: a slow answer is
    better than none. On another library's loop anyio starts the thread.
    """
    loop = asyncio._get_running_loop()
    if loop is None:
        return await anyio.to_thread.run_sync(function, limiter=anyio.CapacityLimiter(1))
    future: asyncio.Future[_Result] = loop.create_future()

    def deliver(result: _Result | None, error: BaseException | None) -> None:
        if future.cancelled():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)  # type: ignore[arg-type]  # None only with an error

    def work() -> None:
        result, error = None, None
        _gil_hold.ends, _gil_hold.is_wanted = 0, lambda: not future.cancelled()
        try:
            result = function()
        except BaseException as raised:
            error = raised
        try:
            loop.call_soon_threadsafe(deliver, result, error)
        except RuntimeError:
            pass  # the loop has been closed, and with it the caller

    try:
        # Not threading.Thread: applications patch and count those, as `threadcreate` does.
        _thread.start_new_thread(work, ())
    except RuntimeError:
        return function()
    return await future
