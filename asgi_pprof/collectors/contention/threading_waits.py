"""
Waits of threads: for conditions and all that is built on them, joins, executors.

Event, Semaphore, BoundedSemaphore, Barrier, `queue.Queue` and the futures of
`concurrent.futures` all wait in `Condition.wait`, and only there. So only that
method is wrapped, calls that need not wait cost nothing more, and the leaf is
found from the frames above it. Objects made before are seen too.

Not seen: `queue.SimpleQueue`, which is written in C (an executor's idle workers
wait there), and waits for the lock inside a condition, which threads hold for
microseconds. For Lock and RLock see lock_classes.py.

If all threads of an executor are busy, a work item waits in its queue: from
`submit` until a thread starts it, recorded with the stack that submitted it.
"""

from __future__ import annotations

import concurrent.futures
import functools
import queue
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from asgi_pprof.collectors.contention.patches import Target, Wrap
from asgi_pprof.collectors.contention.recording import Recording, mutex
from asgi_pprof.collectors.contention.stack_rules import WORKER, rules
from asgi_pprof.collectors.contention.under_way import Wait, waits
from asgi_pprof.runtime.chains import code_of

clock = time.monotonic_ns

_QUEUED = "_asgi_pprof_queued"


class _Thread(threading.local):
    blocked = False


this_thread = _Thread()
"""Whether this thread is inside a wait that is timed already."""

_waiters: dict[int, ThreadWaiters] = {}
"""By id of a semaphore's condition: the threads that wait for it now."""


class ThreadWaiters:
    """
    How long threads have waited for one lock since its last release.

    As `TaskWaiters`, but threads and signal handlers may interrupt every step:
    each waiter writes only its own entry.
    """

    __slots__ = ("_process", "_released_ns", "waiting_ns")

    def __init__(self) -> None:
        self.waiting_ns: dict[int, int] = {}
        self._released_ns = 0
        self._process = _process

    def enter(self, now_ns: int) -> None:
        """Add this thread."""
        if self._process is not _process:
            self.waiting_ns, self._process = {}, _process
        self.waiting_ns[threading.get_ident()] = now_ns

    def leave(self) -> bool:
        """Remove this thread, and return whether it was the last."""
        self.waiting_ns.pop(threading.get_ident(), None)
        return not self.waiting_ns

    def release(self, now_ns: int) -> int | None:
        """Return the nanoseconds that a release is charged with; None if no thread waits."""
        began_ns = list(self.waiting_ns.values())
        if not began_ns or self._process is not _process:
            return None
        # Another thread may have waited or released since this one has read the clock.
        released_ns = self._released_ns
        self._released_ns = max(now_ns, released_ns)
        return sum(max(0, now_ns - max(each, released_ns)) for each in began_ns)


_process = object()
"""Identifies this process: each forked child has another one."""


def reset_in_child() -> None:
    """Remove all waits, in a forked child: the other threads do not exist there."""
    global _process
    _process = object()
    _waiters.clear()


def wrap_wait(is_condition: bool) -> Wrap:
    """Return what wraps `Condition.wait`, or else `Thread.join`."""

    def wrap(recording: Recording, original: Callable[..., Any]) -> Callable[..., Any]:
        leaf = code_of(original)
        rules.add_leaf(leaf)

        @functools.wraps(original)
        def wait(self: Any, timeout: float | None = None) -> Any:
            if (
                not recording.on
                or this_thread.blocked
                or (timeout is not None and timeout <= 0)
                or (rules.waits_for_work(sys._getframe()) if is_condition else _has_ended(self))
            ):
                return original(self, timeout)
            began_ns = clock()
            waiters = _waiters_of(id(self), began_ns) if is_condition and mutex.rate else None
            this_thread.blocked = waited = True
            ident = threading.get_ident()
            under_way = waits.of_threads[ident] = Wait(recording, began_ns)
            try:
                return original(self, timeout)
            except RuntimeError:
                waited = False  # the lock is not held, or the thread cannot be joined
                raise
            finally:
                now_ns = clock()
                this_thread.blocked = False
                under_way.ended_ns = now_ns
                waits.of_threads.pop(ident, None)
                if waiters is not None and waiters.leave():
                    _waiters.pop(id(self), None)
                if waited:
                    recording.add_wait(now_ns - began_ns, leaf, sys._getframe())

        return wait

    return wrap


def wrap_submit(recording: Recording, original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `ThreadPoolExecutor.submit`."""
    leaf = code_of(original)

    @functools.wraps(original)
    def submit(self: Any, /, *args: Any, **kwargs: Any) -> Any:
        if not recording.on or not _all_busy(self):
            return original(self, *args, **kwargs)
        began_ns = clock()
        future = original(self, *args, **kwargs)
        try:
            # Taken now: the submitting function may have returned when the work item starts.
            stack = rules.calling_stack(leaf, sys._getframe(), WORKER)
            if stack is not None:
                queued = vars(future)[_QUEUED] = Wait(recording, began_ns, stack=stack)
                waits.add_work(queued)
        except Exception:
            pass  # a future of another kind
        return future

    return submit


def wrap_start(recording: Recording, original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `Future.set_running_or_notify_cancel`, which an executor calls to start a work item."""

    @functools.wraps(original)
    def set_running_or_notify_cancel(self: Any) -> Any:
        queued: Wait | None = vars(self).pop(_QUEUED, None)
        if queued is not None and queued.stack is not None:
            queued.ended_ns = clock()
            recording.add_captured(queued.ended_ns - queued.began_ns, queued.stack)
        return original(self)

    return set_running_or_notify_cancel


def wrap_release(recording: Recording, original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `Semaphore.release`."""
    leaf = code_of(original)

    @functools.wraps(original)
    def release(self: Any, n: int = 1) -> Any:
        waiters = _waiters.get(id(self._cond)) if recording.on else None
        if waiters is None:
            return original(self, n)
        waited_ns = waiters.release(clock())  # before: a waiter that is woken leaves at once
        result = original(self, n)
        if waited_ns is not None:
            recording.add_release(waited_ns, leaf, sys._getframe())
        return result

    return release


def _waiters_of(condition_id: int, now_ns: int) -> ThreadWaiters:
    waiters = _waiters.setdefault(condition_id, ThreadWaiters())
    waiters.enter(now_ns)
    return waiters


def _has_ended(thread: threading.Thread) -> bool:
    try:
        return not threading.Thread.is_alive(thread)
    except Exception:
        return False  # if the object is at fault, the original raises


def _all_busy(executor: Any) -> object:
    try:
        return (
            executor._idle_semaphore._value <= 0 and len(executor._threads) >= executor._max_workers
        )
    except Exception:
        return False


def wait_targets() -> list[Target]:
    """Return the methods that wait."""
    rules.add_primitives(
        (
            *(threading.Condition, threading.Event, threading.Semaphore, threading.Barrier),
            *(queue.Queue, concurrent.futures.Future),
        )
    )
    # What `Thread.join` calls up to CPython 3.12.
    rules.add_methods((getattr(threading.Thread, "_wait_for_tstate_lock", None),))
    return [
        Target(threading.Condition, "wait", wrap_wait(is_condition=True)),
        Target(threading.Thread, "join", wrap_wait(is_condition=False)),
        # Looked up here: its module is imported at the first use, and registers exit handlers.
        Target(concurrent.futures.ThreadPoolExecutor, "submit", wrap_submit),
        Target(concurrent.futures.Future, "set_running_or_notify_cancel", wrap_start),
    ]


def release_targets() -> list[Target]:
    """Return the methods that release a semaphore."""
    return [
        Target(threading.Semaphore, "release", wrap_release),
        Target(threading.BoundedSemaphore, "release", wrap_release),
    ]
