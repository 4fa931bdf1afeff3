"""
The sources of profiles: snapshots, and profiles that take time to record.

Both kinds are called on the event loop that serves the request, and hand slow
work to a thread.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from asgi_pprof.profile import Profile


class SnapshotCollector(Protocol):
    """Takes totals at one moment; two snapshots make a delta."""

    def count(self) -> int:
        """Return the number for the index page, cheaply; 0 when nothing is known."""

    def note(self) -> str:
        """Return a remark for the index page, such as that the profile is off, or ""."""

    def window(self) -> AbstractContextManager[None]:
        """Return a manager that keeps recording on between the two snapshots of a delta."""

    async def snapshot(self) -> Callable[[], Profile]:
        """
        Copy the totals now; return a function that makes the profile of them.

        The function may be slow: it is called once, on any thread, after the
        window is closed. The profile has the time of the copy and no duration.
        """


class AlwaysOn:
    """The parts of a snapshot collector that has nothing to switch on."""

    def note(self) -> str:
        """Return ""."""
        return ""

    def window(self) -> AbstractContextManager[None]:
        """Return a manager that does nothing."""
        return nullcontext()


class TimedCollector(Protocol):
    """Records what happens during some seconds."""

    async def collect(
        self, duration_s: float, stop: asyncio.Event, hz: int
    ) -> Callable[[], Profile]:
        """
        Record for some seconds, or until `stop` is set; return a function that gives the profile.

        Raises:
            ProfileBusy: A profile of this kind is being recorded already.
            ProfileUnavailable: This process cannot record one.
        """
