"""
What is on for as long as a middleware lives, and put back when it goes.

Threads' starts are recorded, garbage collections timed and memory sampled;
with `heap="tracemalloc"` memory is traced instead. Each of these counts its
users, so two middlewares in one process share them.
"""

from __future__ import annotations

import threading
from typing import Literal, Protocol

from asgi_pprof.collectors.heap_native import HeapSwitch, heap_sampler
from asgi_pprof.collectors.heap_tracemalloc import tracing
from asgi_pprof.collectors.threads import thread_starts
from asgi_pprof.memstats import gc_pauses

HeapEngine = Literal["tracemalloc"]


class _Switch(Protocol):
    def enable(self) -> None: ...
    def disable(self) -> None: ...


class Switches:
    """
    The switches one middleware holds on.

    Args:
        heap: "tracemalloc" to trace memory all the time, None to sample it.
        memory_profile_rate: Mean bytes from one sample to the next; 0 to take none.

    Raises:
        ValueError: `heap` is something else, or the rate is negative.
    """

    def __init__(self, heap: HeapEngine | None, memory_profile_rate: int) -> None:
        if heap not in (None, "tracemalloc"):
            raise ValueError(f'heap is None or "tracemalloc", not {heap!r}')
        sampling = HeapSwitch(memory_profile_rate)
        self._switches: list[_Switch] = [
            thread_starts,
            gc_pauses,
            tracing if heap else sampling,
        ]
        self._lock = threading.RLock()  # a finalizer may close in the middle of opening
        self._on = False

    def on(self) -> None:
        """Switch everything on that is not; in a forked process, memory samples begin anew."""
        with self._lock:
            if not self._on:
                self._on = True
                for switch in self._switches:
                    switch.enable()
            else:
                heap_sampler.is_on()

    def off(self) -> None:
        """Put everything back."""
        with self._lock:
            if self._on:
                self._on = False
                for switch in self._switches:
                    switch.disable()
