"""
What begins anew in a forked child, where the thread that forked is the only one.

A lock that another thread held is never released there, and what another thread or a
task of the parent's would have put back stays as it was. So objects that have such a
lock or such a state are `Renewed`.
"""

from __future__ import annotations

import _thread
import os
import weakref


class _Process:
    """The lock that all recorders share, and the objects to renew in a child."""

    def __init__(self) -> None:
        self.lock = _new_lock()
        self.renewed: weakref.WeakSet[Renewed] = weakref.WeakSet()
        self.is_hooked = False

    def renew(self) -> None:
        self.lock = _new_lock()
        for each in list(self.renewed):
            each._renew_after_fork()


def _new_lock() -> _thread.RLock:
    # Reentrant: a finalizer may disable a recorder while one is being enabled. Not
    # threading's: applications patch those, as we do.
    return _thread.RLock()


class Renewed:
    """Has a method that every forked child calls, from the first call of `expect_forks` on."""

    def __init__(self) -> None:
        _process.renewed.add(self)

    def _renew_after_fork(self) -> None:
        """Drop what belongs to the parent: threads, locks, counts. It must not wait or fail."""


_process = _Process()


def expect_forks() -> None:
    """Renew objects in forked children from now on."""
    # The hook cannot be removed, so it is registered only when something is recorded.
    if not _process.is_hooked and hasattr(os, "register_at_fork"):
        _process.is_hooked = True
        os.register_at_fork(after_in_child=_process.renew)


def process_lock() -> _thread.RLock:
    """Return the lock of what one process has once; a forked child has another one."""
    expect_forks()
    return _process.lock
