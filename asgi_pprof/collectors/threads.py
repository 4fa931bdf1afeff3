"""
thread: where every OS thread is now. threadcreate: where each was started.

thread: one sample a thread with its current stack (`runtime.frames`): the GIL is
held while all are read, so the stacks belong to one moment. Labels tell its
name, the system's id for it, whether it is a daemon, what the system says it
does (right after), and the event loop and the task it runs. Threads that Python
does not know (a C library's) have one pseudo-frame with the system's name for
them. It costs nothing until somebody asks. It misses what a thread does in C,
and who had the GIL: whoever looks has it. Threads of other interpreters are not
looked at; without the C core no thread is, once there may be any.

threadcreate: the stack that called `threading.Thread.start`, counted and never
forgotten, as Go counts threads ever created. `Thread.start` is wrapped while a
middleware lives, which costs about 10 us a thread started. Threads there were
before, counted once, have the stack `<unknown>`; threads started past
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
from pathlib import Path
from types import FrameType
from typing import Any

from asgi_pprof.merge import sum_samples
from asgi_pprof.profile import Label, Profile, Sample, Stack, ValueType, pseudo_location
from asgi_pprof.runtime.frames import CurrentFrames, RawStack, capture, current_frames, why_not
from asgi_pprof.runtime.loops import RunningLoop, running_loops
from asgi_pprof.runtime.thread_clocks import native_thread_ids
from asgi_pprof.stacks import UNKNOWN, Symbols

_MAX_STACKS = 4096  # different stacks that start threads


class ThreadCollector:
    """
    The stack of every OS thread.

    Args:
        current_frames: Test seam for `frames.current_frames`.
    """

    def __init__(self, current_frames: CurrentFrames = current_frames) -> None:
        self._current_frames = current_frames

    def count(self) -> int:
        """Return the number of OS threads."""
        return len(native_thread_ids()) or threading.active_count()

    def note(self) -> str:
        """Return nothing: it is always on."""
        return ""

    def window(self) -> AbstractContextManager[None]:
        """Return a manager that does nothing."""
        return nullcontext()

    async def snapshot(self) -> Callable[[], Profile]:
        """Give thread/count, labelled with what is known of the thread."""
        threads = {thread.ident: thread for thread in threading.enumerate()}
        loops = {running.thread_ident: running for running in running_loops()}
        stacks: list[tuple[RawStack, tuple[Label, ...]]] = []
        listed, unlisted = set(), 0
        for ident, stack in self._current_frames().items():
            thread = threads.get(ident)
            if thread is not None:
                listed.add(thread.native_id)
            unlisted += thread is None
            stacks.append((stack.places(), _labels(thread, loops.get(ident))))
        native = [thread_id for thread_id in native_thread_ids() if thread_id not in listed]
        # Threads that run Python but are unknown to `threading` are in both
        # views, and nothing says which is which: leave out as many.
        others = [
            Sample(
                (pseudo_location(f"native thread {_system_name(thread_id)}"),),
                (1,),
                tuple(sorted(_system_labels(thread_id).items())),
            )
            for thread_id in native[unlisted:]
        ]
        return functools.partial(_thread_profile, stacks, others, time.time_ns(), why_not())


def _thread_profile(
    stacks: list[tuple[RawStack, tuple[Label, ...]]], others: list[Sample], time_ns: int, note: str
) -> Profile:
    symbols = Symbols()
    samples = [Sample(symbols.stack(raw) or (UNKNOWN,), (1,), labels) for raw, labels in stacks]
    return _count_profile("thread", samples + others, time_ns, (note,) if note else ())


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
    return _count_profile("threadcreate", samples, time_ns)


def _count_profile(
    name: str, samples: list[Sample], time_ns: int, comments: tuple[str, ...] = ()
) -> Profile:
    kind = ValueType(name, "count")
    summed = sum_samples(samples)
    return Profile((kind,), summed, kind, period=1, time_ns=time_ns, comments=comments)


def _labels(thread: threading.Thread | None, running: RunningLoop | None) -> tuple[Label, ...]:
    labels: dict[str, str] = {}
    if thread is not None:
        labels["daemon"] = str(thread.daemon).lower()
        if thread.name:
            labels["thread"] = thread.name
        if thread.native_id is not None:
            labels |= _system_labels(thread.native_id)
    if running is not None:
        kind = type(running.loop)
        labels["loop"] = f"{kind.__module__}.{kind.__qualname__}"
        if running.task is not None:
            labels["task"] = running.task.get_name() or "?"
    return tuple(sorted(labels.items()))


_STATES = {"R": "running", "S": "sleeping", "D": "disk sleep", "T": "stopped", "t": "traced"}


def _system_labels(thread_id: int) -> dict[str, str]:
    labels = {"native_id": str(thread_id)}
    try:
        # The name in parentheses may hold anything, parentheses too.
        status = Path(f"/proc/self/task/{thread_id}/stat").read_text(errors="replace")
        state = status.rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return labels
    return {**labels, "state": _STATES.get(state, state)}


def _system_name(thread_id: int) -> str:
    try:
        return Path(f"/proc/self/task/{thread_id}/comm").read_text(errors="replace").strip()
    except OSError:
        return str(thread_id)
