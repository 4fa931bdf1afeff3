"""The watch thread: one thread of the process scans all watched event loops."""

from __future__ import annotations

import _thread
import asyncio
import importlib
import logging
import math
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from time import monotonic_ns as _clock_ns

from asgi_pprof.collectors.stall.causes import PUNCTUAL_NS, Wakeup
from asgi_pprof.collectors.stall.lag import LagFigures
from asgi_pprof.collectors.stall.loop_monitor import (
    LoopMonitor,
    Observation,
    Stall,
    Threshold,
)
from asgi_pprof.native.core import native
from asgi_pprof.profile import Label, pseudo_location
from asgi_pprof.recorder import Recorder
from asgi_pprof.runtime.frames import current_frames
from asgi_pprof.runtime.gc_pauses import GcPauses
from asgi_pprof.runtime.iterations import ITERATION_VARIABLES
from asgi_pprof.runtime.libraries import resource
from asgi_pprof.runtime.own_work import begin_own_thread
from asgi_pprof.runtime.proc import LoopThread
from asgi_pprof.stacks import StackCounter, StackKey, StackTotal, stack_key

DEFAULT_THRESHOLD_MS = 100.0
FURTHER = pseudo_location("stalls of further stacks")

_CHEAP_SCANS = 10  # in a row, while all loops are quiet
_SETTLING_MS = 100  # at most, for the thread to count what has ended
_MAX_STACKS = 1024  # different stacks, labels and causes

_RUSAGE_THREAD: int | None = getattr(resource, "RUSAGE_THREAD", None)  # what Linux has

logger = logging.getLogger("asgi_pprof")


def _why_not() -> str:
    """Return why nothing can be watched here, "" if it can."""
    if not getattr(sys, "_is_gil_enabled", lambda: True)():
        return "off: frames of running threads cannot be read safely on a free-threaded build"
    if native:
        return ""  # the C core loads in the main interpreter only
    for name in ("_interpreters", "_xxsubinterpreters"):
        was_loaded = name in sys.modules
        with suppress(ImportError, AttributeError):
            interpreters = importlib.import_module(name)
            if interpreters.get_current() != interpreters.get_main():
                # Before 3.14 an interpreter that ends before its threads do ends the process.
                return "off: this is not the main interpreter"
        if not was_loaded:
            # While the module is loaded, runtime.frames assumes that there are interpreters.
            sys.modules.pop(name, None)
    return ""


CANNOT = _why_not()


class StallWatch(Recorder):
    """
    Watches event loops; users have thresholds in milliseconds, of which the lowest above 0 holds.

    Its methods may be called from any thread.

    Importing or making it starts nothing: the thread lives while there is a loop to
    watch and a threshold. Garbage collections are told apart while they are timed
    (`runtime.gc_pauses`), which a middleware switches on.

    Args:
        gc_pauses: The timer of garbage collections.
        open_thread: Opens what the system tells of a thread.
    """

    def __init__(
        self,
        gc_pauses: GcPauses | None = None,
        open_thread: Callable[[int], LoopThread] = LoopThread,
    ) -> None:
        super().__init__()
        self._gc_pauses = gc_pauses or GcPauses()
        self._open_thread = open_thread
        self._threshold_ns = int(DEFAULT_THRESHOLD_MS * 1e6)  # as set; a window may need another
        self._begin()

    def _begin(self) -> None:
        self._windows: list[None] = []  # one for each
        self._threshold = Threshold(self._threshold_ns)
        self._monitors: dict[int, LoopMonitor] = {}  # by the id of the loop, not kept alive
        self._dropped: list[LoopMonitor] = []
        self._is_watching = False
        self._has_changed = False  # the loops or the threshold, since the thread last asked
        self._wakeup = _thread.allocate_lock()  # the thread sleeps on it; `_wake` releases it
        self._wakeup.acquire()
        self._counter = StackCounter(FURTHER, _MAX_STACKS)

    def _renew_after_fork(self) -> None:
        # A forked process has neither the thread nor the loops. Descriptors stay open: by now
        # their numbers may belong to other files.
        self._begin()

    def _enabled(self) -> None:
        self._set_lowest_threshold()

    def _disabled(self, setting: float) -> None:
        self._set_lowest_threshold()

    def _set_lowest_threshold(self) -> None:
        default_ms = 0 if self._settings else DEFAULT_THRESHOLD_MS
        self.set_threshold(min(filter(None, self._settings), default=default_ms))

    def attach(self, loop: asyncio.AbstractEventLoop) -> None:
        """Watch a loop; pair with `detach`. Call it on the loop's thread, while the loop runs."""
        if CANNOT:
            return
        with self._lock:
            monitor = self._monitor(loop)
            if monitor is None:
                if id(loop) in self._monitors:  # of a closed loop that had the same id
                    self._dropped.append(self._monitors[id(loop)])
                monitor = LoopMonitor(
                    loop,
                    self._threshold,
                    self._add,
                    self._wake,
                    self._open_thread,
                    self._gc_pauses,
                )
                self._monitors[id(loop)] = monitor
            monitor.users += 1
            self._change()

    def detach(self, loop: asyncio.AbstractEventLoop) -> None:
        """Stop watching a loop once no user needs it; ignored if it is not watched."""
        with self._lock:
            monitor = self._monitor(loop)
            if monitor is None:
                return
            monitor.users -= 1
            if monitor.users == 0:
                self._dropped.append(self._monitors.pop(id(loop)))
                self._change()

    def _monitor(self, loop: asyncio.AbstractEventLoop) -> LoopMonitor | None:
        monitor = self._monitors.get(id(loop))
        return monitor if monitor is not None and monitor.loop() is loop else None

    def set_threshold(self, threshold_ms: float) -> None:
        """
        Count stalls of so many milliseconds and more; 0 counts none.

        Raises:
            ValueError: It is negative or no number.
        """
        if not 0 <= threshold_ms < math.inf:
            raise ValueError(f"a threshold is 0 or more milliseconds, not {threshold_ms!r}")
        with self._lock:
            self._threshold_ns = int(threshold_ms * 1e6)
            self._apply_threshold()

    def _apply_threshold(self) -> None:
        default_ns = int(DEFAULT_THRESHOLD_MS * 1e6) if self._windows else 0
        self._threshold.ns = self._threshold_ns or default_ns
        self._change()

    def _change(self) -> None:
        self._has_changed = True
        if not self._is_watching:
            self._close_dropped()
        self._start_thread()
        self._wake()

    @property
    def threshold_ms(self) -> float:
        """The threshold that holds now, in milliseconds; 0 if nothing is recorded."""
        return 0 if CANNOT else self._threshold.ns / 1e6

    def why_off(self) -> str:
        """Return why no loop can be watched here, "" if loops can be."""
        return CANNOT

    def is_on(self) -> bool:
        """Tell whether stalls of watched loops are recorded."""
        return self.threshold_ms > 0

    @contextmanager
    def window(self) -> Iterator[None]:
        """Watch the running loop meanwhile, from 100 ms if no threshold is set."""
        loop, windows = asyncio.get_running_loop(), self._windows  # a forked child has others
        with self._lock:
            self.attach(loop)
            windows.append(None)
        try:
            with self._lock:
                self._apply_threshold()
            yield
        finally:
            with self._lock:
                self.detach(loop)
                windows.pop()
                self._apply_threshold()

    def _add(self, stall: Stall) -> None:
        parts: dict[tuple[tuple[int, ...], tuple[Label, ...]], tuple[StackKey, int]] = {}
        for seen, part_ns in stall.parts or ((Observation(), stall.delay_ns),):
            stack = stack_key(seen.stack)
            key = stack.places, seen.labels
            parts[key] = stack, part_ns + parts.get(key, (stack, 0))[1]
        counted = max(parts, key=lambda key: parts[key][1])  # one stall, where most of it was
        for key, (stack, part_ns) in parts.items():
            self._counter.add(stack, (key == counted, part_ns), key[1], stall.cause)

    def totals(self) -> list[StackTotal]:
        """Return stalls and nanoseconds by stack, labels and cause, as counted in this process."""
        return self._counter.totals()

    def count(self) -> int:
        """Return how many stalls have been counted in this process."""
        return self._counter.count()

    def memory_bytes(self) -> int:
        return self._counter.memory_bytes()

    def loops(self) -> list[asyncio.AbstractEventLoop]:
        """Return the watched loops."""
        monitors = list(self._monitors.values())
        return [loop for monitor in monitors if (loop := monitor.loop()) is not None]

    def lag(self, loop: asyncio.AbstractEventLoop) -> LagFigures | None:
        """Return how late a loop's callbacks were in the last minute; None if it is not watched."""
        monitor = self._monitor(loop)
        return None if monitor is None else monitor.lag()

    async def settle(self) -> None:
        """Give the thread a moment to count what has just ended; on asyncio only."""
        if asyncio._get_running_loop() is None:
            return
        for _ in range(_SETTLING_MS):
            if not any(monitor.has_uncounted_stall() for monitor in list(self._monitors.values())):
                return
            await asyncio.sleep(0.001)

    def _start_thread(self) -> None:
        """Start the thread unless it runs or has nothing to watch."""
        if self._is_watching or not self._monitors or not self.is_on():
            return
        for monitor in list(self._monitors.values()):
            monitor.count_from_now()
        # Not threading.Thread: it is not the application's, and not to be counted.
        with suppress(RuntimeError):  # no more threads: tried again with the next loop
            _thread.start_new_thread(self._run, ())
            self._is_watching = True

    def _wake(self) -> None:
        with suppress(RuntimeError):  # it has been woken already
            self._wakeup.release()

    def _run(self) -> None:
        try:
            self._watch_while_needed()
        except Exception as error:
            with self._lock:
                self._threshold.ns = self._threshold_ns = 0
                self._current_monitors()
            _log(error)

    def _watch_while_needed(self) -> None:
        begin_own_thread()
        sleeper = _Sleeper(self._wakeup)
        while monitors := self._current_monitors():
            scanner = _Scanner(monitors, self._threshold)
            due_ns: int | None = scanner.due_ns()
            while due_ns is not None and not self._has_changed:
                wakeup = sleeper.sleep(due_ns)
                if not self._has_changed:
                    due_ns = scanner.scan(wakeup, sleeper)

    def _current_monitors(self) -> list[LoopMonitor]:
        """Return the monitors to scan; if there is none, the thread must end."""
        with self._lock:
            self._has_changed = False
            for key, monitor in self._monitors.copy().items():
                if monitor.loop() is None:
                    self._dropped.append(self._monitors.pop(key))
            monitors = list(self._monitors.values()) if self.is_on() else []
            if not monitors:
                for monitor in list(self._monitors.values()):
                    monitor.close()
            self._close_dropped()
            self._is_watching = bool(monitors)
            return monitors

    def _close_dropped(self) -> None:
        # While the thread runs only the thread does this: it could be reading from them.
        for monitor in self._dropped:
            monitor.close()
        self._dropped.clear()


class _Scanner:
    """Scans the loops that are watched until there is a change."""

    def __init__(self, monitors: list[LoopMonitor], threshold: Threshold) -> None:
        self._monitors = monitors
        self._threshold = threshold
        self._cheap_scans = 0  # that may come before the next full one

    def scan(self, wakeup: Wakeup, sleeper: _Sleeper) -> int | None:
        """Scan all loops; return when the next scan is due, None if a loop is closed or gone."""
        if self._cheap_scans and wakeup.is_punctual and self._are_still_quiet():
            # An idle service runs little but this. Code that has not run for long
            # is in no CPU cache and takes many times as long.
            self._cheap_scans -= 1
            for monitor in self._monitors:
                monitor.stay_idle()
            return self.due_ns()
        self._cheap_scans = _CHEAP_SCANS
        idents = [monitor.ident for monitor in self._monitors]
        stacks = current_frames(idents, locals_of=ITERATION_VARIABLES)
        for monitor in self._monitors:
            monitor.observe(wakeup, stacks)
        are_open = [monitor.advance(wakeup) for monitor in self._monitors]
        sleeper.begin()
        return self.due_ns() if all(are_open) else None

    def due_ns(self) -> int:
        """Return when the next scan is due."""
        now_ns = _clock_ns()
        if all(monitor.is_quiet for monitor in self._monitors):
            return now_ns + self._threshold.quiet_interval_ns
        deadlines_ns = [at_ns for monitor in self._monitors if (at_ns := monitor.deadline_ns)]
        return min([now_ns + self._threshold.interval_ns, *deadlines_ns])

    def _are_still_quiet(self) -> bool:
        stacks = current_frames([monitor.ident for monitor in self._monitors], depth=2)
        return all(monitor.is_still_quiet(stacks) for monitor in self._monitors)


class _Sleeper:
    """
    Lets the watch thread sleep, and finds out why it woke late.

    A thread that waits for the GIL wakes once in a switch interval to ask for it. So
    we count the thread's waits, by a call that costs a fifth of a wakeup and is made
    only when it wakes late. Each sleep is one wait; all others since `begin` are
    taken for waits for the GIL.

    Args:
        wakeup: A lock that is held; its release ends a sleep early.
    """

    def __init__(self, wakeup: _thread.LockType) -> None:
        self._wakeup = wakeup
        self.begin()

    def begin(self) -> None:
        """Begin to count waits."""
        self._sleeps = 0
        self._waits = _waits()

    def sleep(self, until_ns: int) -> Wakeup:
        """Sleep until this moment."""
        is_early = self._wakeup.acquire(True, max(until_ns - _clock_ns(), 0) / 1e9)
        now_ns = _clock_ns()
        self._sleeps += 1
        if is_early or now_ns - until_ns < PUNCTUAL_NS:
            return Wakeup(now_ns, now_ns, 0)
        return Wakeup(now_ns, until_ns, min(self._for_gil_ns(), now_ns - until_ns))

    def _for_gil_ns(self) -> int:
        asked = _waits() - self._waits - self._sleeps - 1
        return max(int(asked * sys.getswitchinterval() * 1e9), 0)


def _waits() -> int:
    """Return how often the calling thread has waited for anything; 0 where that is not known."""
    if _RUSAGE_THREAD is None:
        return 0
    return resource.getrusage(_RUSAGE_THREAD).ru_nvcsw


def _log(error: Exception) -> None:
    # In a thread of its own: logging looks up its thread, and would leave a dummy for ours.
    message = "asgi_pprof: watching event loops failed; no stalls are recorded"
    with suppress(RuntimeError):  # the interpreter is about to end
        threading.Thread(
            target=logger.error,
            args=(message,),
            kwargs={"exc_info": error},
            name="asgi_pprof log",
            daemon=True,
        ).start()
