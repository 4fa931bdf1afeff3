"""
heap and allocs, from the native engine if that is on, else from tracemalloc.

`sampler` and `tracing` tell what each engine measures, how, and what it costs and misses.
"""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

from asgi_pprof.collectors.heap import sampler, tracing
from asgi_pprof.collectors.heap.sampler import HeapSampler
from asgi_pprof.collectors.heap.tracing import Peaks, Tracing
from asgi_pprof.offload import run_in_thread
from asgi_pprof.profile import Profile, Sample, ValueType

OFF = (
    "off: no allocations are seen; take heap?seconds=N to trace for N seconds,"
    ' or build the middleware with heap="tracemalloc"'
)

_SAMPLE_TYPES = (
    ValueType("alloc_objects", "count"),
    ValueType("alloc_space", "bytes"),
    ValueType("inuse_objects", "count"),
    ValueType("inuse_space", "bytes"),
)


class HeapCollector:
    """
    Takes profiles from the engine that is on.

    Args:
        sampler: The native engine.
        tracing: The tracemalloc engine.
        peaks: The past allocations that tracemalloc saw, shared by `heap` and `allocs`.
        default_sample_type: "alloc_space" for `allocs`, "" for `heap`.
    """

    def __init__(
        self, sampler: HeapSampler, tracing: Tracing, peaks: Peaks, default_sample_type: str = ""
    ) -> None:
        self._sampler = sampler
        self._tracing = tracing
        self._peaks = peaks
        self._default_sample_type = default_sample_type

    def count(self) -> int:
        """Return the number of stacks sampled, or of those in the last tracemalloc snapshot."""
        if self._sampler.is_on():
            return self._sampler.stack_count()
        return self._peaks.last_count if tracemalloc.is_tracing() else 0

    def note(self) -> str:
        """Return the name of the engine that is on, or how to switch one on."""
        if self._sampler.is_on():
            return f"engine: {sampler.ENGINE}"
        if tracemalloc.is_tracing():
            return f"engine: {tracing.ENGINE}"
        return f"{OFF} (no {sampler.ENGINE} engine: {self._sampler.why_off()})"

    def window(self) -> AbstractContextManager[None]:
        """Return a manager that switches tracemalloc on unless the native engine is on."""
        return nullcontext() if self._sampler.resume() else self._tracing.on()

    async def snapshot(self) -> Callable[[], Profile]:
        """Copy allocated and live memory, not scaled; without an engine, only a comment."""
        time_ns = time.time_ns()
        if self._sampler.resume():
            heap = await run_in_thread(self._sampler.copy)
            return lambda: self._profile(heap.samples(), time_ns, heap.comments, heap.rate)
        if tracemalloc.is_tracing():
            traces = await run_in_thread(self._tracing.copy)
            return lambda: self._profile(
                traces.samples(self._peaks), time_ns, traces.comments(self._peaks)
            )
        return lambda: self._profile((), time_ns, (f"heap profiling is {self.note()}",))

    def _profile(
        self, samples: Sequence[Sample], time_ns: int, comments: tuple[str, ...], period: int = 1
    ) -> Profile:
        return Profile(
            sample_types=_SAMPLE_TYPES,
            samples=samples,
            period_type=ValueType("space", "bytes"),
            period=period,
            time_ns=time_ns,
            default_sample_type=self._default_sample_type,
            comments=comments,
        )
