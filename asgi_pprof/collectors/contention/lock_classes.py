"""
Waits for threads' locks: `threading.Lock` and `RLock`, where a program makes them.

Their types are written in C and cannot be wrapped. So, while a rate is set,
the names `threading.Lock` and `threading.RLock` stand for classes here, whose
objects have a real lock inside and pass on to it. The standard library gets
real locks as ever: its own locks must be what C code and `os.fork` expect, and
are held for microseconds. A profile of some seconds does not change the names.

Not seen: locks made before, in the standard library, by `_thread.allocate_lock`,
or through a name that was imported before (`from threading import Lock`). Where
somebody else has replaced the names already, they are left alone.

A lock made here stays one when the rate is 0 again, and then passes on: about
0.1 us more for each `with`. It passes for a real one in `isinstance`, can
neither be copied nor pickled, and differs in one thing: an exception raised by
a signal handler can come between taking the lock and entering the `with`.
"""

from __future__ import annotations

import sys
import threading
import time
from typing import Any

from asgi_pprof.collectors.contention.stacks import know_wrapper
from asgi_pprof.collectors.contention.threading_waits import ThreadQueue, this_thread
from asgi_pprof.collectors.contention.watch import Target, Watch, Wrap, mutex

clock = time.monotonic_ns

_off = Watch(on=False)
_watch = _off


def report_to(watch: Watch | None) -> None:
    """Say which watch the locks made here report to, now and later; None for none."""
    global _watch
    _watch = watch or _off


class _Factory(type):
    """Makes locks that are seen for programs, and real ones for the standard library."""

    real: Any

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        lock = cls.real(*args, **kwargs)
        caller = str(sys._getframe(1).f_globals.get("__name__"))
        package = caller.partition(".")[0]
        if not _watch.on or package in sys.stdlib_module_names or package == "asgi_pprof":
            return lock
        return super().__call__(lock)

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, type(cls.real()))


class SeenLock(metaclass=_Factory):
    """A real `threading.Lock`, and who waits for it."""

    __slots__ = ("__weakref__", "_lock", "_waiters")

    real: Any = threading.Lock
    name = "threading.Lock"

    def __init__(self, lock: Any) -> None:
        self._lock = lock
        self._waiters = ThreadQueue()

    def acquire(self, blocking: bool = True, timeout: float = -1) -> Any:
        """Acquire the lock, as the real one does."""
        may_wait = blocking and (timeout == -1 or 0 < timeout <= threading.TIMEOUT_MAX)
        if not _watch.on or not may_wait:
            return self._lock.acquire(blocking, timeout)
        # The real one's own first step: only if it fails does anybody wait.
        return self._lock.acquire(False) or self._wait(timeout)

    def _wait(self, timeout: float) -> Any:
        watch, outermost = _watch, not this_thread.blocked
        began_ns = clock()
        if mutex.rate:
            self._waiters.enter(began_ns)
        this_thread.blocked = True
        try:
            return self._lock.acquire(True, timeout)
        finally:
            now_ns = clock()
            self._waiters.leave()
            if outermost:
                this_thread.blocked = False
                watch.waited(now_ns - began_ns, f"{self.name}.acquire", sys._getframe())

    def release(self) -> None:
        """Release the lock, as the real one does."""
        waited_ns = None
        if self._waiters.waiting_ns and self._is_last():
            waited_ns = self._waiters.release(clock())  # before: who is let go leaves at once
        self._lock.release()
        if waited_ns is not None:
            _watch.released(waited_ns, f"{self.name}.release", sys._getframe())

    def _is_last(self) -> bool:
        return True

    def __enter__(self) -> Any:
        if not _watch.on:
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
        return self._lock.__reduce_ex__(protocol)  # which says that locks cannot be pickled

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return type(self._lock)


class SeenRLock(SeenLock):
    """A real `threading.RLock`, and who waits for it."""

    __slots__ = ()

    real: Any = threading.RLock
    name = "threading.RLock"

    def _is_last(self) -> bool:
        return bool(self._lock._recursion_count() == 1)

    # What a condition does with a reentrant lock while it waits.

    def _release_save(self) -> Any:
        waited_ns = self._waiters.release(clock())
        state = self._lock._release_save()
        if waited_ns is not None:
            _watch.released(waited_ns, f"{self.name}.release", sys._getframe())
        return state

    def _acquire_restore(self, state: Any) -> None:
        if mutex.rate:
            self._waiters.enter(clock())
        try:
            self._lock._acquire_restore(state)
        finally:
            self._waiters.leave()


def naming_targets() -> list[Target]:
    """Return the names that locks are made by."""
    for lock in (SeenLock, SeenRLock):
        for method in vars(lock).values():
            know_wrapper(method)
    return [
        Target(threading, "Lock", _standing_for(SeenLock)),
        Target(threading, "RLock", _standing_for(SeenRLock)),
    ]


def _standing_for(lock: type[SeenLock]) -> Wrap:
    return lambda watch, original: lock if original is lock.real else original
