"""
threadcreate: the stacks that started threads.

What is measured: calls of `threading.Thread.start`, by stack. Counts never fall,
because Go counts all threads ever created.

How: `Thread.start` is wrapped while a middleware lives.

What it costs: about 10 us for each thread that is started.

What it misses: the stacks of threads that were there before, which are counted
once, under `<unknown>`; and threads that are started later without `threading`
(by `_thread` or by C libraries).

Source: runtime/pprof, threadcreate; CPython, Lib/threading.py.
"""

from __future__ import annotations

import functools
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

from asgi_pprof.collectors import AlwaysOn
from asgi_pprof.profile import Profile, count_profile
from asgi_pprof.recorder import Recorder
from asgi_pprof.runtime.frames import capture
from asgi_pprof.runtime.proc import native_thread_ids
from asgi_pprof.stacks import UNKNOWN, StackCounter, StackKey, StackTotal, name_totals, stack_key


class ThreadStarts(Recorder):
    """Counts the stacks that start threads."""

    def __init__(self, counter: StackCounter | None = None) -> None:
        super().__init__()
        # Not the lock of the recorders: the application's threads must not wait for
        # that. Reentrant: a signal handler may start a thread during a recording.
        self._counting = threading.RLock()
        self._before = 0
        self._counter = StackCounter(UNKNOWN) if counter is None else counter
        self._unrecorded = 0
        self._original: Callable[..., None] | None = None
        self._wrapper: Callable[..., None] | None = None

    def _enabled(self) -> None:
        if self._users > 1:
            return
        if not self._before:
            self._before = len(native_thread_ids()) or threading.active_count()
        self._original = threading.Thread.start
        self._wrapper = self._wrap(self._original)
        threading.Thread.start = self._wrapper  # type: ignore[method-assign]

    def memory_bytes(self) -> int:
        return self._counter.memory_bytes()

    def _disabled(self, setting: Any) -> None:
        # If another library has wrapped our wrapper meanwhile, it stays in place and
        # only delegates.
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
            # In a forked child, another library's fork hook may start a thread before
            # our hook has renewed the lock.
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
        """Return the counts by stack; threads of unknown stack are under the empty one."""
        unknown = StackTotal(StackKey(), None, (), (self._before + self._unrecorded,))
        return [*self._counter.totals(), *([unknown] if unknown.values[0] else [])]

    def count(self) -> int:
        """Return the number of threads counted."""
        return self._before + self._unrecorded + self._counter.count()


class ThreadCreateCollector(AlwaysOn):
    """Reads the counts of `ThreadStarts`."""

    def __init__(self, starts: ThreadStarts) -> None:
        self._starts = starts

    def count(self) -> int:
        """Return the number of threads known to have been created."""
        return self._starts.count()

    async def snapshot(self) -> Callable[[], Profile]:
        """Take threadcreate/count by the stack that called `Thread.start`."""
        totals, time_ns = self._starts.totals(), time.time_ns()
        return lambda: count_profile("threadcreate", name_totals(totals), time_ns)
