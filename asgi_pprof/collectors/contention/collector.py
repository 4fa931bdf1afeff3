"""
block and mutex: where time is lost waiting, and which releases others waited for.

block: the stack that waited for a lock, an event, a queue, a stream, a thread
or a free worker thread, in asyncio, anyio, `threading` and `concurrent.futures`;
how often, and how long from the call to its return. Sleeping and waiting for
the network are no contention, nor is a worker that has nothing to do.

mutex: the stack that released a lock for which others waited, with the time
they had waited, each since its wait began or since the last release.

A wait that has not ended is in block too, with the nanoseconds so far and the count
0; it counts when it ends. So a window has of each wait the part inside, whether it
began before or ends after (under_way.py). That takes a look at all tasks, in slices
of 1 ms, for each profile that is read.

Both are off until a rate is set, as in Go, and count from the start of the
process. While one is on, the methods that wait are wrapped; while both are off,
every attribute is the original again. Methods are wrapped on their classes, so
primitives made before are seen too. The stack is taken after the wait, if it is
sampled: 5 to 15 us. A call that need not wait takes 0.2 to 0.4 us longer in
asyncio and anyio, and no longer in most of `threading`.

Not seen: in mutex, waits that began before; `threading.Lock` and `RLock` unless a
middleware asks for that (lock_classes.py), `queue.SimpleQueue`, and waits in C
code. On Python 3.11 a wait in the task that `asyncio.wait_for` makes has the
stack of that task, which ends there.

Source: runtime/mprof.go; runtime/pprof, writeBlock and writeMutex;
runtime.SetBlockProfileRate, runtime.SetMutexProfileFraction.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Literal, NamedTuple

from asgi_pprof.collectors.contention import (
    asyncio_waits,
    lock_classes,
    threading_waits,
)
from asgi_pprof.collectors.contention.patches import PatchGroup
from asgi_pprof.collectors.contention.recording import Recording, block, mutex
from asgi_pprof.collectors.contention.records import MAX_STACKS, ContentionRecords
from asgi_pprof.collectors.contention.under_way import Wait, now_ns, sum_waits, waits
from asgi_pprof.profile import Profile, ValueType, pseudo_location
from asgi_pprof.recorder import Recorder
from asgi_pprof.stacks import StackTotal, name_totals

Kind = Literal["block", "mutex"]

WINDOW_RATES: dict[Kind, int] = {"block": 10_000, "mutex": 1}
"""For `?seconds=N` while a profile is off: nanoseconds a sample, one in N events."""

_RECORDS: dict[Kind, ContentionRecords] = {"block": block, "mutex": mutex}


class ContentionSettings(NamedTuple):
    """
    What one middleware asks for.

    Args:
        block: Nanoseconds of waiting a sample; 0 leaves the rate alone.
        mutex: Releases a sample; 0 leaves the fraction alone.
        wrap_lock_classes: Whether to replace `threading.Lock` and `RLock` while
            a rate is set, no matter how it was set.
    """

    block: int = 0
    mutex: int = 0
    wrap_lock_classes: bool = False

    def rates(self) -> Iterator[tuple[Kind, int]]:
        """Yield the rates that are asked for."""
        if self.block:
            yield "block", self.block
        if self.mutex:
            yield "mutex", self.mutex


class Contention(Recorder):
    """
    The rates of this process, and what they switch on; users have `ContentionSettings`.

    Attributes are replaced in three groups, each as long as it is needed:
    methods that wait while either profile is on, methods that release while
    mutex is, and `threading.Lock` and `RLock` while a rate is set and a
    middleware asks for it.
    """

    def __init__(self) -> None:
        super().__init__()
        self._rates: dict[Kind, int] = {"block": 0, "mutex": 0}
        self._windows = self._no_windows()
        self._recording: Recording | None = None
        self._waits, self._releases, self._lock_classes = PatchGroup(), PatchGroup(), PatchGroup()
        self._changes = 0
        self._applying = False

    def memory_bytes(self) -> int:
        return sum(records.memory_bytes() for records in _RECORDS.values())

    def _enabled(self) -> None:
        self._rates.update(self._settings[-1].rates())
        self._apply()

    def _disabled(self, setting: ContentionSettings) -> None:
        for kind, rate in setting.rates():
            # A rate that was set by other means since then stays.
            if self._rates[kind] == rate:
                others = [dict(each.rates()).get(kind, 0) for each in self._settings]
                self._rates[kind] = next(filter(None, reversed(others)), 0)
        self._apply()

    def set_rate(self, kind: Kind, rate: int) -> int:
        """Set a profile's rate, 0 or less for off, and return what it was."""
        with self._lock:
            before, self._rates[kind] = self._rates[kind], max(rate, 0)
            try:
                self._apply()
            except BaseException:
                self._rates[kind] = before
                self._apply()
                raise
        return before

    def rate(self, kind: Kind) -> int:
        """Return the rate that was set."""
        return self._rates[kind]

    @contextmanager
    def window(self, kind: Kind) -> Iterator[None]:
        """Hold a profile on, at the rate of windows unless one is set."""
        windows = self._windows  # a forked child has others
        try:
            with self._lock:
                windows[kind] += 1
                self._apply()
            yield
        finally:
            with self._lock:
                windows[kind] -= 1
                self._apply()

    async def under_way(self) -> list[Wait]:
        """Return the waits that have not ended, if waits are recorded."""
        recording = self._recording
        return [] if recording is None or not block.rate else await recording.under_way.find()

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
        is_asked_for = any(each.wrap_lock_classes for each in self._settings)
        lock_classes_on = is_asked_for and any(self._rates.values())
        if block.rate or mutex.rate:
            self._on(lock_classes_on)
        else:
            if self._recording is not None:
                self._recording.end()
                self._recording = None
            self._waits.remove()
        if not mutex.rate:
            self._releases.remove()
        if not lock_classes_on:
            self._lock_classes.remove()
        lock_classes.report_to(self._recording, make_more=lock_classes_on)

    def _on(self, lock_classes_on: bool) -> None:
        recording = self._recording = self._recording or Recording()
        self._waits.install(recording, asyncio_waits.wait_targets, threading_waits.wait_targets)
        if mutex.rate:
            self._releases.install(
                recording, asyncio_waits.release_targets, threading_waits.release_targets
            )
        if lock_classes_on:
            self._lock_classes.install(recording, lock_classes.targets)

    @staticmethod
    def _no_windows() -> dict[Kind, int]:
        return {"block": 0, "mutex": 0}

    def _renew_after_fork(self) -> None:
        # The threads that waited do not exist in the child. If one thread was in the middle of
        # switching, the next switch here completes that.
        self._applying = False
        waits.clear()
        if self._recording is not None:
            self._recording.under_way.forget()
        asyncio_waits.reset_in_child()
        threading_waits.reset_in_child()
        self._windows = self._no_windows()
        for kind, records in _RECORDS.items():
            records.clear()
            records.rate = self._rates[kind]
        if not any(self._rates.values()):
            self._apply()  # putting back waits for nothing; replacing may import, and so wait


class ContentionCollector:
    """
    Collects one of the two profiles.

    Args:
        contention: The recorder of both.
        kind: Which one.
    """

    def __init__(self, contention: Contention, kind: Kind) -> None:
        self._contention = contention
        self._kind = kind
        self._records = _RECORDS[kind]

    def count(self) -> int:
        """Return the number of stacks."""
        return self._records.count()

    def note(self) -> str:
        """Return whether the profile is on, and at which rate."""
        return self._contention.describe(self._kind)

    def window(self) -> AbstractContextManager[None]:
        """Return a manager that holds the profile on."""
        return self._contention.window(self._kind)

    async def snapshot(self) -> Callable[[], Profile]:
        """Return contentions/count and delay/nanoseconds by stack, scaled; no labels, as in Go."""
        found = await self._contention.under_way() if self._kind == "block" else []
        # At that moment a wait is either under way or in the totals.
        at_ns, time_ns, totals = now_ns(), time.time_ns(), self._records.totals()
        under_way, delays = await sum_waits(found, at_ns, self._records.rate)
        for (name, stack), waited_ns in delays:
            leaf = pseudo_location(name) if name else None
            totals.append(StackTotal(stack, leaf, (), (0, waited_ns)))
        comments = tuple(self._comments(under_way))
        return lambda: Profile(
            sample_types=(ValueType("contentions", "count"), ValueType("delay", "nanoseconds")),
            samples=name_totals(totals),
            period_type=ValueType("contentions", "count"),
            period=1,
            time_ns=time_ns,
            comments=comments,
        )

    def _comments(self, under_way: int) -> Iterator[str]:
        yield self._contention.describe(self._kind)
        if under_way:
            yield f"waits under way: {under_way}; they have delay, and count when they end"
        if self._records.lost:
            yield f"lost: {self._records.lost} events could not be recorded"
        if self._records.overflowed:
            yield f"<other stacks>: events of stacks beyond {MAX_STACKS} different ones"
