"""
Reserves SIGPROF and its timer: only one profile may use them, and the application comes first.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

from asgi_pprof.errors import ProfileBusy


class SigprofClaim:
    """Knows whether a CPU profile of this process uses SIGPROF."""

    def __init__(self) -> None:
        self._claimed_by = 0  # a process id, because a forked child's profile is its own

    def claim(self, is_inherited: Callable[[object], bool] = lambda handler: False) -> None:
        """
        Reserve SIGPROF for one CPU profile; pair with `release`.

        Args:
            is_inherited: Whether a handler is ours, left over in a forked child.

        Raises:
            ProfileBusy: A CPU profile is being taken, or the application uses
                SIGPROF or its timer.
        """
        if self._claimed_by == os.getpid():
            raise ProfileBusy("Could not enable CPU profiling: cpu profiling already in use")
        handler = signal.getsignal(signal.SIGPROF)
        if handler not in (signal.SIG_DFL, signal.SIG_IGN) and not is_inherited(handler):
            raise ProfileBusy(
                f"Could not enable CPU profiling: the application handles SIGPROF with {handler!r}"
            )
        if signal.getitimer(signal.ITIMER_PROF) != (0.0, 0.0):
            raise ProfileBusy("Could not enable CPU profiling: the application uses ITIMER_PROF")
        self._claimed_by = os.getpid()

    def release(self) -> None:
        """Make SIGPROF available to the next profile."""
        self._claimed_by = 0


sigprof_claim = SigprofClaim()
