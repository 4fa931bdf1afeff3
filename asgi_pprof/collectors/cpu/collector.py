"""
The CPU profile, from the best engine that works here: native, else signal.

`native_engine` and `signal_engine` say what they measure, how, and what that
costs and misses.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable

from asgi_pprof.collectors.cpu import native_engine, signal_engine
from asgi_pprof.errors import ProfileUnavailable
from asgi_pprof.profile import Profile


class CpuCollector:
    """Takes CPU profiles of this process, one at a time."""

    def note(self) -> str:
        """Return which engine is used, and why not the better one, or why none works."""
        missing = native_engine.why_not()
        if not missing:
            return f"engine: {native_engine.ENGINE}"
        if not signal_engine.is_supported():
            return f"unavailable: needs SIGPROF, which {sys.platform} lacks"
        return (
            f"engine: {signal_engine.ENGINE}, which samples the main thread only"
            f" (no {native_engine.ENGINE} one: {missing})"
        )

    async def collect(
        self, duration_s: float, stop: asyncio.Event, hz: int
    ) -> Callable[[], Profile]:
        """
        Profile the CPU for some seconds of wall time, or until `stop` is set.

        The signal engine must be called on an event loop in the main thread,
        the native one anywhere.

        Args:
            duration_s: How long to sample.
            stop: Ends the profile early.
            hz: Samples a second of CPU time, in each thread.

        Returns:
            A function that gives samples/count and cpu/nanoseconds. `time_ns` is the start.

        Raises:
            ProfileBusy: A CPU profile is being taken, or SIGPROF or its timer
                is in use by the application.
            ProfileUnavailable: No engine works here.
        """
        if not native_engine.why_not():
            profile = await native_engine.collect(duration_s, stop, hz)
            return lambda: profile
        if not signal_engine.is_supported():
            raise ProfileUnavailable(
                f"CPU profiles need the {native_engine.ENGINE} engine"
                f" ({native_engine.why_not()}) or SIGPROF"
            )
        profile = await signal_engine.collect(duration_s, stop, hz)
        return lambda: profile
