"""
block and mutex: where time is lost waiting, and who made others wait.

Not collected: both rates are 0, as Go's are until they are set, and this
release has no collector behind them. The profiles are valid and empty, the
way Go answers while a rate is unset, so that scrapers which ask for them by
default are content. A comment and the index say that they are off.

Source: runtime/pprof, writeBlock and writeMutex; runtime.SetBlockProfileRate.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from asgi_pprof.profile import Profile, ValueType

OFF = "off: contention is not recorded"


class ContentionCollector:
    """A contention profile whose rate is 0."""

    def count(self) -> int:
        """Return 0: there are no records."""
        return 0

    def note(self) -> str:
        """Return that it is off."""
        return OFF

    def window(self) -> AbstractContextManager[None]:
        """Return a manager that does nothing."""
        return nullcontext()

    async def snapshot(self) -> Callable[[], Profile]:
        """Give a valid profile without samples: contentions/count, delay/nanoseconds."""
        profile = Profile(
            sample_types=(
                ValueType("contentions", "count"),
                ValueType("delay", "nanoseconds"),
            ),
            samples=(),
            period_type=ValueType("contentions", "count"),
            period=1,
            time_ns=time.time_ns(),
            comments=(OFF,),
        )
        return lambda: profile
