"""
The CPU profile, from the best engine there is: native, else signal.

See `cpu_native` and `cpu_signal` for what each measures, how, and what it
costs and misses.
"""

from __future__ import annotations

import asyncio
import sys

from asgi_pprof.collectors import cpu_native, cpu_signal
from asgi_pprof.errors import ProfileUnavailable
from asgi_pprof.profile import Profile


class CpuCollector:
    """The CPU profile of this process; one at a time, whoever asks."""

    def note(self) -> str:
        """Return which engine serves and why not the better one, or why none can."""
        missing = cpu_native.why_not()
        if not missing:
            return f"engine: {cpu_native.ENGINE}"
        if not cpu_signal.is_supported():
            return f"unavailable: needs SIGPROF, which {sys.platform} lacks"
        return (
            f"engine: {cpu_signal.ENGINE}, which samples the main thread only"
            f" (no {cpu_native.ENGINE} one: {missing})"
        )

    async def collect(self, duration_s: float, stop: asyncio.Event, hz: int) -> Profile:
        """
        Profile the CPU for some seconds of wall time, or until `stop` is set.

        The signal engine must be called on an event loop in the main thread,
        the native one anywhere.

        Args:
            duration_s: How long.
            stop: Ends it early.
            hz: Samples a second of CPU time, in each thread.

        Returns:
            Samples/count and cpu/nanoseconds. `time_ns` is the start.

        Raises:
            ProfileBusy: A CPU profile is being taken, or SIGPROF or its timer
                is in use by the application.
            ProfileUnavailable: No engine works here.
        """
        if not cpu_native.why_not():
            return await cpu_native.collect(duration_s, stop, hz)
        if not cpu_signal.is_supported():
            raise ProfileUnavailable(
                f"CPU profiles need the {cpu_native.ENGINE} engine"
                f" ({cpu_native.why_not()}) or SIGPROF"
            )
        return await cpu_signal.collect(duration_s, stop, hz)
