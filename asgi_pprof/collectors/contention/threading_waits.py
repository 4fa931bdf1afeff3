"""
Waits of threads: all that ends in a `threading.Condition`, joins, and executors.

Event, Semaphore, BoundedSemaphore, Barrier, `queue.Queue` and the futures of
`concurrent.futures` all wait in `Condition.wait`, and only there: so that is
wrapped, what they do without waiting costs nothing more, and the leaf is found
from the frames above it. Objects made before are seen. What is not:
`queue.SimpleQueue`, which is written in C (an executor's idle workers wait
there), and waits for the lock inside a condition, which threads hold for
microseconds. For Lock and RLock see lock_classes.py.

What an executor with all threads busy is given to do waits in its queue: from
`submit` to the start of it, charged to the stack that submitted.
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

from asgi_pprof.collectors.contention.records import Contended
from asgi_pprof.collectors.contention.stacks import (
    WORKER,
    calling_stack,
    know_primitives,
    waits_for_work,
)
from asgi_pprof.collectors.contention.watch import Target, Watch, code_of, mutex

clock = time.monotonic_ns

_QUEUED = "_asgi_pprof_queued"


class _Thread(threading.local):
    blocked = False


this_thread = _Thread()
"""Whether this thread is inside a wait that is timed already."""

_queues: dict[int, ThreadQueue] = {}
"""By id of a semaphore's condition: who waits for it now."""


class ThreadQueue:
    """
    How long threads have waited for one lock since it was released last.

    As `TaskQueue`, in steps that threads and signal handlers may interrupt:
    each waiter writes its own entry only.
    """

    __slots__ = ("_process", "_released_ns", "waiting_ns")

    def __init__(self) -> None:
        self.waiting_ns: dict[int, int] = {}
        self._released_ns = 0
        self._process = _process

    def enter(self, now_ns: int) -> None:
        """Note that this thread waits."""
        if self._process is not _process:
            self.waiting_ns, self._process = {}, _process
        self.waiting_ns[threading.get_ident()] = now_ns

    def leave(self) -> bool:
        """Note that this thread waits no longer, and return whether nobody does."""
        self.waiting_ns.pop(threading.get_ident(), None)
        return not self.waiting_ns

    def release(self, now_ns: int) -> int | None:
        """Return the nanoseconds that a release is charged with; None if nobody waits."""
        began_ns = list(self.waiting_ns.values())
        if not began_ns or self._process is not _process:
            return None
        released_ns, self._released_ns = self._released_ns, now_ns
        return sum(now_ns - max(each, released_ns) for each in began_ns)


_process = object()
"""Another one in each forked child."""


def forget_waits() -> None:
    """Begin anew, in a forked child: the other threads do not exist there."""
    global _process
    _process = object()
    _queues.clear()


def waiting(watch: Watch, original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `Condition.wait`."""
    leaf = code_of(original)

    @functools.wraps(original)
    def wait(self: Any, timeout: float | None = None) -> Any:
        if (
            not watch.on
            or this_thread.blocked
            or (timeout is not None and timeout <= 0)
            or waits_for_work(sys._getframe())
        ):
            return original(self, timeout)
        waiters = _enter(id(self)) if mutex.rate else None
        this_thread.blocked = waited = True
        began_ns = clock()
        try:
            return original(self, timeout)
        except RuntimeError:
            waited = False  # its lock is not held
            raise
        finally:
            now_ns = clock()
            this_thread.blocked = False
            if waiters is not None and waiters.leave():
                _queues.pop(id(self), None)
            if waited:
                watch.waited(now_ns - began_ns, leaf, sys._getframe())

    return wait


def joining(watch: Watch, original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `Thread.join`."""
    leaf = code_of(original)

    @functools.wraps(original)
    def join(self: Any, timeout: float | None = None) -> Any:
        if (
            not watch.on
            or this_thread.blocked
            or (timeout is not None and timeout <= 0)
            or _has_ended(self)
        ):
            return original(self, timeout)
        this_thread.blocked = waited = True
        began_ns = clock()
        try:
            return original(self, timeout)
        except RuntimeError:
            waited = False  # that thread cannot be waited for
            raise
        finally:
            now_ns = clock()
            this_thread.blocked = False
            if waited:
                watch.waited(now_ns - began_ns, leaf, sys._getframe())

    return join


def submitting(watch: Watch, original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `ThreadPoolExecutor.submit`."""
    leaf = code_of(original)

    @functools.wraps(original)
    def submit(self: Any, /, *args: Any, **kwargs: Any) -> Any:
        if not watch.on or not _all_busy(self):
            return original(self, *args, **kwargs)
        began_ns = clock()
        future = original(self, *args, **kwargs)
        try:
            # Who submits is gone when the work begins: the stack is taken now.
            stack = calling_stack(leaf, sys._getframe(), WORKER)
            vars(future)[_QUEUED] = began_ns, stack
        except Exception:
            pass  # a future of another kind
        return future

    return submit


def starting(watch: Watch, original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `Future.set_running_or_notify_cancel`, which an executor calls to begin."""

    @functools.wraps(original)
    def set_running_or_notify_cancel(self: Any) -> Any:
        queued: tuple[int, Contended] | None = vars(self).pop(_QUEUED, None)
        if queued is not None:
            watch.waited_elsewhere(clock() - queued[0], queued[1])
        return original(self)

    return set_running_or_notify_cancel


def releasing(watch: Watch, original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `Semaphore.release`."""
    leaf = code_of(original)

    @functools.wraps(original)
    def release(self: Any, n: int = 1) -> Any:
        waiters = _queues.get(id(self._cond)) if watch.on else None
        if waiters is None:
            return original(self, n)
        waited_ns = waiters.release(clock())  # before: who is let go leaves at once
        result = original(self, n)
        if waited_ns is not None:
            watch.released(waited_ns, leaf, sys._getframe())
        return result

    return release


def _enter(condition_id: int) -> ThreadQueue:
    waiters = _queues.setdefault(condition_id, ThreadQueue())
    waiters.enter(clock())
    return waiters


def _has_ended(thread: threading.Thread) -> bool:
    try:
        return not threading.Thread.is_alive(thread)
    except Exception:
        return False  # it is for the original to raise


def _all_busy(executor: Any) -> object:
    try:
        return (
            executor._idle_semaphore._value <= 0 and len(executor._threads) >= executor._max_workers
        )
    except Exception:
        return False


def waiting_targets() -> list[Target]:
    """Return the methods that wait."""
    know_primitives(
        (
            *(threading.Condition, threading.Event, threading.Semaphore, threading.Barrier),
            *(queue.Queue, concurrent.futures.Future),
        )
    )
    return [
        Target(threading.Condition, "wait", waiting),
        Target(threading.Thread, "join", joining),
        # Looked up here: it is loaded when first asked for, and then registers exit handlers.
        Target(concurrent.futures.ThreadPoolExecutor, "submit", submitting),
        Target(concurrent.futures.Future, "set_running_or_notify_cancel", starting),
    ]


def releasing_targets() -> list[Target]:
    """Return the methods that release a semaphore."""
    return [
        Target(threading.Semaphore, "release", releasing),
        Target(threading.BoundedSemaphore, "release", releasing),
    ]
