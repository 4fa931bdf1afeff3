"""
threadcreate: where each thread was started.

What is measured: the stack that called `threading.Thread.start`, counted and
never forgotten, as Go counts threads ever created. `Thread.start` is wrapped
while a middleware lives, which costs about 10 us a thread started. Threads there
were before, counted once, have the stack `<unknown>`; threads started past
`threading` (`_thread`, C libraries) afterwards are missed.

Source: runtime/pprof, threadcreate; CPython, Lib/threading.py.
"""

from __future__ import annotations

import functools
import sys
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import FrameType
from typing import Any

from asgi_pprof.profile import Profile, count_profile
from asgi_pprof.recorder import Recorder
from asgi_pprof.runtime.frames import capture
from asgi_pprof.runtime.proc import native_thread_ids
from asgi_pprof.stacks import UNKNOWN, StackCounter, StackTotal, name_totals, stack_key


class ThreadStarts(Recorder):
    """
    Counts the stacks that start threads, while switched on; one for the process.

    Args:
        counter: Where they are counted.
    """

    def __init__(self, counter: StackCounter | None = None) -> None:
        super().__init__()
        # Of its own: no thread of the application waits while a recorder is switched.
        # Reentrant: a signal handler may start a thread while a start is recorded.
        self._counting = threading.RLock()
        self._before = 0
        self._counter = StackCounter(UNKNOWN) if counter is None else counter
        self._unrecorded = 0
        self._original: Callable[..., None] | None = None
        self._wrapper: Callable[..., None] | None = None

    def _enabled(self) -> None:
        if len(self._settings) > 1:
            return
        if not self._before:
            self._before = len(native_thread_ids()) or threading.active_count()
        self._original = threading.Thread.start
        self._wrapper = self._wrap(self._original)
        threading.Thread.start = self._wrapper  # type: ignore[method-assign]

    def _disabled(self) -> None:
        # A library that has wrapped our wrapper meanwhile keeps it; it then only delegates.
        if not self._settings and threading.Thread.start is self._wrapper:
            assert self._original is not None
            threading.Thread.start = self._original  # type: ignore[method-assign]

    def _renew_after_fork(self) -> None:
        self._counting = threading.RLock()

    def _wrap(self, original: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(original)
        def start(thread: threading.Thread, *args: Any, **kwargs: Any) -> None:
            original(thread, *args, **kwargs)
            if self._settings and self._wrapper is start:
                self._record(sys._getframe(1))

        return start

    def _record(self, frame: FrameType | None) -> None:
        try:
            stack = stack_key(capture(frame))
            # In a forked child another hook may start a thread before ours renews the lock.
            if not self._counting.acquire(timeout=0.1):
                self._unrecorded += 1
                return
            try:
                self._counter.add(stack, (1,))
            finally:
                self._counting.release()
        except Exception:
            self._unrecorded += 1

    def totals(self) -> list[StackTotal]:
        """Return the counts by stack, unknown ones by none."""
        unknown = StackTotal((), None, (), (self._before + self._unrecorded,))
        return [*self._counter.totals(), *([unknown] if unknown.values[0] else [])]

    def count(self) -> int:
        """Return how many threads have been counted."""
        return sum(total.values[0] for total in self.totals())


thread_starts = ThreadStarts()


class ThreadCreateCollector:
    """The stacks that created threads."""

    def count(self) -> int:
        """Return the number of threads ever created, as far as known."""
        return thread_starts.count()

    def note(self) -> str:
        """Return nothing: it is always on."""
        return ""

    def window(self) -> AbstractContextManager[None]:
        """Return a manager that does nothing."""
        return nullcontext()

    async def snapshot(self) -> Callable[[], Profile]:
        """Give threadcreate/count by the stack that called `Thread.start`."""
        totals, time_ns = thread_starts.totals(), time.time_ns()
        return lambda: count_profile("threadcreate", name_totals(totals), time_ns)
