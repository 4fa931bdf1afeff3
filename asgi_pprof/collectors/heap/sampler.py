"""
The native engine of the heap profiles: memory by the stack that allocated it.

What is measured: allocations in the "mem" and "obj" domains of Python's allocators
(objects, lists, dicts, strings, bytes) since sampling began, and those still alive,
by stack, size class and labels.

How: hooks around the allocators count bytes down and sample one allocation in
512 KiB with its stack, at exponential distances as in Go. A sampled block is
tracked until it is freed; a resized block counts as a new allocation. The numbers
are those of the samples; `scale_sampled` makes estimates of them.

What it costs: code that only allocates takes 2 to 6 % longer (16 % if it only
creates ints), a request less than can be measured. Memory is bounded; samples for
which there is no room are counted as lost.

What it misses: the "raw" domain and the memory of C libraries (numpy's buffers,
parsers, TLS), which only MemStats includes; objects that CPython takes from its free
lists (some ints, tuples, frames), which are not allocations; all earlier allocations.

Source: asgi_pprof/_native/heap_sampler.c; runtime/mprof.go.
"""

from __future__ import annotations

import struct
import time
import tracemalloc
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from asgi_pprof.collectors.heap.memstats import AllocationCounters
from asgi_pprof.labels import Pairs, resolve
from asgi_pprof.native.core import native, reason
from asgi_pprof.native.label_interner import book
from asgi_pprof.native.places import Places
from asgi_pprof.offload import yield_gil
from asgi_pprof.profile import Label, LazySamples, Sample, Stack
from asgi_pprof.recorder import Recorder

ENGINE = "native"
DEFAULT_RATE = 512 * 1024  # as Go's MemProfileRate

_ROW = struct.Struct("=7Q")
_COLUMNS = 6
_PENDING = 1 << 63  # labels above this stand for living label sets
MAX_RATE = 2**62
_TRIES = 3
_COMPACTED = 32  # stacks that are moved in one call, which keeps the GIL


class HeapSampler(Recorder):
    """
    The native heap sampler; a user's setting is a rate, in bytes a sample, 0 for none.

    The rate of the first user applies. The sampler never starts on top of
    tracemalloc, whose `stop` would remove its hooks unnoticed; tracemalloc on top
    of the sampler does no harm.
    """

    def __init__(self) -> None:
        super().__init__()
        self._rate = 0
        self._start_ns = 0
        self._restarts = 0
        self._failure = ""

    def _enabled(self) -> None:
        if self._users == 1:
            self._rate = self._settings[0]
            self._restarts = 0
            self._start()

    def _disabled(self, setting: Any) -> None:
        if not self._settings and native:
            native.heap_stop()  # also drops the samples

    def is_on(self) -> bool:
        """Return whether the sampler runs."""
        return bool(self._settings and native and native.heap_check())

    def resume(self) -> bool:
        """
        Start the sampler if it can start now; return whether it runs.

        It stops by itself in a forked child, and when another tool removes its
        hooks; it cannot start while the application uses tracemalloc.
        """
        with self._lock:
            if not self._settings or not native:
                return False
            if native.heap_check():
                return True
            if native.heap_stats()["rate"]:
                self._restarts += 1
                native.heap_stop()
            return self._start()

    def why_off(self) -> str:
        """Return why the sampler is off."""
        if not native:
            return reason
        if self._settings and self._rate == 0:
            return "memory_profile_rate is 0"
        return self._failure or "tracemalloc is on"

    def counters(self) -> AllocationCounters | None:
        """Return the exact counts since the start, None while the sampler is off."""
        if not self.is_on():
            return None
        stats = native.heap_stats()
        return AllocationCounters(stats["mallocs"], stats["frees"], stats["total_bytes"])

    def stack_count(self) -> int:
        """Return the number of different stacks sampled."""
        count: int = native.heap_stats()["stacks"]
        return count

    def copy(self) -> SampledHeap:
        """Return a copy of the samples. Any thread may call it; it delays the others little."""
        while native.heap_compact(_COMPACTED):
            yield_gil()
        for _ in range(_TRIES):
            reuses = book.reuses
            # The sets are listed before the rows are read: the references keep the sets alive.
            pending: dict[int, Any] = dict(native.heap_pending())
            rows = native.heap_read()
            pending.update(pair for pair in native.heap_pending() if pair[0] not in pending)
            labels = {number: resolve(label_set) for number, label_set in pending.items()}
            used = {row[2] for row in _ROW.iter_unpack(rows)}
            labels.update((label, book.pairs(label)) for label in used if label < _PENDING)
            if used <= labels.keys() and book.reuses == reuses:
                break  # else a set has been created and has died meanwhile: it is stored by now
        return SampledHeap(rows, labels, self._rate, tuple(self._comments()))

    def _start(self) -> bool:
        if not native or self._rate == 0 or tracemalloc.is_tracing():
            return False
        try:
            native.heap_start(self._rate)
        except (MemoryError, OSError, RuntimeError) as error:
            self._failure = f"could not begin: {error}"
            return False
        self._start_ns = time.time_ns()
        return True

    def _comments(self) -> list[str]:
        stats = native.heap_stats()
        since = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self._start_ns // 10**9))
        comments = [
            f"engine: {ENGINE}, one sample in {self._rate} bytes since {since};"
            " what was allocated before or by C libraries is not seen"
        ]
        if self._restarts:
            comments.append(f"began anew {self._restarts} times: another tool removed the hooks")
        for name, what in _LOSSES.items():
            if stats[name]:
                comments.append(f"{name}: {stats[name]} {what}")
        if book.refused:
            comments.append(f"labels: {book.refused} label sets have none, too many different ones")
        return comments


_LOSSES = {
    "lost": "samples, no room for them",
    "unreadable": "samples, their stacks could not be read",
    "unlabelled": "past allocations without their labels, too many different ones",
    "unnamed": "samples without their stacks, no room for more different ones",
}


@dataclass(frozen=True, slots=True)
class SampledHeap:
    """A copy of the sampler's rows, and the labels that they had at that moment."""

    rows: bytes
    labels: dict[int, Pairs]
    rate: int
    comments: tuple[str, ...]

    def samples(self) -> Sequence[Sample]:
        """Return a heap profile's samples, not scaled, one for each stack, size and labels."""
        rows = _Rows()
        # Most rows have the size and the labels of others.
        labels: dict[tuple[int, int], tuple[Label, ...]] = {}
        for stack, size, label, *values in _ROW.iter_unpack(self.rows):
            yield_gil()
            if (label, size) not in labels:
                pairs = self.labels.get(label, ())
                if size:  # else the samples have various sizes
                    pairs = tuple(sorted((*pairs, ("bytes", size)), key=lambda pair: pair[0]))
                labels[label, size] = pairs
            rows.add(stack, labels[label, size], values)
        return LazySamples(len(rows), rows.sample)


class _Rows:
    """Samples in the least memory: some 300 bytes each, of which 150 are for a stack."""

    def __init__(self) -> None:
        self._names = Places()
        self._places = array("I")  # of all stacks, one after the other
        self._starts = array("I", [0])
        self._labels: list[tuple[Label, ...]] = []
        self._rows = array("Q")  # the number of the stack here, that of the labels, the values
        self._label_numbers: dict[tuple[Label, ...], int] = {}
        self._stack_numbers: dict[int, int] = {}  # by the sampler's number
        self._stacks_by_hash: dict[int, int] = {}
        self._row_numbers: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._rows) // _COLUMNS

    def add(self, stack: int, labels: tuple[Label, ...], values: Sequence[int]) -> None:
        """Add a row of the sampler's."""
        if stack not in self._stack_numbers:
            self._stack_numbers[stack] = self._add_stack(native.heap_stack(stack))
        label_number = self._label_numbers.setdefault(labels, len(self._labels))
        if label_number == len(self._labels):
            self._labels.append(labels)
        stack_number = self._stack_numbers[stack]
        row = self._row_numbers.setdefault(stack_number << 32 | label_number, len(self._rows))
        if row == len(self._rows):
            self._rows.extend((stack_number, label_number, *values))
        else:
            for column, value in enumerate(values, row + 2):
                self._rows[column] += value

    def _add_stack(self, places: tuple[int, ...]) -> int:
        # Code that has been loaded twice has other places, but the same names.
        stack = self._names.stack(places)
        number = len(self._starts) - 1
        known = self._stacks_by_hash.setdefault(hash(stack), number)
        if known != number and self._stack(known) == stack:
            return known
        self._places.extend(places)
        self._starts.append(len(self._places))
        return number

    def _stack(self, number: int) -> Stack:
        start, end = self._starts[number : number + 2]
        return self._names.stack(self._places[start:end])

    def sample(self, index: int) -> Sample:
        """Return a sample."""
        row = self._rows[index * _COLUMNS : (index + 1) * _COLUMNS]
        return Sample(self._stack(row[0]), tuple(row[2:]), self._labels[row[1]])
