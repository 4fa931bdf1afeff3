"""
Slow work off the event loop, on a short-lived thread of our own.

Not on the loop's default executor and not on anyio's pool: when those are
exhausted is just when somebody asks for a profile.
"""

from __future__ import annotations

import _thread
import asyncio
import math
import threading
import time
from collections.abc import Callable
from typing import TypeVar

_Result = TypeVar("_Result")

_HOLD_GIL_S = 0.0005
_PAUSE_S = 0.0001  # a sleep of 0 is over before the waiting thread has woken


class _GilHold(threading.local):
    ends = math.inf  # on threads that are not ours


_gil_hold = _GilHold()


def yield_gil() -> None:
    """
    Release the GIL for a moment if this is a thread of ours that has held it for 0.5 ms.

    Called in every loop over samples; costs about 0.1 us. A thread that waits
    for CPython to take the GIL away delays the event loop by 5 ms each time.
    """
    if time.perf_counter() > _gil_hold.ends:
        time.sleep(_PAUSE_S)
        _gil_hold.ends = time.perf_counter() + _HOLD_GIL_S


async def run_in_thread(function: Callable[[], _Result]) -> _Result:
    """
    Return what the function returns, run on a new thread that ends with it.

    Cancelling the caller does not stop the function. If no thread can be
    started the function runs here, on the loop: late is better than nothing.
    """
    loop = asyncio.get_running_loop()
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
        _gil_hold.ends = 0
        try:
            result = function()
        except BaseException as raised:
            error = raised
        try:
            loop.call_soon_threadsafe(deliver, result, error)
        except RuntimeError:
            pass  # the loop was closed meanwhile: nobody waits any more

    try:
        # Not threading.Thread: applications patch and count those, as we do.
        _thread.start_new_thread(work, ())
    except RuntimeError:
        return function()
    return await future
