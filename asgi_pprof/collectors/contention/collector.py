"""
block and mutex: where time is lost waiting, and who made others wait.

block: the stack that waited for a lock, an event, a queue, a stream, a thread
or a free worker thread, in asyncio, anyio, `threading` and `concurrent.futures`;
how often, and how long from the call to its return. Sleeping and waiting for
the network are no contention, nor are workers with nothing to do.

mutex: the stack that released a lock while others waited for it, with what
they have waited, each since it began or since the last release.

Both are off until a rate is set, as in Go, and count for the life of the
process. While one is on, the methods that wait are wrapped; off, every one is
the original again. They are looked up on their classes, so what was made before
is seen too. The stack is taken after the wait, if it is sampled: 5 to 15 us.
A call that need not wait takes 0.2 to 0.4 us longer in asyncio and anyio, and
nothing in most of `threading`.

What is missed: waits that began before, locks of threads made before or by
the standard library (lock_classes.py), `queue.SimpleQueue`, and what C
code waits for. A wait in a task that `asyncio.wait_for` makes (Python 3.11)
has the stack of that task, which ends there.

Source: runtime/mprof.go; runtime/pprof, writeBlock and writeMutex;
runtime.SetBlockProfileRate, runtime.SetMutexProfileFraction.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Literal

from asgi_pprof.collectors.contention import asyncio_waits, lock_classes, threading_waits
from asgi_pprof.collectors.contention.records import MAX_STACKS, ContentionRecords
from asgi_pprof.collectors.contention.watch import Patches, Watch, block, mutex
from asgi_pprof.profile import Profile, ValueType
from asgi_pprof.stacks import name_totals

Kind = Literal["block", "mutex"]

WINDOW_RATES: dict[Kind, int] = {"block": 10_000, "mutex": 1}
"""For `?seconds=N` while a profile is off: nanoseconds a sample, one in N events."""

_RECORDS: dict[Kind, ContentionRecords] = {"block": block, "mutex": mutex}


class Contention:
    """
    What is recorded and at which rate; one for the process.

    Three groups are wrapped, each as long as it is needed: methods that wait
    while either profile is on, methods that release while mutex is, and the
    names that locks of threads are made by while a rate is set.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a finalizer may switch off in the middle of switching on
        self._rates: dict[Kind, int] = {"block": 0, "mutex": 0}
        self._windows: dict[Kind, int] = {"block": 0, "mutex": 0}
        self._watch: Watch | None = None
        self._waiting, self._releasing, self._naming = Patches(), Patches(), Patches()
        self._changes = 0
        self._applying = False
        self._renewed_by_fork = False

    def set_rate(self, kind: Kind, rate: int) -> int:
        """Set a profile's rate, 0 or less for off, and return what it was."""
        with self._lock:
            before, self._rates[kind] = self._rates[kind], max(rate, 0)
            self._apply()
        return before

    def rate(self, kind: Kind) -> int:
        """Return the rate that was set."""
        return self._rates[kind]

    @contextmanager
    def window(self, kind: Kind) -> Iterator[None]:
        """Hold a profile on, at the rate of windows unless one is set."""
        with self._lock:
            self._windows[kind] += 1
            self._apply()
        try:
            yield
        finally:
            with self._lock:
                self._windows[kind] -= 1
                self._apply()

    def describe(self, kind: Kind) -> str:
        """Return whether it is on, and at which rate."""
        rate, records = self._rates[kind], _RECORDS[kind]
        if not records.rate:
            return "off: contention is not recorded"
        unit = "a sample in {} ns of waiting" if kind == "block" else "one event in {} is a sample"
        said = f"on: {unit.format(records.rate)}, counts and times are scaled"
        return said if rate else f"{said}; switched on for this request only, as no rate is set"

    def _apply(self) -> None:
        self._changes += 1
        if self._applying:
            return  # a finalizer, in the middle of it: what it wants comes next
        self._applying, applied = True, 0
        try:
            while applied != self._changes:
                applied = self._changes
                self._switch()
        finally:
            self._applying = False

    def _switch(self) -> None:
        for kind, records in _RECORDS.items():
            window_rate = WINDOW_RATES[kind] if self._windows[kind] else 0
            records.rate = self._rates[kind] or window_rate
        if block.rate or mutex.rate:
            self._on()
        elif self._watch is not None:
            self._watch.on = False
            self._watch = None
        if not block.rate and not mutex.rate:
            self._waiting.remove()
        if not mutex.rate:
            self._releasing.remove()
        if not any(self._rates.values()):
            self._naming.remove()
        lock_classes.report_to(self._watch)

    def _on(self) -> None:
        self._renew_by_fork()
        watch = self._watch = self._watch or Watch()
        asyncio_side, threads_side = asyncio_waits, threading_waits
        self._waiting.install(
            watch, lambda: [*asyncio_side.waiting_targets(), *threads_side.waiting_targets()]
        )
        if mutex.rate:
            self._releasing.install(
                watch,
                lambda: [*asyncio_side.releasing_targets(), *threads_side.releasing_targets()],
            )
        if any(self._rates.values()):
            self._naming.install(watch, lock_classes.naming_targets)

    def _renew_by_fork(self) -> None:
        if not self._renewed_by_fork and hasattr(os, "register_at_fork"):
            self._renewed_by_fork = True
            os.register_at_fork(after_in_child=self._begin_anew)

    def _begin_anew(self) -> None:
        # Who held the lock or waited does not exist in the child; a switch that was under
        # way in another thread is finished by the next one here.
        self._lock, self._applying = threading.RLock(), False
        asyncio_waits.forget_waits()
        threading_waits.forget_waits()
        for records in _RECORDS.values():
            records.forget()


contention = Contention()


def set_block_profile_rate(rate_ns: int) -> None:
    """
    Record waits: on average one for every so many nanoseconds spent waiting.

    Waits at least that long are all recorded, shorter ones in proportion, and
    counts and sums are scaled to be right on average. 1 records everything, 0
    or less nothing. What has been recorded stays in the profile.

    Source: runtime.SetBlockProfileRate.
    """
    contention.set_rate("block", rate_ns)


def set_mutex_profile_fraction(rate: int) -> int:
    """
    Record one in `rate` releases that others waited for, and return the rate before.

    1 records everything, 0 nothing; a negative one changes nothing.

    Source: runtime.SetMutexProfileFraction.
    """
    if rate < 0:
        return contention.rate("mutex")
    return contention.set_rate("mutex", rate)


class ContentionSwitch:
    """
    One middleware's rates, while it lives; 0 leaves a rate alone.

    Raises:
        ValueError: A rate is negative.
    """

    def __init__(self, block_profile_rate: int = 0, mutex_profile_fraction: int = 0) -> None:
        self._rates: dict[Kind, int] = {
            "block": block_profile_rate,
            "mutex": mutex_profile_fraction,
        }
        if min(self._rates.values()) < 0:
            raise ValueError(
                "block_profile_rate is nanoseconds a sample and mutex_profile_fraction one event"
                f" in so many, or 0; not {block_profile_rate!r} and {mutex_profile_fraction!r}"
            )

    def enable(self) -> None:
        """Set the rates; pair with `disable`."""
        _switches.append(self)
        self._set()

    def disable(self) -> None:
        """Give way to the rates of the middleware before it, or switch off."""
        _switches.remove(self)
        for kind, rate in self._rates.items():
            # Somebody who has set another rate since then is left alone.
            if rate and contention.rate(kind) == rate:
                others = [each._rates[kind] for each in _switches if each._rates[kind]]
                contention.set_rate(kind, others[-1] if others else 0)

    def _set(self) -> None:
        for kind, rate in self._rates.items():
            if rate:
                contention.set_rate(kind, rate)


_switches: list[ContentionSwitch] = []


class ContentionCollector:
    """
    One of the two profiles.

    Args:
        kind: Which.
    """

    def __init__(self, kind: Kind) -> None:
        self._kind = kind
        self._records = _RECORDS[kind]

    def count(self) -> int:
        """Return the number of stacks."""
        return self._records.count()

    def note(self) -> str:
        """Return whether it is on, and at which rate."""
        return contention.describe(self._kind)

    def window(self) -> AbstractContextManager[None]:
        """Return a manager that holds the profile on."""
        return contention.window(self._kind)

    async def snapshot(self) -> Callable[[], Profile]:
        """Give contentions/count and delay/nanoseconds by stack, scaled; no labels, as in Go."""
        totals, comments = self._records.totals(), tuple(self._comments())
        time_ns = time.time_ns()
        return lambda: Profile(
            sample_types=(ValueType("contentions", "count"), ValueType("delay", "nanoseconds")),
            samples=name_totals(totals),
            period_type=ValueType("contentions", "count"),
            period=1,
            time_ns=time_ns,
            comments=comments,
        )

    def _comments(self) -> Iterator[str]:
        yield contention.describe(self._kind)
        if self._records.lost:
            yield f"lost: {self._records.lost} events could not be recorded"
        if self._records.overflowed:
            yield f"<other stacks>: events of stacks beyond {MAX_STACKS} different ones"
