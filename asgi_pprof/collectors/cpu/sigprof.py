"""
Reserves SIGPROF and its timer: only one profile may use them, and the application comes first.

A SIGPROF that finds its default action ends the process, and a timer goes on in the
program that `os.exec*` starts. So while SIGPROF is ours, `signal.signal` and these
functions first end the sampling. Code in C that does the same is not noticed in time.
"""

from __future__ import annotations

import importlib
import os
import signal
import threading
from collections.abc import Callable
from typing import Any

from asgi_pprof.errors import ProfileBusy

_signal: Any = importlib.import_module("_signal")  # which `signal.signal` calls


class SigprofClaim:
    """Knows whether a CPU profile of this process uses SIGPROF."""

    def __init__(self) -> None:
        self._claimed_by = 0  # a process id, because a forked child's profile is its own
        self._replaced: list[tuple[Any, str, Any, Any]] = []

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
        self.unguard()
        self._claimed_by = 0

    def guard(self, give_up: Callable[[], None]) -> None:
        """
        Call a function just before the application sets SIGPROF, or starts another program.

        Until `unguard` or `release`. The function must put back how SIGPROF was.
        """
        claimed_by = self._claimed_by

        def give_up_if_ours() -> None:
            if self._claimed_by == claimed_by == os.getpid():
                give_up()

        def before_handler(number: Any = None, *_: Any) -> None:
            is_main = threading.get_ident() == threading.main_thread().ident  # else it fails
            if number == signal.SIGPROF and is_main:
                give_up_if_ours()

        self._call_before(_signal, "signal", before_handler)
        for name in ("execv", "execve"):
            self._call_before(os, name, lambda *_, **__: give_up_if_ours())

    def _call_before(self, owner: Any, name: str, first: Callable[..., None]) -> None:
        original = getattr(owner, name)

        def ours(*args: Any, **kwargs: Any) -> Any:
            first(*args, **kwargs)
            return original(*args, **kwargs)

        self._replaced.append((owner, name, original, ours))
        setattr(owner, name, ours)

    def unguard(self) -> None:
        """Put the functions back, except where somebody else has replaced ours meanwhile."""
        while self._replaced:
            owner, name, before, ours = self._replaced.pop()
            if getattr(owner, name) is ours:
                setattr(owner, name, before)


sigprof_claim = SigprofClaim()
