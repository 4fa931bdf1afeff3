"""
The totals of the block and mutex profiles: how often and how long, by stack.

`add` puts an event on a queue, which is one atomic step. The thread that finds
the queue long adds its events to the totals, unless another thread is doing
so. So nothing here waits: no thread, no signal handler or finalizer that
interrupts the adding up, and no child that was forked in the middle of it.

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
_MAX_QUEUED = 65_536  # events; reached only if no thread can add them up

Weight = tuple[float, int]
"""How many contentions an event stands for, and how many nanoseconds."""

ContendedStack = tuple[str, StackKey]
"""The name of a pseudo-frame at the leaf, or "", and the stack below it."""


def weigh_wait(waited_ns: int, rate_ns: int, random: Callable[[], float]) -> Weight | None:
    """
    Return the weight of a wait in the block profile, None if it is not sampled.

    A wait of at least `rate_ns` is always sampled. A shorter one is sampled
    with probability waited/rate, and then counts rate/waited times, which adds
    up to `rate_ns`: on average, count and sum are right.
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
    """Return the weight of a release in the mutex profile: one in n is sampled, and counts n."""
    if fraction <= 0 or (fraction > 1 and random() * fraction >= 1):
        return None
    return float(fraction), max(caused_ns, 0) * fraction


class ContentionRecords:
    """
    The totals of one profile since the start of the process, and its sampling rate.

    Args:
        weigh: Decides whether an event is sampled, and returns its weight.
        random: Test seam.
    """

    def __init__(
        self,
        weigh: Callable[[int, int, Callable[[], float]], Weight | None],
        random: Callable[[], float] | None = None,
    ) -> None:
        self.rate = 0
        self._weigh = weigh
        # A generator of our own: the application may have seeded the shared one.
        self._random = random or Random().random
        self.clear()

    def clear(self) -> None:
        """Start from zero; in a forked child, its parent's events are not its own."""
        self._events: deque[tuple[ContendedStack, Weight]] = deque()
        self._adding_up = threading.Lock()
        self._counter = StackCounter(OTHERS, MAX_STACKS)
        self.lost = 0

    def weigh(self, nanoseconds: int) -> Weight | None:
        """Return the weight of an event of that length; None if it is not sampled."""
        return self._weigh(nanoseconds, self.rate, self._random)

    def memory_bytes(self) -> int:
        """Return about how much memory the records take."""
        return self._counter.memory_bytes()

    def add(self, stack: ContendedStack, weight: Weight) -> None:
        """Add an event. Any thread may call this at any moment; it never waits."""
        if len(self._events) >= _MAX_QUEUED:
            self.lost += 1
            return
        self._events.append((stack, weight))
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
        """Whether events were counted under `OTHERS`, because there were too many stacks."""
        return self._counter.overflowed > 0

    def count(self) -> int:
        """Return the number of stacks."""
        self._add_up()
        return len(self._counter)

    def totals(self) -> list[StackTotal]:
        """Return contentions and nanoseconds by stack."""
        self._add_up()
        return self._counter.totals()
