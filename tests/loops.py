"""Event loops of both kinds: run a coroutine on one, and wait inside it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import TypeVar

import uvloop

T = TypeVar("T")

LOOPS = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}


def run(main: Coroutine[object, object, T], loop_name: str = "asyncio", debug=None) -> T:
    """Run a coroutine on a new loop of that kind, and return its result."""
    with asyncio.Runner(loop_factory=LOOPS[loop_name], debug=debug) as runner:
        return runner.run(main)


async def iterations(count: int = 20) -> None:
    """Wait for that many iterations of the running loop."""
    for _ in range(count):
        await asyncio.sleep(0)


async def until(condition: Callable[[], T], seconds: float = 20) -> T:
    """Let the loop run until the condition is true; return its value, fail if it stays false."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "the condition stayed false"
        await asyncio.sleep(0.002)
    return found
