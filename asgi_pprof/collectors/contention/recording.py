"""
What the wrappers of primitives report to.

A wrapper belongs to one recording. If something still holds the wrapper when
that recording has ended (a bound method, another library's wrapper around it),
the wrapper stays in place and only delegates.
"""

from __future__ import annotations

from types import FrameType

from asgi_pprof.collectors.contention.records import (
    ContendedStack,
    ContentionRecords,
    weigh_release,
    weigh_wait,
)
from asgi_pprof.collectors.contention.stack_rules import Leaf, rules
from asgi_pprof.collectors.contention.under_way import UnderWay

block = ContentionRecords(weigh_wait)
mutex = ContentionRecords(weigh_release)


class Recording:
    """
    One period in which contention is recorded.

    Wrappers call its methods in the application's path: they never raise and
    never wait.
    """

    __slots__ = ("on", "under_way")

    def __init__(self, on: bool = True) -> None:
        self.on = on
        self.under_way = UnderWay(self, self.add_captured)

    def end(self) -> None:
        """Record nothing from now on."""
        self.on = False
        self.under_way.end()

    def add_wait(self, nanoseconds: int, leaf: Leaf, wrapper: FrameType) -> None:
        """Record that the caller of a wrapped method has waited."""
        try:
            if self.on and (weight := block.weigh(nanoseconds)):
                stack = rules.waiting_stack(leaf, wrapper)
                if stack is not None:
                    block.add(stack, weight)
        except Exception:
            block.lost += 1

    def add_captured(self, nanoseconds: int, stack: ContendedStack) -> None:
        """Record a wait whose stack was captured before it ended."""
        try:
            if self.on and (weight := block.weigh(nanoseconds)):
                block.add(stack, weight)
        except Exception:
            block.lost += 1

    def add_abandoned(self, nanoseconds: int, stack: ContendedStack | None) -> None:
        """Keep the time of a wait that never ends, if profiles have shown it: none must fall."""
        if self.on and stack is not None and nanoseconds >= block.rate > 0:
            block.add(stack, (0.0, nanoseconds))

    def add_release(self, nanoseconds: int, leaf: Leaf, wrapper: FrameType) -> None:
        """Record that the caller of a wrapped method releases what others have waited for."""
        try:
            if self.on and (weight := mutex.weigh(nanoseconds)):
                stack = rules.calling_stack(leaf, wrapper)
                if stack is not None:
                    mutex.add(stack, weight)
        except Exception:
            mutex.lost += 1
