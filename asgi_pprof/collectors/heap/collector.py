"""
The heap profile, from the engine that is on: native, else tracemalloc.

See `sampler` and `tracing` for what each measures, how, and what
it costs and misses.
"""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from asgi_pprof.collectors.heap import sampler, tracing
from asgi_pprof.collectors.heap.sampler import heap_sampler
from asgi_pprof.collectors.heap.tracing import Peaks, Traces
from asgi_pprof.collectors.heap.tracing import tracing as trace_switch
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
    The heap as sampled or traced; `allocs` is the same with another default.

    Args:
        default_sample_type: "alloc_space" for `allocs`, "" for `heap`.
        peaks: The tracemalloc engine's memory of past allocations, shared by the two.
    """

    def __init__(self, peaks: Peaks, default_sample_type: str = "") -> None:
        self._peaks = peaks
        self._default_sample_type = default_sample_type

    def count(self) -> int:
        """Return the number of stacks seen; with tracemalloc, those of the last snapshot."""
        if heap_sampler.is_on():
            return heap_sampler.stack_count()
        return self._peaks.last_count if tracemalloc.is_tracing() else 0

    def note(self) -> str:
        """Return which engine serves, or how to switch one on."""
        if heap_sampler.is_on():
            return f"engine: {sampler.ENGINE}"
        if tracemalloc.is_tracing():
            return f"engine: {tracing.ENGINE}"
        return f"{OFF} (no {sampler.ENGINE} engine: {heap_sampler.why_off()})"

    def window(self) -> AbstractContextManager[None]:
        """Return a manager that traces inside, unless samples are there anyhow."""
        return nullcontext() if heap_sampler.resume() else trace_switch.on()

    async def snapshot(self) -> Callable[[], Profile]:
        """Give live memory, not scaled; with a comment that says why while nothing is seen."""
        time_ns = time.time_ns()
        if heap_sampler.resume():
            heap = await run_in_thread(heap_sampler.copy)
            return lambda: self._profile(heap.samples(), time_ns, heap.comments, heap.rate)
        if tracemalloc.is_tracing():
            traces = await run_in_thread(Traces.copy)
            return lambda: self._profile(
                traces.samples(self._peaks), time_ns, traces.comments(self._peaks)
            )
        return lambda: self._profile((), time_ns, (f"heap profiling is {self.note()}",))

    def _profile(
        self, samples: tuple[Sample, ...], time_ns: int, comments: tuple[str, ...], period: int = 1
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
