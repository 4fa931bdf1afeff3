"""Long work on an event loop, divided into slices; the loop's other work runs in between."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import anyio

_IDLE_S = 0.0002  # an iteration with nothing else to do is shorter
_OTHERS = 3  # times the slice is for other work
# A thread that waits for the GIL gets it while the loop waits for events. A wait of 0 ends
# before the thread has woken, and so the thread would only get it every 5 ms.
_PAUSE_S = 0.001


class Slices:
    """
    The slices of one piece of work; the first begins now.

        slices = Slices(0.001)
        for each in many:
            ...
            if slices.is_over():
                await slices.yield_to_loop()

    Args:
        slice_s: How many seconds of work may pass before the loop's other work runs.
        clock: Test seam for `time.perf_counter`.
    """

    def __init__(self, slice_s: float, clock: Callable[[], float] = time.perf_counter) -> None:
        self._slice_s = slice_s
        self._clock = clock
        self.begin()

    def begin(self) -> None:
        """Begin a slice now."""
        self._end = self._clock() + self._slice_s

    def is_over(self) -> bool:
        """Return whether the slice has been used up."""
        return self._clock() > self._end

    async def yield_to_loop(self) -> None:
        """
        Let the loop do other work, then begin the next slice.

        While the loop has work it gets up to three times the slice. With one iteration
        after each slice, requests that take many iterations would all be held up. When it
        has none it waits for a millisecond, in which other threads get the GIL.
        """
        start = now = self._clock()
        while now - start <= _OTHERS * self._slice_s:
            await _sleep(0)
            before, now = now, self._clock()
            if now - before < _IDLE_S:
                await _sleep(_PAUSE_S)
                break
        self.begin()


async def _sleep(seconds: float) -> None:
    if asyncio._get_running_loop() is not None:
        await asyncio.sleep(seconds)
    else:
        await anyio.sleep(seconds)
