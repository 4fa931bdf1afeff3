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
import time
import tracemalloc
from _tracemalloc import _get_traces
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import cast

from asgi_pprof.errors import PprofError
from asgi_pprof.merge import sum_samples
from asgi_pprof.offload import run_in_thread
from asgi_pprof.profile import Location, Profile, Sample, Stack, ValueType
from asgi_pprof.sources import LineNames
from asgi_pprof.stacks import TRUNCATED, UNKNOWN

ENGINE = "tracemalloc"
OFF = (
    "off: no allocations are seen; take heap?seconds=N to trace for N seconds,"
    ' or build the middleware with heap="tracemalloc"'
)

_TRACED_FRAMES = 16
_MAX_PEAKS = 65_536  # stacks and sizes whose lower bound is remembered
_SMALL = 512  # pymalloc serves up to here, in classes of 16 bytes
_SAMPLE_TYPES = (
    ValueType("alloc_objects", "count"),
    ValueType("alloc_space", "bytes"),
    ValueType("inuse_objects", "count"),
    ValueType("inuse_space", "bytes"),
)

# As tracemalloc keeps them: ((file, line), ...) leaf first, and the whole depth.
_Frames = tuple[tuple[str, int], ...]
_Traceback = tuple[_Frames, int | None]
_Trace = tuple[int, int, _Frames, int | None]  # domain, size, frames, whole depth
_Site = tuple[_Traceback, int]  # a traceback and a size class in bytes
_NONE = (0, 0)  # objects and bytes


class Tracing:
    """
    tracemalloc, switched on while anybody needs it; one for the process.

    Tracing that the application started is used and never stopped. (A `start`
    of the application's while ours is on does nothing, and cannot be noticed.)
    """

    def __init__(self) -> None:
        # Reentrant: a finalizer may disable in the middle of enabling.
        self._lock = threading.RLock()
        self._users = 0
        self._witness: _Witness | None = None
        self.starts = 0

    def enable(self) -> None:
        """Start tracing unless it is on; pair with `disable`."""
        with self._lock:
            self._users += 1
            if not tracemalloc.is_tracing():
                tracemalloc.start(_TRACED_FRAMES)
                self._witness = _Witness()
                self.starts += 1

    def disable(self) -> None:
        """Stop tracing if it was started here and nobody else needs it."""
        with self._lock:
            self._users -= 1
            if self._users == 0 and self._witness is not None:
                # Stopped and started by the application meanwhile, it is not ours.
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


class HeapCollector:
    """
    The heap as tracemalloc sees it; `allocs` is the same with another default.

    Args:
        default_sample_type: "alloc_space" for `allocs`, "" for `heap`.
        peaks: The lower bounds of past allocations, shared by the two.
    """

    def __init__(self, peaks: Peaks, default_sample_type: str = "") -> None:
        self._peaks = peaks
        self._default_sample_type = default_sample_type
        self.window = tracing.on

    def count(self) -> int:
        """Return the number of stacks of the last snapshot; a new one would cost too much here."""
        return self._peaks.last_count if tracemalloc.is_tracing() else 0

    def note(self) -> str:
        """Return how to switch it on while it is off, else which engine serves."""
        return f"engine: {ENGINE}" if tracemalloc.is_tracing() else OFF

    async def snapshot(self) -> Callable[[], Profile]:
        """Give live memory; without samples, and with a comment, while nothing is traced."""
        if not tracemalloc.is_tracing():
            profile = self._profile((), time.time_ns(), (f"heap profiling is {OFF}",))
            return lambda: profile
        # Only copied here: adding up and naming allocate, and would be traced.
        traces = await run_in_thread(_copy_traces)
        limit, starts = tracemalloc.get_traceback_limit(), tracing.starts
        return partial(self._build, traces, time.time_ns(), limit, starts)

    def _build(self, traces: list[_Trace], time_ns: int, limit: int, starts: int) -> Profile:
        samples = self._peaks.samples(_sites(traces), starts)
        comments = [
            f"engine: {ENGINE}, every block since tracing began, {limit} frames",
            "alloc_objects and alloc_space are lower bounds:"
            " tracemalloc forgets blocks when they are freed",
        ]
        if self._peaks.full:
            comments.append(
                f"alloc_* of stacks beyond the first {_MAX_PEAKS} count live blocks only"
            )
        return self._profile(samples, time_ns, tuple(comments))

    def _profile(
        self, samples: tuple[Sample, ...], time_ns: int, comments: tuple[str, ...]
    ) -> Profile:
        return Profile(
            sample_types=_SAMPLE_TYPES,
            samples=samples,
            period_type=ValueType("space", "bytes"),
            period=1,
            time_ns=time_ns,
            default_sample_type=self._default_sample_type,
            comments=comments,
        )


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


def size_class(size: int) -> int:
    """
    Return the size of the block that serves a request of this size.

    pymalloc's classes up to 512 bytes, powers of two beyond: sizes that differ
    by a few bytes share a sample, as Go's size classes make them.
    """
    if size <= _SMALL:
        return max(16, -(-size // 16) * 16)
    return int(1 << (size - 1).bit_length())


def _copy_traces() -> list[_Trace]:
    # [] if somebody has stopped tracing meanwhile, where take_snapshot() would raise.
    return cast("list[_Trace]", _get_traces())


def _sites(traces: list[_Trace]) -> dict[_Site, tuple[int, int]]:
    """Return objects and bytes by site, without our own."""
    live: dict[_Site, tuple[int, int]] = {}
    for domain, size, frames, depth in traces:
        if domain == 0:  # Python's own memory
            site = (frames, depth), size_class(size)
            objects, total = live.get(site, _NONE)
            live[site] = objects + 1, total + size
    return {site: used for site, used in live.items() if not _is_ours(site[0][0])}


_PACKAGE = str(Path(__file__).parent.parent) + os.sep
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
