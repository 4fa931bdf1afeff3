"""
What all process-wide recorders have in common: counted users and one lock.

A recorder hooks into the interpreter or the process (a patch, a callback, a
thread, a signal), so there is one of each kind, shared by all middlewares of the
process. It records while it has users, and puts everything back with the last.
"""

from __future__ import annotations

import _thread
from typing import Any

from asgi_pprof.forks import Renewed, process_lock


class Recorder(Renewed):
    """
    Records while it has users, each with a setting of its own, such as a rate, or None.

    Subclasses start and stop in `_enabled` and `_disabled`, which are called with
    the lock held after each change of `_settings`.
    """

    def __init__(self) -> None:
        super().__init__()
        self._settings: list[Any] = []
        """One for each user, the earliest first."""

    @property
    def _users(self) -> int:
        return len(self._settings)

    @property
    def _lock(self) -> _thread.RLock:
        return process_lock()

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
