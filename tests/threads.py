"""Threads that wait at a known place while a test reads their stacks."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def in_a_thread(
    function: Callable[[threading.Event, threading.Event], object],
) -> Iterator[threading.Thread]:
    """Run function(ready, end) in a thread. Inside the `with`, `ready` is set."""
    ready, end = threading.Event(), threading.Event()
    thread = threading.Thread(target=function, args=(ready, end))
    thread.start()
    assert ready.wait(30)
    try:
        yield thread
    finally:
        end.set()
        thread.join(30)
