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
the GIL while it copies the traces, for 0.3 us per live block. Nothing while it is off.

What it misses: memory from before tracing began and that of C libraries; frames beyond
the traceback limit (16 here); functions: it knows lines, and `sources` names the
innermost of the functions that a line belongs to.

Source: CPython, Modules/_tracemalloc.c, Lib/tracemalloc.py; runtime/mprof.go.
"""

from __future__ import annotations

import os
import threading
import tracemalloc
from _tracemalloc import _get_traces
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from asgi_pprof.collectors.heap.sizes import size_class
from asgi_pprof.collectors.heap.sources import LineNames
from asgi_pprof.errors import PprofError
from asgi_pprof.merge import sum_samples
from asgi_pprof.profile import Location, Sample, Stack
from asgi_pprof.recorder import Recorder
from asgi_pprof.runtime.modules import code_filename
from asgi_pprof.stacks import TRUNCATED, UNKNOWN

ENGINE = "tracemalloc"

_TRACED_FRAMES = 16
_MAX_PEAKS = 65_536  # sites whose peak is remembered

# In tracemalloc's form: (file, line) of each frame, leaf first.
_Frames = tuple[tuple[str, int], ...]
_Traceback = tuple[_Frames, int | None]  # frames, and the depth before they were cut
_Trace = tuple[int, int, _Frames, int | None]  # domain, size, and a traceback
_Site = tuple[_Traceback, int]  # a traceback, and a size class in bytes
_Usage = tuple[int, int]  # objects and bytes
_NONE = (0, 0)


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

    @contextmanager
    def on(self) -> Iterator[None]:
        """
        Trace inside the `with`.

        Raises:
            PprofError: The application has stopped tracing meanwhile.
        """
        self.enable()
        try:
            witness = _Witness()
            yield
            if not witness.is_traced():
                raise PprofError("failed to collect profile: tracemalloc was stopped meanwhile")
        finally:
            self.disable()

    def copy(self) -> Traces:
        """Return a copy of all traces, on any thread; it is empty if tracing has been stopped."""
        starts = self._starts  # first: old traces must not count for a later start
        # Not by take_snapshot(), which would raise in that case.
        traces = cast("list[_Trace]", _get_traces())
        return Traces(traces, tracemalloc.get_traceback_limit(), starts)


class _Witness:
    """An object whose allocation is traced as long as tracing has not been stopped since."""

    __slots__ = ()  # for an object with a dictionary CPython 3.11 looks up a wrong address

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
        if peaks.full:
            comments.append(
                f"alloc_* of stacks beyond the first {_MAX_PEAKS} count live blocks only"
            )
        return tuple(comments)


class Peaks:
    """The maximum of objects and bytes seen alive at each site; at least these were allocated."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._peaks: dict[_Site, _Usage] = {}
        self._starts = 0
        self.last_count = 0

    @property
    def full(self) -> bool:
        """Return whether there is no room for new sites."""
        return len(self._peaks) >= _MAX_PEAKS

    def samples(self, live: dict[_Site, _Usage], starts: int) -> tuple[Sample, ...]:
        """Return peak and live usage by site, given the number of starts of tracing."""
        with self._lock:
            if self._starts != starts:
                # Tracing has been started again, without traces: a delta starts at 0.
                self._starts = starts
                self._peaks.clear()
            for site, (objects, size) in live.items():
                peak = self._peaks.get(site)
                if peak is not None:
                    self._peaks[site] = max(peak[0], objects), max(peak[1], size)
                elif not self.full:
                    self._peaks[site] = objects, size
            peaks = dict(self._peaks)
        names = LineNames()
        samples = sum_samples(
            Sample(
                _stack(site[0], names),
                (*peak, *live.get(site, _NONE)),
                (("bytes", site[1]),),
            )
            for site, peak in {**live, **peaks}.items()
        )
        self.last_count = len({sample.stack for sample in samples})
        return samples


def _sites(traces: list[_Trace]) -> dict[_Site, _Usage]:
    """Return the live usage by site, without that of this package."""
    live: dict[_Site, _Usage] = {}
    for domain, size, frames, depth in traces:
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
