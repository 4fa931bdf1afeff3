"""
The recorders of the process, and those that one middleware uses.

Each recorder counts its users, so several middlewares in one process share it.
"""

from __future__ import annotations

import _thread
import asyncio
import logging
import math
import weakref
from contextlib import ExitStack
from typing import Any, Literal

from asgi_pprof.collectors.contention.collector import Contention, ContentionSettings
from asgi_pprof.collectors.goroutine.task_tracking import TaskTracking, task_tracking
from asgi_pprof.collectors.heap.sampler import DEFAULT_RATE, MAX_RATE, HeapSampler
from asgi_pprof.collectors.heap.tracing import Tracing
from asgi_pprof.collectors.stall.watch import DEFAULT_THRESHOLD_MS, StallWatch
from asgi_pprof.collectors.threadcreate import ThreadStarts
from asgi_pprof.forks import process_lock
from asgi_pprof.native.core import native
from asgi_pprof.native.label_interner import book
from asgi_pprof.offload import workers
from asgi_pprof.recorder import Recorder
from asgi_pprof.runtime.gc_pauses import GcPauses

HeapEngine = Literal["tracemalloc"]

logger = logging.getLogger("asgi_pprof")

contention = Contention()
gc_pauses = GcPauses()
heap_sampler = HeapSampler()
heap_tracing = Tracing()
stall_watch = StallWatch(gc_pauses)
thread_starts = ThreadStarts()


def memory_bytes() -> int:
    """
    Return about how much memory the process's recorders take.

    Tables of the C core are counted exactly, by resident pages, records in Python by
    their number. A record of each task (some 200 bytes) is not counted.
    """
    recorders = (contention, stall_watch, thread_starts)
    in_c: int = native.memory() if native else 0
    return in_c + book.memory_bytes() + sum(recorder.memory_bytes() for recorder in recorders)


def set_block_profile_rate(rate_ns: int) -> None:
    """
    Record waits: on average one for every `rate_ns` nanoseconds spent waiting.

    Waits at least that long are all recorded, shorter ones in proportion, and
    counts and sums are scaled to be right on average. 1 records everything, 0
    or less nothing. What has been recorded stays in the profile.

    Waits for `threading.Lock` and `RLock` are recorded only in a process with a
    middleware that has `wrap_lock_classes=True`: this function replaces neither
    of them by itself.

    Source: runtime.SetBlockProfileRate.
    """
    contention.set_rate("block", rate_ns)


def set_mutex_profile_fraction(rate: int) -> int:
    """
    Record one in `rate` releases that others waited for, and return the rate before.

    1 records everything, 0 nothing; a negative one changes nothing. As to
    `threading.Lock` and `RLock`, see `set_block_profile_rate`.

    Source: runtime.SetMutexProfileFraction.
    """
    if rate < 0:
        return contention.rate("mutex")
    return contention.set_rate("mutex", rate)


def start(memory_profile_rate: int = DEFAULT_RATE) -> None:
    """
    Begin to record before there is a middleware, as the first line of a program.

    Memory is then sampled from here on, so that what imports allocate is in heap
    profiles, and starts of threads and garbage collections are recorded. The first
    middleware takes over what runs, memory at this rate, and it all ends with the last
    middleware. Another call, or one after a middleware was built, changes nothing.

    Args:
        memory_profile_rate: As that of `PprofMiddleware`.

    Raises:
        ValueError: The rate is negative or too large.
    """
    _early.start(memory_profile_rate)


class UsedRecorders:
    """
    The recorders that one middleware uses; `PprofMiddleware` describes the arguments.

    Raises:
        ValueError: `heap` is unknown, or a rate or the threshold is negative.
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
        if min(block_profile_rate, mutex_profile_fraction) < 0:
            raise ValueError(
                "block_profile_rate is nanoseconds a sample and mutex_profile_fraction one event"
                f" in so many, or 0; not {block_profile_rate!r} and {mutex_profile_fraction!r}"
            )
        if not 0 <= stall_threshold_ms < math.inf:
            raise ValueError(f"stall_threshold_ms is 0 or more, not {stall_threshold_ms!r}")
        rates = ContentionSettings(block_profile_rate, mutex_profile_fraction, wrap_lock_classes)
        self._uses: list[tuple[Recorder, Any]] = [
            (thread_starts, None),
            (gc_pauses, None),
            (heap_tracing, None) if heap else (heap_sampler, memory_profile_rate),
            (contention, rates),
            (stall_watch, stall_threshold_ms),
        ]
        self._loop_recorders: list[StallWatch | TaskTracking] = [
            *([stall_watch] if stall_threshold_ms else []),
            *([task_tracking] if track_tasks else []),
        ]
        self._attached: weakref.WeakKeyDictionary[
            asyncio.AbstractEventLoop, list[StallWatch | TaskTracking]
        ] = weakref.WeakKeyDictionary()
        self._on = False
        self._has_failed = False

    @property
    def _lock(self) -> _thread.RLock:
        return process_lock()

    def on(self) -> None:
        """Enable all of them; those that were on go on, in a forked process from the start."""
        with self._lock:
            if not self._on:
                with ExitStack() as undo:
                    workers.keep()
                    undo.callback(workers.release)
                    for recorder, setting in self._uses:
                        recorder.enable(setting)
                        undo.callback(recorder.disable, setting)
                    undo.pop_all()
                self._on = True
            self.resume()
            _early.take_over(self)

    def resume(self) -> None:
        """
        Start what can start only now, while they are enabled.

        That is what belongs to the running loop, and the heap sampler: in a forked
        process, or when another tool has stopped it or made it impossible.
        """
        loop = asyncio._get_running_loop()
        with self._lock:
            if self._on:
                heap_sampler.resume()
            if loop is None or not self._on:
                return
            try:
                if loop not in self._attached:
                    attached = self._attached[loop] = []
                    for recorder in self._loop_recorders:
                        recorder.attach(loop)
                        attached.append(recorder)
            except Exception:  # of a loop of the application's own class
                if not self._has_failed:
                    logger.exception("asgi_pprof cannot watch this kind of loop; logged once")
                self._has_failed = True

    def off(self) -> None:
        """Disable all of them; what no other middleware uses is put back."""
        with self._lock:
            if self._on:
                self._on = False
                workers.release()
                for recorder, setting in self._uses:
                    recorder.disable(setting)
                for loop, attached in list(self._attached.items()):
                    for loop_recorder in attached:
                        loop_recorder.detach(loop)
                self._attached.clear()


class _Early:
    """What is recorded before there is a middleware."""

    def __init__(self) -> None:
        self._recorders: UsedRecorders | None = None
        self._is_needed = True

    def start(self, memory_profile_rate: int) -> None:
        recorders = UsedRecorders(
            None, memory_profile_rate, track_tasks=False, stall_threshold_ms=0
        )
        with process_lock():
            if self._is_needed:
                self._is_needed = False
                self._recorders = recorders
                recorders.on()

    def take_over(self, by: UsedRecorders) -> None:
        """Stop, since these recorders are on."""
        recorders = self._recorders
        self._is_needed = False
        if recorders not in (None, by):
            self._recorders = None
            recorders.off()


_early = _Early()
