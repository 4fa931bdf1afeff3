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

_TURN_S = 0.0005
_PAUSE_S = 0.0001  # a sleep of 0 is over before the waiting thread has woken


class _Turn(threading.local):
    ends = math.inf  # on threads that are not ours


_turn = _Turn()


def give_way() -> None:
    """
    Let other threads have the GIL, if this is one of ours and has had its turn.

    To be called in every loop over samples, about 0.1 us: who only waits for
    CPython to take the GIL away holds up the event loop for 5 ms each time.
    """
    if time.perf_counter() > _turn.ends:
        time.sleep(_PAUSE_S)
        _turn.ends = time.perf_counter() + _TURN_S


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
        _turn.ends = 0
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
