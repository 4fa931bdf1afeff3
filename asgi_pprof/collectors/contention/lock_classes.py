"""
Waits for `threading.Lock` and `threading.RLock`: only if a middleware asks for them.

Both types are written in C and their methods cannot be wrapped. With
`wrap_lock_classes=True`, while a rate is set, the names `threading.Lock` and
`threading.RLock` are classes of this module instead, whose objects hold a real
lock and delegate to it. The standard library still gets real locks: C code
and `os.fork` rely on them, and they are held for microseconds. The window of
`?seconds=N` replaces nothing.

Not seen: locks made before, in the standard library, by `_thread.allocate_lock`,
or through a name that was imported before (`from threading import Lock`). If
another library has replaced the names already, they are left alone.

A lock made here stays what it is when the rate is 0 again, and then delegates:
about 0.1 us more for each `with`. Its `__class__` and `isinstance` say that it
is a real one, which it is not; it can neither be copied nor pickled; and an
exception raised by a signal handler can come between taking the lock and
entering the `with`.
"""

from __future__ import annotations

import sys
import threading
import time
from typing import Any

from asgi_pprof.collectors.contention.patches import Target, Wrap
from asgi_pprof.collectors.contention.recording import Recording, mutex
from asgi_pprof.collectors.contention.threading_waits import ThreadWaiters, this_thread
from asgi_pprof.collectors.contention.under_way import Wait, waits
from asgi_pprof.runtime.chains import wrappers

clock = time.monotonic_ns

_OFF = Recording(on=False)
_recording = _OFF
_make_more = False


def report_to(recording: Recording | None, make_more: bool) -> None:
    """
    Set the recording that all locks made here report to; None for none.

    Args:
        recording: The recording.
        make_more: Whether the classes make locks that report. A caller that has
            kept their names gets real ones otherwise.
    """
    global _recording, _make_more
    _recording, _make_more = recording or _OFF, make_more


class _Factory(type):
    """Makes locks that report for programs, and real ones for the standard library."""

    real: Any

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        lock = cls.real(*args, **kwargs)
        caller = str(sys._getframe(1).f_globals.get("__name__"))
        package = caller.partition(".")[0]
        if not _make_more or package in sys.stdlib_module_names or package == "asgi_pprof":
            return lock
        return super().__call__(lock)

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, type(cls.real()))


class RecordedLock(metaclass=_Factory):
    """A real `threading.Lock`, and the threads that wait for it."""

    __slots__ = ("__weakref__", "_lock", "_waiters")

    real: Any = threading.Lock
    name = "threading.Lock"

    def __init__(self, lock: Any) -> None:
        self._lock = lock
        self._waiters = ThreadWaiters()

    def acquire(self, blocking: bool = True, timeout: float = -1) -> Any:
        """Acquire the lock, as the real one does."""
        may_wait = blocking and (timeout == -1 or 0 < timeout <= threading.TIMEOUT_MAX)
        if not _recording.on or not may_wait:
            return self._lock.acquire(blocking, timeout)
        # The real lock tries this first too: only if it fails does the thread wait.
        return self._lock.acquire(False) or self._wait(timeout)

    def _wait(self, timeout: float) -> Any:
        recording, outermost = _recording, not this_thread.blocked
        began_ns = clock()
        if mutex.rate:
            self._waiters.enter(began_ns)
        this_thread.blocked = True
        if outermost:
            ident = threading.get_ident()
            under_way = Wait(recording, began_ns, f"{self.name}.acquire")
            waits.of_threads[ident] = under_way
        try:
            return self._lock.acquire(True, timeout)
        finally:
            now_ns = clock()
            self._waiters.leave()
            if outermost:
                this_thread.blocked = False
                under_way.ended_ns = now_ns
                waits.of_threads.pop(ident, None)
                recording.add_wait(now_ns - began_ns, f"{self.name}.acquire", sys._getframe())

    def release(self) -> None:
        """Release the lock, as the real one does."""
        waited_ns = None
        if self._waiters.waiting_ns and self._is_last():
            waited_ns = self._waiters.release(clock())  # before: a waiter woken leaves at once
        self._lock.release()
        if waited_ns is not None:
            _recording.add_release(waited_ns, f"{self.name}.release", sys._getframe())

    def _is_last(self) -> bool:
        return True

    def __enter__(self) -> Any:
        if not _recording.on:
            return self._lock.acquire()
        return self._lock.acquire(False) or self._wait(-1)

    def __exit__(self, *exc_info: object) -> None:
        if self._waiters.waiting_ns:
            self.release()
        else:
            self._lock.release()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._lock, name)

    def __repr__(self) -> str:
        return repr(self._lock)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._lock.__reduce_ex__(protocol)  # raises: locks cannot be pickled

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return type(self._lock)


class RecordedRLock(RecordedLock):
    """A real `threading.RLock`, and the threads that wait for it."""

    __slots__ = ()

    real: Any = threading.RLock
    name = "threading.RLock"

    def _is_last(self) -> bool:
        return bool(self._lock._recursion_count() == 1)

    # A condition calls these two around its wait.

    def _release_save(self) -> Any:
        waited_ns = self._waiters.release(clock())
        state = self._lock._release_save()
        if waited_ns is not None:
            _recording.add_release(waited_ns, f"{self.name}.release", sys._getframe())
        return state

    def _acquire_restore(self, state: Any) -> None:
        if mutex.rate:
            self._waiters.enter(clock())
        try:
            self._lock._acquire_restore(state)
        finally:
            self._waiters.leave()


def targets() -> list[Target]:
    """Return the two names."""
    for lock in (RecordedLock, RecordedRLock):
        for method in vars(lock).values():
            wrappers.add(method)
    return [
        Target(threading, "Lock", _replace_by(RecordedLock)),
        Target(threading, "RLock", _replace_by(RecordedRLock)),
    ]


def _replace_by(lock: type[RecordedLock]) -> Wrap:
    return lambda recording, original: lock if original is lock.real else original
