"""
What all process-wide recorders have in common: counted users, one lock, one hook for forks.

A recorder hooks into the interpreter or the process (a patch, a callback, a
thread, a signal), so there is one of each kind, shared by all middlewares of the
process. It records while it has users, and puts everything back with the last.
"""

from __future__ import annotations

import _thread
import os
import weakref
from typing import Any


class _Process:
    """The lock of all recorders, and the hook that renews it and them in a forked child."""

    def __init__(self) -> None:
        self._lock = _new_lock()
        self.shared: weakref.WeakSet[Shared] = weakref.WeakSet()
        self._hooks_forks = False

    @property
    def lock(self) -> _thread.RLock:
        # The hook cannot be removed, so it is registered only when something is recorded.
        if not self._hooks_forks and hasattr(os, "register_at_fork"):
            self._hooks_forks = True
            os.register_at_fork(after_in_child=self._renew)
        return self._lock

    def _renew(self) -> None:
        # The thread that may have held the lock does not exist in the child.
        self._lock = _new_lock()
        for each in list(self.shared):
            each._renew_after_fork()


def _new_lock() -> _thread.RLock:
    # Reentrant: a finalizer may disable a recorder while one is being enabled. Not
    # threading's: applications patch those, as we do.
    return _thread.RLock()


_process = _Process()


class Shared:
    """What there is once in a process: uses the one lock, and is renewed in a forked child."""

    def __init__(self) -> None:
        _process.shared.add(self)

    @property
    def _lock(self) -> _thread.RLock:
        return _process.lock

    def _renew_after_fork(self) -> None:
        """Drop, in a forked child, what belongs to the parent: threads, locks, counts."""


class Recorder(Shared):
    """
    Records while it has users, each with a setting of its own, such as a rate, or None.

    Subclasses start and stop in `_enabled` and `_disabled`, which are called with
    the lock held after each change of `_settings`.
    """

    def __init__(self) -> None:
        self._settings: list[Any] = []
        """One for each user, the earliest first."""
        super().__init__()

    @property
    def _users(self) -> int:
        return len(self._settings)

    def enable(self, setting: Any = None) -> None:
        """Add a user with this setting; pair with `disable`, unless this raises."""
        with self._lock:
            self._settings.append(setting)
            try:
                self._enabled()
            except BaseException:
                self.disable(setting)
                raise

    def disable(self, setting: Any = None) -> None:
        """Remove the user with this setting, or the latest; without users nothing is recorded."""
        with self._lock:
            if setting in self._settings:
                self._settings.remove(setting)
            else:
                setting = self._settings.pop()
            self._disabled(setting)

    def memory_bytes(self) -> int:
        """Return about how much memory the records take, without tables of the C core."""
        return 0

    def why_off(self) -> str:
        """Return why nothing is recorded while there are users, "" if there is no such reason."""
        return ""

    def _enabled(self) -> None:
        raise NotImplementedError

    def _disabled(self, setting: Any) -> None:
        raise NotImplementedError
