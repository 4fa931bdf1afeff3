"""
What both engines share: the time that a CPU profile covers, and the profile itself.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable

from asgi_pprof.merge import sum_samples
from asgi_pprof.profile import Label, Profile, Sample, ValueType, pseudo_location

_SAMPLE_TYPES = (ValueType("samples", "count"), ValueType("cpu", "nanoseconds"))
_INTERVAL_S = 1.0


class Window:
    """The period of wall time that one profile covers, from when it is made until `end`."""

    def __init__(self, hz: int) -> None:
        self.period_ns = 1_000_000_000 // hz
        self._time_ns = time.time_ns()
        self._started_ns = time.monotonic_ns()
        self._duration_ns = 0

    async def wait(
        self, duration_s: float, stop: asyncio.Event, every_second: Callable[[], object]
    ) -> None:
        """Wait until the duration is over or `stop` is set, and call `every_second`."""
        deadline_ns = self._started_ns + round(duration_s * 1e9)
        while not stop.is_set() and (left_ns := deadline_ns - time.monotonic_ns()) > 0:
            try:
                await asyncio.wait_for(stop.wait(), min(left_ns / 1e9, _INTERVAL_S))
            except TimeoutError:
                pass
            every_second()

    def end(self) -> None:
        """End the period."""
        self._duration_ns = max(time.monotonic_ns() - self._started_ns, 1)

    def not_sampled(
        self, name: str, engine: str, cpu_ns: int, labels: tuple[Label, ...] = ()
    ) -> Sample:
        """Return the CPU time of a thread whose stacks the engine does not see."""
        place = pseudo_location(f"{name}: stack not sampled by the {engine} engine")
        return Sample((place,), (round(cpu_ns / self.period_ns), cpu_ns), labels)

    def profile(self, samples: Iterable[Sample], comments: Iterable[str]) -> Profile:
        """Return the CPU profile of the window; equal stacks are added up."""
        return Profile(
            sample_types=_SAMPLE_TYPES,
            samples=sum_samples(samples),
            period_type=ValueType("cpu", "nanoseconds"),
            period=self.period_ns,
            time_ns=self._time_ns,
            duration_ns=self._duration_ns,
            comments=tuple(comments),
        )
