"""
Where profiles come from, one module per source.

Two kinds, two Protocols: what can be read at one moment, and what has to be
watched for a while. Both are called on the event loop that serves the request;
what is slow they hand to a thread.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

from asgi_pprof.profile import Profile


class SnapshotCollector(Protocol):
    """A profile of totals at one moment; two of them make a delta."""

    def count(self) -> int:
        """Return the number for the index page; cheap, and 0 when nothing is known."""

    def note(self) -> str:
        """Return what the index page should say, such as that it is off; "" if nothing."""

    def window(self) -> AbstractContextManager[None]:
        """Return a manager that holds on whatever a delta needs to see its seconds."""

    async def snapshot(self) -> Callable[[], Profile]:
        """
        Take the totals now, and return a function that makes the profile of them.

        That function may be slow; it runs on any thread, once, after the
        window is closed. The profile's `time_ns` is now, it has no duration.
        """


class TimedCollector(Protocol):
    """A profile of what happens during some seconds."""

    async def collect(self, duration_s: float, stop: asyncio.Event, hz: int) -> Profile:
        """
        Return a profile of the next seconds, or of those until `stop` is set.

        Args:
            duration_s: How long.
            stop: Ends it early.
            hz: How many samples to take in a second.

        Raises:
            ProfileBusy: It is taken already.
            ProfileUnavailable: This process cannot take it.
        """
