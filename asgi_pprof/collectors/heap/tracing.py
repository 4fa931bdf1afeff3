"""
Live memory by the stack that allocated it: the tracemalloc engine.

What is measured: every block Python's allocators have handed out since tracing
began and that is still alive, by stack and size class: inuse_objects,
inuse_space. tracemalloc forgets freed blocks, so alloc_objects and alloc_space
are lower bounds: the most of each that was ever seen alive in a snapshot. They
never fall, as scrapers that subtract need it.

How: `tracemalloc`, which sees every allocation (period 1, nothing is scaled).
It is on while the application has it on, while a middleware with
`heap="tracemalloc"` lives, or for the length of one `?seconds=N`.

What it costs: 7 times the run time of code that does nothing but allocate with
one frame a stack, 16 times with 25; 3 to 11 times the CPU of a FastAPI
request. A snapshot holds the GIL while it copies the traces, 0.3 us a live
block. Off costs nothing.

What it misses: what was allocated before tracing began, C libraries' own
memory, and frames beyond the traceback limit (16 here). It knows lines, not
functions: names come from the compiled modules, and where a line belongs to
several functions the innermost is named.

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
from typing import cast

from asgi_pprof.collectors.heap.sizes import size_class
from asgi_pprof.collectors.heap.sources import LineNames
from asgi_pprof.errors import PprofError
from asgi_pprof.merge import sum_samples
from asgi_pprof.profile import Location, Sample, Stack
from asgi_pprof.recorder import Recorder
from asgi_pprof.stacks import TRUNCATED, UNKNOWN

ENGINE = "tracemalloc"

_TRACED_FRAMES = 16
_MAX_PEAKS = 65_536  # stacks and sizes whose lower bound is remembered

# As tracemalloc keeps them: ((file, line), ...) leaf first, and the whole depth.
_Frames = tuple[tuple[str, int], ...]
_Traceback = tuple[_Frames, int | None]
_Trace = tuple[int, int, _Frames, int | None]  # domain, size, frames, whole depth
_Site = tuple[_Traceback, int]  # a traceback and a size class in bytes
_NONE = (0, 0)  # objects and bytes


class Tracing(Recorder):
    """
    tracemalloc, switched on while it has users.

    Tracing that the application started is used and never stopped. (A `start`
    by the application while ours is on has no effect, and cannot be noticed.)
    """

    def __init__(self) -> None:
        super().__init__()
        self._witness: _Witness | None = None
        self.starts = 0

    def _enabled(self) -> None:
        if not tracemalloc.is_tracing():
            tracemalloc.start(_TRACED_FRAMES)
            self._witness = _Witness()
            self.starts += 1

    def _disabled(self) -> None:
        if not self._settings and self._witness is not None:
            # Tracing that the application has stopped and started meanwhile is not ours.
            if self._witness.is_traced():
                tracemalloc.stop()
            self._witness = None

    @contextmanager
    def on(self) -> Iterator[None]:
        """
        Trace inside the `with`.

        Raises:
            PprofError: At the end, if somebody else has stopped the tracing.
        """
        self.enable()
        try:
            witness = _Witness()
            yield
            if not witness.is_traced():
                raise PprofError("failed to collect profile: tracemalloc was stopped meanwhile")
        finally:
            self.disable()


class _Witness:
    """An object made while tracing is on, which is known as long as it has been on since."""

    __slots__ = ()  # with a dictionary, CPython 3.11 looks for it in the wrong place

    def is_traced(self) -> bool:
        return tracemalloc.get_object_traceback(self) is not None


tracing = Tracing()


@dataclass(frozen=True, slots=True)
class Traces:
    """What tracemalloc knew at one moment, copied: naming it would allocate, and be traced."""

    traces: list[_Trace]
    limit: int
    starts: int

    @classmethod
    def copy(cls) -> Traces:
        """Copy them; [] if somebody has stopped tracing meanwhile."""
        # Not take_snapshot(), which would raise then.
        traces = cast("list[_Trace]", _get_traces())
        return cls(traces, tracemalloc.get_traceback_limit(), tracing.starts)

    def samples(self, peaks: Peaks) -> tuple[Sample, ...]:
        """Return a heap profile's samples; allocations are what `peaks` has ever seen."""
        return peaks.samples(_sites(self.traces), self.starts)

    def comments(self, peaks: Peaks) -> tuple[str, ...]:
        """Return what a reader should know of them."""
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
    """The most objects and bytes ever seen alive at each site: what was allocated at the least."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._peaks: dict[_Site, tuple[int, int]] = {}
        self._starts = 0
        self.last_count = 0

    @property
    def full(self) -> bool:
        """Whether new sites are no longer remembered."""
        return len(self._peaks) >= _MAX_PEAKS

    def samples(self, live: dict[_Site, tuple[int, int]], starts: int) -> tuple[Sample, ...]:
        """
        Return live and peak totals by site.

        Args:
            live: Objects and bytes that are alive.
            starts: How often tracing had been started then.
        """
        with self._lock:
            if self._starts != starts:
                # Traced anew, from nothing: a window's delta starts at 0.
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
                (*peaks.get(site, live.get(site, _NONE)), *live.get(site, _NONE)),
                (("bytes", site[1]),),
            )
            for site in {**peaks, **live}
        )
        self.last_count = len({sample.stack for sample in samples})
        return samples


def _sites(traces: list[_Trace]) -> dict[_Site, tuple[int, int]]:
    """Return objects and bytes by site, without our own."""
    live: dict[_Site, tuple[int, int]] = {}
    for domain, size, frames, depth in traces:
        if domain == 0:  # Python's own memory
            site = (frames, depth), size_class(size)
            objects, total = live.get(site, _NONE)
            live[site] = objects + 1, total + size
    return {site: used for site, used in live.items() if not _is_ours(site[0][0])}


_PACKAGE = str(Path(__file__).parents[2]) + os.sep
# What the application's own calls go through.
_PASSED_THROUGH = {f"{_PACKAGE}{name}.py" for name in ("middleware", "labels")}


def _is_ours(frames: _Frames) -> bool:
    return frames[0][0] == tracemalloc.__file__ or any(
        filename.startswith(_PACKAGE) and filename not in _PASSED_THROUGH for filename, _ in frames
    )


def _stack(traceback: _Traceback, names: LineNames) -> Stack:
    frames, depth = traceback
    stack: list[Location] = [names.location(filename, line) for filename, line in frames]
    if depth is not None and depth > len(frames):
        stack.append(TRUNCATED)
    return tuple(stack) or (UNKNOWN,)
