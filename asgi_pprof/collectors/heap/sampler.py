"""
Memory by the stack that allocated it: the native engine.

What is measured: allocations by Python's own allocators (its "mem" and "obj"
domains: objects, lists, dicts, strings, bytes), by stack, size class and
labels: what was allocated since sampling began, and what of it is alive.

How: hooks around those allocators count down bytes and take one allocation in
512 KiB, at exponential distances as in Go, with its stack. A sampled block is
known until it is freed; one that is resized counts as allocated anew. Numbers
are what was sampled; `scale_sampled` makes estimates of them.

What it costs: 2 to 6 % of the time of code that does nothing but allocate (16 %
where it only makes ints), less than the noise on a request; memory is bounded,
and what does not fit is counted as lost.

What it misses: the "raw" domain and C libraries' own memory (numpy's buffers,
parsers, TLS), seen in RSS only; objects that CPython takes from its free lists
(some ints, tuples, frames), which are no allocations; what was there before.

Source: asgi_pprof/_native/heap_sampler.c; runtime/mprof.go.
"""

from __future__ import annotations

import struct
import time
import tracemalloc
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from asgi_pprof.collectors.heap.memstats import AllocationCounters
from asgi_pprof.labels import Pairs, resolve
from asgi_pprof.merge import sum_samples
from asgi_pprof.native.core import native, reason
from asgi_pprof.native.label_interner import book
from asgi_pprof.native.places import Places
from asgi_pprof.profile import Sample
from asgi_pprof.recorder import Recorder

ENGINE = "native"
DEFAULT_RATE = 512 * 1024  # as Go's MemProfileRate

_ROW = struct.Struct("=7Q")
_PENDING = 0x80000000  # labels from here on belong to sets that are alive
_MAX_RATE = 2**62
_TRIES = 3


class HeapSampler(Recorder):
    """
    The native heap sampler; a user's setting is a rate, in bytes a sample, 0 for none.

    The rate of the first user counts. The sampler never starts on top of
    tracemalloc, whose `stop` would remove its hooks unnoticed; tracemalloc on top
    of the sampler does no harm.
    """

    def __init__(self) -> None:
        super().__init__()
        self._rate = 0
        self._began_ns = 0
        self._removed = 0
        self._failure = ""

    def _enabled(self) -> None:
        if len(self._settings) == 1:
            self._rate = self._settings[0]
            self._removed = 0
            self._begin()

    def _disabled(self) -> None:
        if not self._settings and native:
            native.heap_stop()  # and forget what was sampled

    def is_on(self) -> bool:
        """Return whether it samples."""
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
                self._removed += 1
                native.heap_stop()
            return self._begin()

    def why_off(self) -> str:
        """Return why it is off."""
        if not native:
            return reason
        if self._settings and self._rate == 0:
            return "memory_profile_rate is 0"
        return self._failure or "tracemalloc is on"

    def counters(self) -> AllocationCounters | None:
        """Return the exact counts since it began, None while it is off."""
        if not self.is_on():
            return None
        stats = native.heap_stats()
        return AllocationCounters(stats["mallocs"], stats["frees"], stats["total_bytes"])

    def stack_count(self) -> int:
        """Return how many different stacks have been sampled."""
        count: int = native.heap_stats()["stacks"]
        return count

    def copy(self) -> SampledHeap:
        """Copy what is known now; well under a millisecond, from any thread."""
        for _ in range(_TRIES):
            # First: the sets that are held here keep their numbers during the rest.
            waiting: dict[int, Any] = dict(native.heap_pending())
            rows = native.heap_read()
            waiting.update(pair for pair in native.heap_pending() if pair[0] not in waiting)
            labels = {number: resolve(label_set) for number, label_set in waiting.items()}
            used = {row[2] for row in _ROW.iter_unpack(rows)}
            if all(label < _PENDING or label in labels for label in used):
                break  # else a set was born and died meanwhile: it is written down by now
        return SampledHeap(rows, labels, self._rate, tuple(self._comments()))

    def _begin(self) -> bool:
        if not native or self._rate == 0 or tracemalloc.is_tracing():
            return False
        try:
            native.heap_start(self._rate)
        except (MemoryError, OSError, RuntimeError) as error:
            self._failure = f"could not begin: {error}"
            return False
        self._began_ns = time.time_ns()
        return True

    def _comments(self) -> list[str]:
        stats = native.heap_stats()
        since = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self._began_ns // 10**9))
        comments = [
            f"engine: {ENGINE}, one sample in {self._rate} bytes since {since};"
            " what was allocated before or by C libraries is not seen"
        ]
        if self._removed:
            comments.append(f"began anew {self._removed} times: another tool removed the hooks")
        for name, what in _LOSSES.items():
            if stats[name]:
                comments.append(f"{name}: {stats[name]} {what}")
        return comments


_LOSSES = {
    "lost": "samples, no room for them",
    "unreadable": "samples, their stacks could not be read",
    "unlabelled": "samples without their labels, too many requests at once",
}

heap_sampler = HeapSampler()


class HeapSwitch:
    """One middleware's wish for the sampler, at its rate."""

    def __init__(self, rate: int) -> None:
        if not 0 <= rate <= _MAX_RATE:
            raise ValueError(f"memory_profile_rate is bytes a sample, or 0, not {rate!r}")
        self._rate = rate

    def enable(self) -> None:
        """Switch on."""
        heap_sampler.enable(self._rate)

    def disable(self) -> None:
        """Switch off."""
        heap_sampler.disable()


@dataclass(frozen=True, slots=True)
class SampledHeap:
    """What the sampler knew at one moment, and what living label sets said then."""

    rows: bytes
    labels: dict[int, Pairs]
    rate: int
    comments: tuple[str, ...]

    def samples(self) -> tuple[Sample, ...]:
        """Return a heap profile's samples, not scaled."""
        return sum_samples(self._rows())

    def _rows(self) -> Iterator[Sample]:
        places = Places()
        for stack, size, label, *values in _ROW.iter_unpack(self.rows):
            pairs = book.pairs(label) if label < _PENDING else self.labels.get(label, ())
            labels = tuple(sorted((*pairs, ("bytes", size)), key=lambda pair: pair[0]))
            yield Sample(places.stack(native.heap_stack(stack)), tuple(values), labels)
