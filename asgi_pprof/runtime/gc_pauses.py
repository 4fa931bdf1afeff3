"""
Times garbage collections with an entry of `gc.callbacks`.

With the C core the entry is in C. An entry in Python may let other threads run in
the middle of whatever allocates, which no application expects (on CPython 3.11 it
crashes code that is just reading frames). It costs well under 1 us a collection.

Source: runtime/mstats.go, PauseNs and PauseEnd; CPython, gc.callbacks.
"""

from __future__ import annotations

import gc
import itertools
import time
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Sequence
from types import CodeType
from typing import Any, Protocol

from asgi_pprof.native.core import native
from asgi_pprof.recorder import Recorder

_MOST_FORCED = 64
_RING = 256  # as Go's PauseNs and PauseEnd


_GENERATIONS = 3
_SLOT_NS = 10_000_000_000
_SLOTS = 7  # the last minute, and the slot that is being filled
_DIVISION_BITS = 3  # each doubling of a duration has eight buckets

Recent = tuple[int, list[tuple[int, int]]]
"""The longest pause of one generation, and how many there were by nanoseconds, rounded up
by an eighth at most, shortest first."""


class Timer(Protocol):
    """An entry of `gc.callbacks`."""

    @property
    def count(self) -> int:
        """How many collections there have been, including those passed to `begin`."""

    @property
    def total_ns(self) -> int:
        """Nanoseconds of all timed collections."""

    @property
    def last_end_ns(self) -> int:
        """When the last timed collection ended, by `time.time_ns`; 0 before the first."""

    def __call__(self, phase: str, info: dict[str, int], /) -> None: ...

    def begin(self, count: int, /) -> None:
        """Set the count of collections; none is being timed."""

    def pauses(self) -> tuple[tuple[int, int], ...]:
        """Return the last 256 as (nanoseconds, end by `time.time_ns`), a ring as Go's."""

    def recent(self) -> list[Recent]:
        """Return the pauses of the last minute, by generation."""


class PythonTimer:
    """The timer for when there is no C core."""

    def __init__(self) -> None:
        self.count = 0
        self.total_ns = 0
        self.last_end_ns = 0
        self._started_ns = 0
        self._pauses = [(0, 0)] * _RING
        self._slots: list[dict[int, _Slot]] = [{} for _ in range(_GENERATIONS)]

    def begin(self, count: int) -> None:
        self.count = count
        self._started_ns = 0

    def __call__(self, phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            self._started_ns = time.perf_counter_ns()
            return
        if self._started_ns:  # else the timer was added in the middle of this collection
            pause_ns = time.perf_counter_ns() - self._started_ns
            self.last_end_ns = time.time_ns()
            self._pauses[self.count % _RING] = pause_ns, self.last_end_ns
            self.total_ns += pause_ns
            self._add_recent(info.get("generation"), pause_ns)
        self.count += 1
        self._started_ns = 0

    def _add_recent(self, generation: object, pause_ns: int) -> None:
        if not isinstance(generation, int) or not 0 <= generation < _GENERATIONS:
            return
        number, slots = time.perf_counter_ns() // _SLOT_NS, self._slots[generation]
        if number not in slots:
            slots[number] = _Slot()
            slots.pop(number - _SLOTS, None)
        slots[number].add(pause_ns)

    def pauses(self) -> tuple[tuple[int, int], ...]:
        return tuple(self._pauses)

    def recent(self) -> list[Recent]:
        first = time.perf_counter_ns() // _SLOT_NS - _SLOTS + 1
        return [
            _sum([slot for number, slot in slots.copy().items() if number >= first])
            for slots in self._slots
        ]


class _Slot:
    """The pauses of one generation in one slot of time."""

    def __init__(self) -> None:
        self.longest_ns = 0
        self.counts: Counter[int] = Counter()

    def add(self, pause_ns: int) -> None:
        unit = 1 << max(pause_ns.bit_length() - 1 - _DIVISION_BITS, 0)
        self.counts[(pause_ns // unit + 1) * unit] += 1
        self.longest_ns = max(self.longest_ns, pause_ns)


def _sum(slots: list[_Slot]) -> Recent:
    counts: Counter[int] = Counter()
    for slot in slots:
        counts.update(slot.counts.copy())
    return max((slot.longest_ns for slot in slots), default=0), sorted(counts.items())


def is_timing(code: CodeType) -> bool:
    """Return whether code is that of the timer; the C core's timer has none."""
    return code is PythonTimer.__call__.__code__


class GcPauses(Recorder):
    """
    Times collections while it is enabled.

    Args:
        timer: The entry of `gc.callbacks`; None for the C core's, if there is one.
    """

    def __init__(self, timer: Timer | None = None) -> None:
        super().__init__()
        self._cpu_start_ns = 0
        self._timer: Timer = timer or (native.GcTimer() if native else PythonTimer())
        self.forced = 0
        self._forced_spans: deque[tuple[int, int]] = deque(maxlen=_MOST_FORCED)
        self._forced_since_ns = 0  # while such a collection is under way

    def _enabled(self) -> None:
        if self._users > 1:
            return
        # The ring's index follows the number of all collections, as in Go.
        self._timer.begin(sum(generation["collections"] for generation in gc.get_stats()))
        self._cpu_start_ns = self._cpu_start_ns or time.process_time_ns()
        gc.callbacks.append(self._timer)

    def _disabled(self, setting: Any) -> None:
        if not self._settings and self._timer in gc.callbacks:
            gc.callbacks.remove(self._timer)
            self._timer.begin(self._timer.count)

    def is_on(self) -> bool:
        """Return whether collections are timed."""
        return self._timer in gc.callbacks

    @property
    def count(self) -> int:
        """How many collections there have been, as far as is known."""
        return self._timer.count

    @property
    def total_ns(self) -> int:
        """Nanoseconds of all timed collections."""
        return self._timer.total_ns

    @property
    def last_end_ns(self) -> int:
        """When the last timed one ended, by `time.time_ns`; 0 before the first."""
        return self._timer.last_end_ns

    def pauses(self) -> tuple[tuple[int, int], ...]:
        """
        Return the last 256 as (nanoseconds, end by `time.time_ns`).

        It is a ring: the latest is at (count + 255) % 256. Unused entries are zeros.
        """
        return self._timer.pauses()

    def quantiles(self, shares: Sequence[float]) -> dict[int, list[int]]:
        """
        Return quantiles of the pauses of the last 60 to 70 seconds, by generation.

        They are in nanoseconds, rounded up by an eighth at most; the longest is exact.
        Generations that were not collected are left out.
        """
        found = {}
        for generation, (longest_ns, counts) in enumerate(self._timer.recent()):
            total = sum(count for _, count in counts)
            if total:
                ends = list(itertools.accumulate(count for _, count in counts))
                found[generation] = [
                    min(counts[bisect_left(ends, share * total)][0], longest_ns) for share in shares
                ]
        return found

    def collect(self) -> None:
        """Collect all generations now, as `?gc=1` asks."""
        self.forced += 1
        began_ns = self._forced_since_ns = time.monotonic_ns()
        gc.collect()
        self._forced_spans.append((began_ns, time.monotonic_ns()))
        self._forced_since_ns = 0

    def forced_spans(self) -> list[tuple[int, int]]:
        """Return the last 64 collections by `collect`: beginning and end by `time.monotonic_ns`."""
        spans, since_ns = list(self._forced_spans.copy()), self._forced_since_ns
        if since_ns and (not spans or spans[-1][0] < since_ns):
            spans.append((since_ns, time.monotonic_ns()))
        return spans

    def _renew_after_fork(self) -> None:
        self._forced_since_ns = 0  # a finalizer may have forked in the middle of a collection

    def cpu_fraction(self) -> float:
        """
        Return the share of the process's CPU time spent in timed collections.

        Pauses are wall time, so a suspended process could make it exceed 1.
        """
        used_ns = time.process_time_ns() - self._cpu_start_ns
        known = self._cpu_start_ns and used_ns > 0
        return min(self.total_ns / used_ns, 1.0) if known else 0.0
