"""Long work yields to the loop between its slices."""

from __future__ import annotations

import asyncio

import pytest

from asgi_pprof.slices import Slices
from tests.loops import run

pytestmark = pytest.mark.once


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def iterations_given(others_s: float) -> int:
    """Return how often the loop iterates after a slice of 4 ms, if each iteration takes so long."""

    async def main():
        clock, count = Clock(), 0

        async def others():
            nonlocal count
            while True:
                clock.now += others_s
                count += 1
                await asyncio.sleep(0)

        slices = Slices(0.004, clock)
        clock.now += 0.003
        assert not slices.is_over()
        clock.now += 0.002
        assert slices.is_over()
        task = asyncio.create_task(others())
        await slices.yield_to_loop()
        assert not slices.is_over()
        task.cancel()
        return count

    return run(main())


def test_an_idle_loop_waits_so_that_threads_get_the_gil():
    """A wait of 0 returns before a thread that waits for the GIL has woken."""
    timeouts = []

    async def main():
        selector = asyncio.get_running_loop()._selector
        select = selector.select
        selector.select = lambda timeout: timeouts.append(timeout) or select(timeout)
        try:
            await Slices(0.004, Clock()).yield_to_loop()
        finally:
            selector.select = select

    asyncio.run(main())
    assert timeouts[0] == 0
    assert 0 < max(timeouts) <= 0.001


def test_a_busy_loop_has_three_times_the_slice():
    """The loop gets as many iterations as fit into that time, so no task waits for many slices."""
    assert iterations_given(0.001) in (12, 13)
    assert iterations_given(0.005) == 3
    assert iterations_given(0.1) == 1
