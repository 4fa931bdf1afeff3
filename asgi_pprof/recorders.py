"""
What is on for as long as a middleware lives, and put back when it goes.

Threads' starts are recorded, garbage collections timed and memory sampled;
with `heap="tracemalloc"` memory is traced instead. On the event loops that
serve, the makers of tasks are noted and stalls recorded; contention is recorded
if that was asked for. Each of these counts its users, so two middlewares in one
process share them.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import weakref
from typing import Any, ClassVar, Literal, Protocol

from asgi_pprof.collectors.contention.collector import ContentionSwitch
from asgi_pprof.collectors.goroutine.task_tracking import task_tracking
from asgi_pprof.collectors.heap.sampler import MAX_RATE, HeapSampler
from asgi_pprof.collectors.heap.tracing import Tracing
from asgi_pprof.collectors.stall.watch import DEFAULT_THRESHOLD_MS, stall_watch
from asgi_pprof.collectors.threadcreate import ThreadStarts
from asgi_pprof.recorder import Recorder
from asgi_pprof.runtime.gc_pauses import gc_pauses

HeapEngine = Literal["tracemalloc"]

heap_sampler = HeapSampler()
heap_tracing = Tracing()
thread_starts = ThreadStarts()

logger = logging.getLogger("asgi_pprof")


class _Switch(Protocol):
    def enable(self) -> None: ...
    def disable(self) -> None: ...


class _LoopSwitch(Protocol):
    def attach(self, loop: asyncio.AbstractEventLoop) -> None: ...
    def detach(self, loop: asyncio.AbstractEventLoop) -> None: ...


class _StallSwitch:
    """
    One middleware's threshold, while it lives: of several the lowest counts.

    Raises:
        ValueError: The threshold is negative.
    """

    _thresholds_ms: ClassVar[list[float]] = []

    def __init__(self, threshold_ms: float) -> None:
        if not 0 <= threshold_ms < math.inf:
            raise ValueError(f"stall_threshold_ms is 0 or more, not {threshold_ms!r}")
        self._threshold_ms = threshold_ms

    def enable(self) -> None:
        self._thresholds_ms.append(self._threshold_ms)
        self._set()

    def disable(self) -> None:
        self._thresholds_ms.remove(self._threshold_ms)
        self._set()

    def _set(self) -> None:
        none_ms = 0 if self._thresholds_ms else DEFAULT_THRESHOLD_MS
        stall_watch.set_threshold(min(filter(None, self._thresholds_ms), default=none_ms))

    def attach(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._threshold_ms:
            stall_watch.attach(loop)

    def detach(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._threshold_ms:
            stall_watch.detach(loop)


class Recording:
    """
    The switches one middleware holds on.

    Args:
        heap: "tracemalloc" to trace memory all the time, None to sample it.
        memory_profile_rate: Mean bytes from one sample to the next; 0 to take none.
        track_tasks: Whether to note who makes tasks, and since when they wait.
        block_profile_rate: Nanoseconds of waiting a sample; 0 leaves the rate alone.
        mutex_profile_fraction: Releases a sample; 0 leaves the fraction alone.
        wrap_lock_classes: Whether to replace `threading.Lock` and `RLock` while a rate is set.
        stall_threshold_ms: From which length on a stall of a loop is recorded; 0 for none.

    Raises:
        ValueError: `heap` is something else, or a rate or the threshold is negative.
    """

    def __init__(
        self,
        heap: HeapEngine | None,
        memory_profile_rate: int,
        track_tasks: bool = True,
        block_profile_rate: int = 0,
        mutex_profile_fraction: int = 0,
        wrap_lock_classes: bool = False,
        stall_threshold_ms: float = DEFAULT_THRESHOLD_MS,
    ) -> None:
        if heap not in (None, "tracemalloc"):
            raise ValueError(f'heap is None or "tracemalloc", not {heap!r}')
        if not 0 <= memory_profile_rate <= MAX_RATE:
            raise ValueError(
                f"memory_profile_rate is bytes a sample, or 0, not {memory_profile_rate!r}"
            )
        stalls = _StallSwitch(stall_threshold_ms)
        self._uses: list[tuple[Recorder, Any]] = [
            (thread_starts, None),
            (heap_tracing, None) if heap else (heap_sampler, memory_profile_rate),
        ]
        self._switches: list[_Switch] = [
            gc_pauses,
            ContentionSwitch(block_profile_rate, mutex_profile_fraction, wrap_lock_classes),
            stalls,
        ]
        self._loop_switches: list[_LoopSwitch] = [stalls, *([task_tracking] if track_tasks else [])]
        self._loops: weakref.WeakSet[asyncio.AbstractEventLoop] = weakref.WeakSet()
        self._lock = threading.RLock()  # a finalizer may close in the middle of opening
        self._on = False
        self._has_failed = False

    def on(self) -> None:
        """Switch everything on that is not; in a forked process, memory samples begin anew."""
        with self._lock:
            if not self._on:
                self._on = True
                for recorder, setting in self._uses:
                    recorder.enable(setting)
                for switch in self._switches:
                    switch.enable()
            self.resume()

    def resume(self) -> None:
        """
        Start what can start only now, if the rest is on.

        That is what belongs to the running loop, and memory samples: in a forked
        process, or when another tool has stopped them or made them impossible.
        """
        loop = asyncio._get_running_loop()
        with self._lock:
            if self._on:
                heap_sampler.resume()
            if loop is None or not self._on:
                return
            try:
                if loop not in self._loops:
                    self._loops.add(loop)
                    for switch in self._loop_switches:
                        switch.attach(loop)
            except Exception:  # of a loop of the application's own kind
                if not self._has_failed:
                    logger.exception("asgi_pprof cannot watch this kind of loop; logged once")
                self._has_failed = True

    def off(self) -> None:
        """Put everything back."""
        with self._lock:
            if self._on:
                self._on = False
                for recorder, setting in self._uses:
                    recorder.disable(setting)
                for switch in self._switches:
                    switch.disable()
                for loop in list(self._loops):
                    for loop_switch in self._loop_switches:
                        loop_switch.detach(loop)
                self._loops.clear()
