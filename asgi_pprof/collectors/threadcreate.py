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

from asgi_pprof.profile import Profile, Sample, Stack, count_profile
from asgi_pprof.runtime.frames import RawStack, capture
from asgi_pprof.runtime.proc import native_thread_ids
from asgi_pprof.stacks import UNKNOWN, Symbols

_MAX_STACKS = 4096  # different stacks that start threads


class ThreadStarts:
    """Counts the stacks that start threads, while switched on; one for the process."""

    def __init__(self) -> None:
        # Reentrant: a signal handler may start a thread while a start is recorded.
        self._lock = threading.RLock()
        self._users = 0
        self._before = 0
        self._unrecorded = 0
        self._original: Callable[..., None] | None = None
        self._hook: Callable[..., None] | None = None
        self._counts: dict[tuple[tuple[int, int], ...], int] = {}
        self._stacks: dict[tuple[tuple[int, int], ...], RawStack] = {}

    def enable(self) -> None:
        """Wrap `Thread.start` unless it is wrapped; pair with `disable`."""
        with self._lock:
            self._users += 1
            if self._users > 1:
                return
            if not self._before:
                self._before = len(native_thread_ids()) or threading.active_count()
            self._original = threading.Thread.start
            self._hook = self._wrap(self._original)
            threading.Thread.start = self._hook  # type: ignore[method-assign]

    def disable(self) -> None:
        """Put `Thread.start` back, once nobody needs it wrapped."""
        with self._lock:
            self._users -= 1
            # Whoever has wrapped it after us keeps our wrapper, which then only passes on.
            if self._users == 0 and threading.Thread.start is self._hook:
                assert self._original is not None
                threading.Thread.start = self._original  # type: ignore[method-assign]

    def _wrap(self, original: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(original)
        def start(thread: threading.Thread, *args: Any, **kwargs: Any) -> None:
            original(thread, *args, **kwargs)
            if self._users and self._hook is start:
                self._record(sys._getframe(1))

        return start

    def _record(self, frame: FrameType | None) -> None:
        try:
            stack = capture(frame)
            # By identity: equal code objects of different files compare equal.
            key = tuple((id(code), lasti) for code, lasti in stack)
            # A fork may have left the lock taken for ever: then the stack is lost.
            locked = self._lock.acquire(timeout=0.1)
            try:
                if locked and key in self._counts:
                    self._counts[key] += 1
                elif locked and len(self._counts) < _MAX_STACKS:
                    self._counts[key] = 1
                    self._stacks[key] = stack
                else:
                    self._unrecorded += 1
            finally:
                if locked:
                    self._lock.release()
        except Exception:
            self._unrecorded += 1

    def counted(self) -> tuple[list[tuple[RawStack, int]], int]:
        """Return captured stacks with their threads, and the threads of no known stack."""
        with self._lock:
            counts = self._counts.copy()
        stacks = [(self._stacks[key], count) for key, count in counts.items()]
        return stacks, self._before + self._unrecorded

    def count(self) -> int:
        """Return how many threads have been counted."""
        return self._before + self._unrecorded + sum(self._counts.values())


def name_stacks(counted: list[tuple[RawStack, int]]) -> dict[Stack, int]:
    """Return totals by named stack."""
    symbols = Symbols()
    totals: dict[Stack, int] = {}
    for raw, count in counted:
        stack = symbols.stack(raw) or (UNKNOWN,)
        totals[stack] = totals.get(stack, 0) + count
    return totals


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
        return functools.partial(_threadcreate_profile, *thread_starts.counted(), time.time_ns())


def _threadcreate_profile(
    counted: list[tuple[RawStack, int]], unknown: int, time_ns: int
) -> Profile:
    samples = [Sample(stack, (count,)) for stack, count in name_stacks(counted).items()]
    if unknown:
        samples.append(Sample((UNKNOWN,), (unknown,)))
    return count_profile("threadcreate", samples, time_ns)
