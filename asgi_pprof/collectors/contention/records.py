"""
How often and how long, by stack: what the block and mutex profiles add up.

An event is put on a queue, which is one step that nothing can interrupt; the
queue is added up by whoever finds it long, unless somebody does so already. So
nobody ever waits here: not a thread, not a signal handler or finalizer that
runs in the middle of it, and not a child that was forked in the middle of it.

Source: runtime/mprof.go, blocksampled and saveBlockEventStack.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from random import Random

from asgi_pprof.profile import pseudo_location
from asgi_pprof.stacks import StackCounter, StackKey, StackTotal

MAX_STACKS = 4096  # different ones; about 3 KiB each at 30 frames
OTHERS = pseudo_location("other stacks")

_BATCH = 64  # events added up at once, in well under a millisecond
_MAX_WAITING = 65_536  # events; more only if nobody can add them up

Weight = tuple[float, int]
"""How many contentions an event stands for, and how many nanoseconds."""

Contended = tuple[str, StackKey]
"""The name of a pseudo-frame at the leaf, or "", and the stack below it."""


def weigh_wait(waited_ns: int, rate_ns: int, random: Callable[[], float]) -> Weight | None:
    """
    Return what a wait counts for in the block profile, None if it is not sampled.

    One that is as long as the rate is always sampled. A shorter one is so with
    the chance waited/rate, and then stands for as many as it takes to make
    the rate: on average, count and sum are right.
    """
    if rate_ns <= 0:
        return None
    waited_ns = max(waited_ns, 1)
    if waited_ns >= rate_ns:
        return 1.0, waited_ns
    if random() * rate_ns >= waited_ns:
        return None
    return rate_ns / waited_ns, rate_ns


def weigh_release(caused_ns: int, fraction: int, random: Callable[[], float]) -> Weight | None:
    """Return what a release counts for in the mutex profile: n times, for one in n of them."""
    if fraction <= 0 or (fraction > 1 and random() * fraction >= 1):
        return None
    return float(fraction), max(caused_ns, 0) * fraction


class ContentionRecords:
    """
    The totals of one profile, for the life of the process, and what is sampled.

    Args:
        weigh: Which events are sampled, and what they stand for.
        random: Test seam.
    """

    def __init__(
        self,
        weigh: Callable[[int, int, Callable[[], float]], Weight | None],
        random: Callable[[], float] | None = None,
    ) -> None:
        self.rate = 0
        self._weigh = weigh
        # Of our own: the application's sequence, which may be seeded, stays what it is.
        self._random = random or Random().random
        self.forget()

    def forget(self) -> None:
        """Begin anew, as in a forked child: its parent's events are not its own."""
        self._events: deque[tuple[Contended, Weight]] = deque()
        self._adding_up = threading.Lock()
        self._counter = StackCounter(OTHERS, MAX_STACKS)
        self.lost = 0

    def weigh(self, nanoseconds: int) -> Weight | None:
        """Draw, and return what an event of that length stands for; None if nothing."""
        return self._weigh(nanoseconds, self.rate, self._random)

    def add(self, contended: Contended, weight: Weight) -> None:
        """Add an event; from any thread, at any moment, without waiting."""
        if len(self._events) >= _MAX_WAITING:
            self.lost += 1
            return
        self._events.append((contended, weight))
        if len(self._events) >= _BATCH:
            self._add_up()

    def _add_up(self) -> None:
        if not self._adding_up.acquire(blocking=False):
            return
        try:
            while self._events:
                (leaf, stack), weight = self._events.popleft()
                self._counter.add(stack, weight, leaf=pseudo_location(leaf) if leaf else None)
        finally:
            self._adding_up.release()

    @property
    def overflowed(self) -> bool:
        """Whether there are events of more stacks than have totals of their own."""
        return self._counter.overflowed > 0

    def count(self) -> int:
        """Return how many stacks there are."""
        self._add_up()
        return len(self._counter)

    def totals(self) -> list[StackTotal]:
        """Return contentions and nanoseconds by stack."""
        self._add_up()
        return self._counter.totals()
