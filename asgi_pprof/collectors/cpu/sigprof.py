"""
Who uses SIGPROF and its timer: only one may, and the application comes first.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

from asgi_pprof.errors import ProfileBusy

_claimed_by = 0  # the process whose CPU is being profiled: a forked child's is not


def claim(is_inherited: Callable[[object], bool] = lambda handler: False) -> None:
    """
    Reserve SIGPROF for one CPU profile; pair with `release`.

    Args:
        is_inherited: Whether a handler is one of ours that a fork has left.

    Raises:
        ProfileBusy: A CPU profile is being taken, or the application uses
            SIGPROF or its timer.
    """
    global _claimed_by
    if _claimed_by == os.getpid():
        raise ProfileBusy("Could not enable CPU profiling: cpu profiling already in use")
    handler = signal.getsignal(signal.SIGPROF)
    if handler not in (signal.SIG_DFL, signal.SIG_IGN) and not is_inherited(handler):
        raise ProfileBusy(
            f"Could not enable CPU profiling: the application handles SIGPROF with {handler!r}"
        )
    if signal.getitimer(signal.ITIMER_PROF) != (0.0, 0.0):
        raise ProfileBusy("Could not enable CPU profiling: the application uses ITIMER_PROF")
    _claimed_by = os.getpid()


def release() -> None:
    """Let the next one have it."""
    global _claimed_by
    _claimed_by = 0
