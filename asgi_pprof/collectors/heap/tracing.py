"""
The tracemalloc engine of the heap profiles: live memory by the stack that allocated it.

What is measured: all live blocks that Python's allocators have allocated since tracing
began, by stack and size class (inuse_objects, inuse_space). tracemalloc forgets freed
blocks, so alloc_objects and alloc_space are lower bounds: the maximum of each that any
snapshot saw alive. They never fall, because scrapers subtract them.

How: by `tracemalloc`, which sees every allocation (the period is 1, nothing is scaled).
It is on while the application has it on, while a middleware with `heap="tracemalloc"`
lives, or during one `?seconds=N`.

What it costs: code that only allocates takes 7 times as long with one frame per stack,
16 times with 25; a FastAPI request takes 3 to 11 times the CPU time. A snapshot holds
the GIL while it copies the traces, for 0.3 us per live block, since tracemalloc gives
out all of them or none. So traces of more than 500,000 blocks are copied only where
we have started tracing. While off it costs nothing.

What it misses: memory from before tracing began and that of C libraries; frames beyond
the traceback limit (16 here); stacks beyond the 16,384 largest, whose sums are one
sample; functions: it records lines, and `sources` names the innermost function that has
the line.

Source: CPython, Modules/_tracemalloc.c, Lib/tracemalloc.py; runtime/mprof.go.
"""

from __future__ import annotations

import heapq
import os
import threading
import tracemalloc
from _tracemalloc import _get_traces
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any, cast

from asgi_pprof.collectors.heap.sizes import size_class
from asgi_pprof.collectors.heap.sources import LineNames
from asgi_pprof.errors import PprofError, ProfileUnavailable
from asgi_pprof.forks import Renewed
from asgi_pprof.merge import sum_samples
from asgi_pprof.offload import yield_gil
from asgi_pprof.profile import Location, Sample, Stack, pseudo_location
from asgi_pprof.recorder import Recorder
from asgi_pprof.runtime.frames import collecting_off
from asgi_pprof.runtime.modules import code_filename
from asgi_pprof.stacks import TRUNCATED, UNKNOWN

ENGINE = "tracemalloc"

_TRACED_FRAMES = 16
_MAX_TRACES = 500_000  # of an application's own tracing
_TRACE_BYTES = 48  # that tracemalloc takes for a trace; more, if there are many tracebacks
_MAX_SITES = 16_384  # that have samples of their own
_OTHERS = pseudo_location("other stacks: beyond the 16,384 largest")

# In tracemalloc's form: (file, line) of each frame, leaf first.
_Frames = tuple[tuple[str, int], ...]
_Traceback = tuple[_Frames, int | None]  # frames, and the depth before they were cut
_Trace = tuple[int, int, _Frames, int | None]  # domain, size, and a traceback
_Site = tuple[_Traceback, int]  # a traceback, and a size class in bytes
_Usage = tuple[int, int]  # objects and bytes
_NONE = (0, 0)
_WINDOW = "window"  # the setting of those who trace for a while


class Tracing(Recorder):
    """
    Keeps tracemalloc on while it has users.

    Tracing that the application started is used and never stopped. (A `start` by the
    application while ours is on has no effect, and cannot be noticed.)
    """

    def __init__(self) -> None:
        super().__init__()
        self._witness: _Witness | None = None
        self._starts = 0

    def _enabled(self) -> None:
        if not tracemalloc.is_tracing():
            tracemalloc.start(_TRACED_FRAMES)
            self._witness = _Witness()
            self._starts += 1

    def _disabled(self, setting: Any) -> None:
        if not self._settings and self._witness is not None:
            # If the application has stopped and started tracing meanwhile, it is not ours.
            if self._witness.is_traced():
                tracemalloc.stop()
            self._witness = None

    def _renew_after_fork(self) -> None:
        self._settings = [each for each in self._settings if each != _WINDOW]
        self._disabled(None)

    @contextmanager
    def on(self) -> Iterator[None]:
        """
        Trace inside the `with`.

        Raises:
            PprofError: The application has stopped tracing meanwhile.
        """
        settings = self._settings
        self.enable(_WINDOW)
        try:
            witness = _Witness()
            yield
            if not witness.is_traced():
                raise PprofError("failed to collect profile: tracemalloc was stopped meanwhile")
        finally:
            if self._settings is settings:  # else this is a forked child, which has no such user
                self.disable(_WINDOW)

    def copy(self) -> Traces:
        """
        Return a copy of all traces, on any thread; it is empty if tracing has been stopped.

        Raises:
            ProfileUnavailable: The application traces too many blocks.
        """
        blocks = tracemalloc.get_tracemalloc_memory() // _TRACE_BYTES
        if self._witness is None and blocks > _MAX_TRACES:
            raise ProfileUnavailable(
                f"the application's own tracemalloc traces up to {blocks:,} blocks, and to copy"
                f" more than {_MAX_TRACES:,} would stop the process for too long;"
                " call tracemalloc.stop() or trace for a shorter time"
            )
        starts = self._starts  # read first: old traces must not count for a later start
        # take_snapshot() would raise an error if tracing has been stopped.
        with collecting_off():  # millions of new tuples would cause full collections
            traces = cast("list[_Trace]", _get_traces())
        return Traces(traces, tracemalloc.get_traceback_limit(), starts)


class _Witness:
    """An object whose allocation stays traced until tracing is stopped."""

    __slots__ = ()  # for an object with a dictionary, CPython 3.11 looks up a wrong address

    def is_traced(self) -> bool:
        return tracemalloc.get_object_traceback(self) is not None


@dataclass(frozen=True, slots=True)
class Traces:
    """
    A copy of tracemalloc's traces; their stacks are named later, since that allocates.

    `starts` is the number of times that `Tracing` had started tracing.
    """

    traces: list[_Trace]
    limit: int
    starts: int

    def samples(self, peaks: Peaks) -> tuple[Sample, ...]:
        """Return the samples of a heap profile, with the peaks as its allocations."""
        return peaks.samples(_sites(self.traces), self.starts)

    def comments(self, peaks: Peaks) -> tuple[str, ...]:
        """Return the comments of a heap profile."""
        comments = [
            f"engine: {ENGINE}, every block since tracing began, {self.limit} frames",
            "alloc_objects and alloc_space are lower bounds:"
            " tracemalloc forgets blocks when they are freed",
        ]
        return tuple(comments)


class Peaks(Renewed):
    """
    The maximum of objects and bytes seen alive at each site; at least these were allocated.

    The first snapshot's largest sites have a peak of their own, and later ones while
    there is room; all others share one, so that no peak ever falls.
    """

    def __init__(self) -> None:
        super().__init__()
        self._renew_after_fork()
        self._peaks: dict[_Site, _Usage] = {}
        self._others = _NONE
        self._starts = 0
        self._names = LineNames()
        self.last_count = 0

    def _renew_after_fork(self) -> None:
        self._lock = threading.Lock()

    def samples(self, live: dict[_Site, _Usage], starts: int) -> tuple[Sample, ...]:
        """Return peak and live usage by site, given the number of starts of tracing."""
        with self._lock:
            if self._starts != starts:
                # Tracing has been started again, with no traces, so a delta starts at 0.
                self._starts = starts
                self._peaks.clear()
                self._others = _NONE
            others = self._update(live)
            peaks = dict(self._peaks)
            self._names.begin()
            samples = sum_samples(
                Sample(
                    _stack(site[0], self._names),
                    (*peak, *live.get(site, _NONE)),
                    (("bytes", site[1]),),
                )
                for site, peak in peaks.items()
            )
            if self._others != _NONE:
                samples += (Sample((_OTHERS,), (*self._others, *others)),)
        self.last_count = len({sample.stack for sample in samples})
        return samples

    def _update(self, live: dict[_Site, _Usage]) -> _Usage:
        """Update the peaks; return the usage of the sites that have no peak of their own."""
        room = _MAX_SITES - len(self._peaks)
        new = ((used[1], site) for site, used in live.items() if site not in self._peaks)
        for _, site in heapq.nlargest(room, new, key=itemgetter(0)) if room else ():
            self._peaks[site] = _NONE
        objects, size = 0, 0
        for site, used in live.items():
            yield_gil()
            peak = self._peaks.get(site)
            if peak is None:
                objects, size = objects + used[0], size + used[1]
            else:
                self._peaks[site] = max(peak[0], used[0]), max(peak[1], used[1])
        self._others = max(self._others[0], objects), max(self._others[1], size)
        return objects, size


def _sites(traces: list[_Trace]) -> dict[_Site, _Usage]:
    """Return the live usage by site, without that of this package."""
    live: dict[_Site, _Usage] = {}
    for domain, size, frames, depth in traces:
        yield_gil()
        if domain == 0:  # Python's own memory
            site = (frames, depth), size_class(size)
            objects, total = live.get(site, _NONE)
            live[site] = objects + 1, total + size
    return {site: used for site, used in live.items() if not _is_ours(site[0][0])}


_PACKAGE = str(Path(Tracing.copy.__code__.co_filename).parents[2]) + os.sep
_TRACEMALLOC = code_filename(tracemalloc)
# Modules whose frames lie between the application's own.
_BETWEEN = {f"{_PACKAGE}{name}.py" for name in ("middleware", "labels")}


def _is_ours(frames: _Frames) -> bool:
    return frames[0][0] == _TRACEMALLOC or any(
        filename.startswith(_PACKAGE) and filename not in _BETWEEN for filename, _ in frames
    )


def _stack(traceback: _Traceback, names: LineNames) -> Stack:
    frames, depth = traceback
    stack: list[Location] = [names.location(filename, line) for filename, line in frames]
    if depth is not None and depth > len(frames):
        stack.append(TRUNCATED)
    return tuple(stack) or (UNKNOWN,)
