"""
block and mutex: where time is lost waiting, and which releases others waited for.

block: the stack that waited for a lock, an event, a queue, a stream, a thread
or a free worker thread, in asyncio, anyio, `threading` and `concurrent.futures`;
how often, and how long from the call to its return. Sleeping and waiting for
the network are no contention, nor is a worker that has nothing to do.

mutex: the stack that released a lock for which others waited, with the time
they had waited, each since its wait began or since the last release.

Both are off until a rate is set, as in Go, and count from the start of the
process. While one is on, the methods that wait are wrapped; while both are off,
every attribute is the original again. Methods are wrapped on their classes, so
primitives made before are seen too. The stack is taken after the wait, if it is
sampled: 5 to 15 us. A call that need not wait takes 0.2 to 0.4 us longer in
asyncio and anyio, and no longer in most of `threading`.

Not seen: waits that began before, `threading.Lock` and `RLock` unless a
middleware asks for that (lock_classes.py), `queue.SimpleQueue`, and waits in C
code. On Python 3.11 a wait in the task that `asyncio.wait_for` makes has the
stack of that task, which ends there.

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
from asgi_pprof.collectors.contention.patches import PatchGroup
from asgi_pprof.collectors.contention.recording import Recording, block, mutex
from asgi_pprof.collectors.contention.records import MAX_STACKS, ContentionRecords
from asgi_pprof.profile import Profile, ValueType
from asgi_pprof.stacks import name_totals

Kind = Literal["block", "mutex"]

WINDOW_RATES: dict[Kind, int] = {"block": 10_000, "mutex": 1}
"""For `?seconds=N` while a profile is off: nanoseconds a sample, one in N events."""

_RECORDS: dict[Kind, ContentionRecords] = {"block": block, "mutex": mutex}


class Contention:
    """
    The rates of this process, and what they switch on.

    Attributes are replaced in three groups, each as long as it is needed:
    methods that wait while either profile is on, methods that release while
    mutex is, and `threading.Lock` and `RLock` while a rate is set and a
    middleware asks for it.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a finalizer may switch off in the middle of switching on
        self._rates: dict[Kind, int] = {"block": 0, "mutex": 0}
        self._windows: dict[Kind, int] = {"block": 0, "mutex": 0}
        self._lock_class_users = 0
        self._recording: Recording | None = None
        self._waits, self._releases, self._lock_classes = PatchGroup(), PatchGroup(), PatchGroup()
        self._changes = 0
        self._applying = False
        self._fork_hook = False

    def set_rate(self, kind: Kind, rate: int) -> int:
        """Set a profile's rate, 0 or less for off, and return what it was."""
        with self._lock:
            before, self._rates[kind] = self._rates[kind], max(rate, 0)
            self._apply()
        return before

    def rate(self, kind: Kind) -> int:
        """Return the rate that was set."""
        return self._rates[kind]

    def count_lock_class_users(self, change: int) -> None:
        """Count a middleware that asks for `wrap_lock_classes`: 1 as it comes, -1 as it goes."""
        with self._lock:
            self._lock_class_users += change
            self._apply()

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
        """Return whether a profile is on, and at which rate."""
        rate, records = self._rates[kind], _RECORDS[kind]
        if not records.rate:
            return "off: contention is not recorded"
        unit = "a sample in {} ns of waiting" if kind == "block" else "one event in {} is a sample"
        said = f"on: {unit.format(records.rate)}, counts and times are scaled"
        return said if rate else f"{said}; switched on for this request only, as no rate is set"

    def _apply(self) -> None:
        self._changes += 1
        if self._applying:
            return  # a finalizer interrupted the loop below, which then applies its change too
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
        lock_classes_on = bool(self._lock_class_users and any(self._rates.values()))
        if block.rate or mutex.rate:
            self._on(lock_classes_on)
        else:
            if self._recording is not None:
                self._recording.on = False
                self._recording = None
            self._waits.remove()
        if not mutex.rate:
            self._releases.remove()
        if not lock_classes_on:
            self._lock_classes.remove()
        lock_classes.report_to(self._recording, make_more=lock_classes_on)

    def _on(self, lock_classes_on: bool) -> None:
        self._add_fork_hook()
        recording = self._recording = self._recording or Recording()
        self._waits.install(recording, asyncio_waits.wait_targets, threading_waits.wait_targets)
        if mutex.rate:
            self._releases.install(
                recording, asyncio_waits.release_targets, threading_waits.release_targets
            )
        if lock_classes_on:
            self._lock_classes.install(recording, lock_classes.targets)

    def _add_fork_hook(self) -> None:
        if not self._fork_hook and hasattr(os, "register_at_fork"):
            self._fork_hook = True
            os.register_at_fork(after_in_child=self._reset_in_child)

    def _reset_in_child(self) -> None:
        # The threads that held the lock or waited do not exist in the child. If one of them was
        # in the middle of switching, the next switch here completes that.
        self._lock, self._applying = threading.RLock(), False
        asyncio_waits.reset_in_child()
        threading_waits.reset_in_child()
        for records in _RECORDS.values():
            records.clear()


contention = Contention()


def set_block_profile_rate(rate_ns: int) -> None:
    """
    Record waits: on average one for every `rate_ns` nanoseconds spent waiting.

    Waits at least that long are all recorded, shorter ones in proportion, and
    counts and sums are scaled to be right on average. 1 records everything, 0
    or less nothing. What has been recorded stays in the profile.

    Waits for `threading.Lock` and `RLock` are recorded only in a process with a
    middleware that has `wrap_lock_classes=True`: this function replaces neither
    of them by itself.

    Source: runtime.SetBlockProfileRate.
    """
    contention.set_rate("block", rate_ns)


def set_mutex_profile_fraction(rate: int) -> int:
    """
    Record one in `rate` releases that others waited for, and return the rate before.

    1 records everything, 0 nothing; a negative one changes nothing. As to
    `threading.Lock` and `RLock`, see `set_block_profile_rate`.

    Source: runtime.SetMutexProfileFraction.
    """
    if rate < 0:
        return contention.rate("mutex")
    return contention.set_rate("mutex", rate)


class ContentionSwitch:
    """
    The rates and options of one middleware, which hold while it is open.

    Args:
        block_profile_rate: Nanoseconds of waiting a sample; 0 leaves the rate alone.
        mutex_profile_fraction: Releases a sample; 0 leaves the fraction alone.
        wrap_lock_classes: Whether to replace `threading.Lock` and `RLock` while
            a rate is set, no matter how it was set.

    Raises:
        ValueError: A rate is negative.
    """

    def __init__(
        self,
        block_profile_rate: int = 0,
        mutex_profile_fraction: int = 0,
        wrap_lock_classes: bool = False,
    ) -> None:
        self._rates: dict[Kind, int] = {
            "block": block_profile_rate,
            "mutex": mutex_profile_fraction,
        }
        if min(self._rates.values()) < 0:
            raise ValueError(
                "block_profile_rate is nanoseconds a sample and mutex_profile_fraction one event"
                f" in so many, or 0; not {block_profile_rate!r} and {mutex_profile_fraction!r}"
            )
        self._wrap_lock_classes = wrap_lock_classes

    def enable(self) -> None:
        """Set the rates; pair with `disable`."""
        _switches.append(self)
        if self._wrap_lock_classes:
            contention.count_lock_class_users(1)
        for kind, rate in self._rates.items():
            if rate:
                contention.set_rate(kind, rate)

    def disable(self) -> None:
        """Set the rates of the middleware that was enabled before, 0 if there is none."""
        _switches.remove(self)
        if self._wrap_lock_classes:
            contention.count_lock_class_users(-1)
        for kind, rate in self._rates.items():
            # A rate that was set by other means since then stays.
            if rate and contention.rate(kind) == rate:
                others = [each._rates[kind] for each in _switches if each._rates[kind]]
                contention.set_rate(kind, others[-1] if others else 0)


_switches: list[ContentionSwitch] = []


class ContentionCollector:
    """
    Collects one of the two profiles.

    Args:
        kind: Which one.
    """

    def __init__(self, kind: Kind) -> None:
        self._kind = kind
        self._records = _RECORDS[kind]

    def count(self) -> int:
        """Return the number of stacks."""
        return self._records.count()

    def note(self) -> str:
        """Return whether the profile is on, and at which rate."""
        return contention.describe(self._kind)

    def window(self) -> AbstractContextManager[None]:
        """Return a manager that holds the profile on."""
        return contention.window(self._kind)

    async def snapshot(self) -> Callable[[], Profile]:
        """Return contentions/count and delay/nanoseconds by stack, scaled; no labels, as in Go."""
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
