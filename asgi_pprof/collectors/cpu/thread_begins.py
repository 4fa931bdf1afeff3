"""
Gives new threads their timer as they begin, while a CPU profile runs.

`Thread._set_native_id` is the first function that a new thread runs after its ident
is known, so it is wrapped. The watcher thread of the C core would find the thread up
to 50 ms later, and does so for threads that are started without `threading`.

Source: CPython, Lib/threading.py, Thread._bootstrap_inner.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import wraps

from asgi_pprof.forks import Renewed, expect_forks
from asgi_pprof.native.core import native

_NAME = "_set_native_id"


class ThreadBegins(Renewed):
    """Wraps the method between `on` and `off`; both need no pairing."""

    def __init__(self) -> None:
        super().__init__()
        self._original: Callable[[threading.Thread], None] | None = None
        self._wrapper: Callable[[threading.Thread], None] | None = None

    def on(self) -> None:
        """Wrap the method, if this Python has it."""
        original = getattr(threading.Thread, _NAME, None)
        if self._original is not None or original is None:
            return
        expect_forks()

        @wraps(original)
        def set_native_id(thread: threading.Thread) -> None:
            original(thread)
            if self._wrapper is set_native_id:
                native.cpu_begin_thread(threading.get_native_id())

        self._original, self._wrapper = original, set_native_id
        setattr(threading.Thread, _NAME, set_native_id)

    def off(self) -> None:
        """Put the method back. If another library has wrapped ours, ours stays and delegates."""
        if self._original is not None:
            if getattr(threading.Thread, _NAME) is self._wrapper:
                setattr(threading.Thread, _NAME, self._original)
            self._original = self._wrapper = None

    def _renew_after_fork(self) -> None:
        self.off()  # the child has no sampler


thread_begins = ThreadBegins()
