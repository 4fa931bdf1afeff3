"""
stall: what held an event loop for longer than a threshold.

What is measured: every stretch of 100 ms or more (settable) in which a watched
loop did not turn, cumulative for the life of the process: one stall and its
nanoseconds, with the stack and the labels of the task that held the loop.
Leaves in angle brackets tell what was not the loop's own code, where that is
known: `<garbage collection>`, `<waiting for the GIL>`, and
`<process not running>` for a process that was stopped or got no CPU.

How: one thread looks at all loops every 75 ms, every 225 ms while they have
nothing to do (`loop_pulse`), and once more at a turn that passes the threshold. A
call in C that keeps the GIL is looked at when it ends, before the loop's thread
goes on. When the turn began is known from asyncio's loop and from uvloop's
themselves, so durations are right to some milliseconds.

What it costs: nothing in a request's way. The thread's waking is all an idle
service pays. A loop found in a turn is sent one callback then, 13 a second at
most. Smaller thresholds cost more in proportion. A descriptor a loop.

What it misses: a stall is one turn, with one stack, however many callbacks ran
in it one after the other. A callback's own labels are not known, only a task's.
After operators, which unlike calls do not hand over the GIL, the line can be
that of the next call. After a time in which no loop had anything to do, a stall
shorter than 230 ms can lie between two looks: of 100 ms more than half are not
seen. (Looking twice as often would cost twice as much.) With uvloop a turn
counts from when a callback last set a timer or asked for the time, and
callbacks that are functions in C are not seen. Of loops that are neither
asyncio's nor uvloop's, and of uvloop's where it is not Linux, only what is left
of a stall at a look counts. Where the system does not tell what threads use
(not Linux, or no /proc), causes are not known but garbage collection, stretches
without the GIL or the CPU count only in a turn, and looks are 75 ms apart at
all times. Between two turns a loop that waits for the GIL looks like one that
waits for events, and is asked only where the watching thread was kept as well.
Nothing is watched on a free-threaded build, where frames of threads that run
cannot be read safely, nor in sub-interpreters.
"""

from __future__ import annotations

import _thread
import asyncio
import functools
import importlib
import logging
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from asgi_pprof.collectors.stall.loop_pulse import (
    LAG_WINDOW_NS,
    PUNCTUAL_NS,
    LoopPulse,
    Pace,
    Stall,
    Waking,
)
from asgi_pprof.native.core import native
from asgi_pprof.profile import Profile, ValueType, pseudo_location
from asgi_pprof.runtime.frames import current_frames
from asgi_pprof.runtime.loop_threads import TURN_VARIABLES
from asgi_pprof.runtime.proc import LoopThread
from asgi_pprof.stacks import StackCounter, StackTotal, name_totals, stack_key

DEFAULT_THRESHOLD_MS = 100.0
OFF = "off: stalls of the event loop are not recorded"
FURTHER = pseudo_location("stalls of further stacks")

_QUICK_LOOKS = 10  # before one that finds out more
_SETTLING_MS = 100  # at most, for the thread to count what has ended
_MAX_STACKS = 1024  # different stacks, labels and causes

_RUSAGE_THREAD: int | None = None  # what Linux has
try:
    import resource
except ImportError:
    pass
else:
    _RUSAGE_THREAD = getattr(resource, "RUSAGE_THREAD", None)

logger = logging.getLogger("asgi_pprof")


def _why_not() -> str:
    """Return why nothing can be watched here, "" if it can."""
    if not getattr(sys, "_is_gil_enabled", lambda: True)():
        return "off: frames of running threads cannot be read safely on a free-threaded build"
    if native:
        return ""  # which is only in the main interpreter
    for name in ("_interpreters", "_xxsubinterpreters"):
        was_loaded = name in sys.modules
        with suppress(ImportError, AttributeError):
            interpreters = importlib.import_module(name)
            if interpreters.get_current() != interpreters.get_main():
                # Before 3.14 one that ends while a thread of its does ends the process.
                return "off: this is not the main interpreter"
        if not was_loaded:
            sys.modules.pop(name, None)  # who loads it may make interpreters (runtime.frames)
    return ""


CANNOT = _why_not()


@dataclass(frozen=True, slots=True)
class LagFigures:
    """
    How one loop turned.

    The lateness is that of the last minute: what a callback would have waited
    at any moment of it, 0 while the loop waited for events. Stalls count since
    the loop is watched.
    """

    p50_ns: int
    p90_ns: int
    p99_ns: int
    max_ns: int
    stalls: int
    stall_ns: int


class StallWatch:
    """
    Watches event loops; one for the process. Its methods may be called from any thread.

    Importing or making it starts nothing: the thread lives while there is a
    loop to watch and a threshold. Collections of garbage are told apart while
    they are timed (`runtime.gc_pauses`), which a middleware sees to.

    Args:
        open_thread: Gives what the system tells of a thread.
    """

    def __init__(self, open_thread: Callable[[int], LoopThread] = LoopThread) -> None:
        self._open_thread = open_thread
        self._threshold_ns = int(DEFAULT_THRESHOLD_MS * 1e6)
        self._begin()

    def _begin(self) -> None:
        self._process = os.getpid()
        # Reentrant: a finalizer may detach in the middle of anything. Not
        # threading's: applications patch those, as we do.
        self._lock = _thread.RLock()
        self._windows = 0
        self._pace = Pace(self._threshold_ns)
        self._pulses: dict[int, LoopPulse] = {}  # by the id of the loop, which is not kept alive
        self._dropped: list[LoopPulse] = []
        self._is_watching = False
        self._has_changed = False  # what is watched, since the thread has asked
        self._bell = _thread.allocate_lock()  # the thread sleeps on it, and `_wake` releases it
        self._bell.acquire()
        self._counter = StackCounter(FURTHER, _MAX_STACKS)

    def _begin_after_fork(self) -> None:
        # A forked process has neither the thread nor the loops, and a lock that
        # may be taken for ever. (A hook for forks could not be taken out again.)
        if self._process == os.getpid():
            return
        self._begin()  # what is open stays: its number may be somebody else's by now

    def attach(self, loop: asyncio.AbstractEventLoop) -> None:
        """
        Watch a loop; pair with `detach`.

        To be called on the loop's thread, while it runs.
        """
        if CANNOT:
            return
        self._begin_after_fork()
        with self._lock:
            pulse = self._pulses.get(id(loop))
            if pulse is None or pulse.loop() is not loop:
                if pulse is not None:
                    self._dropped.append(pulse)  # of a closed loop that was there before
                pulse = LoopPulse(loop, self._pace, self._add, self._wake, self._open_thread)
                self._pulses[id(loop)] = pulse
            pulse.users += 1
            self._change()

    def detach(self, loop: asyncio.AbstractEventLoop) -> None:
        """Watch a loop no longer, once nobody needs it watched; nothing happens if none is."""
        self._begin_after_fork()
        with self._lock:
            pulse = self._pulses.get(id(loop))
            if pulse is None or pulse.loop() is not loop:
                return
            pulse.users -= 1
            if pulse.users == 0:
                del self._pulses[id(loop)]
                self._dropped.append(pulse)
                self._change()

    def set_threshold(self, threshold_ms: float) -> None:
        """
        Count stretches of so many milliseconds and more; 0 counts none.

        Raises:
            ValueError: It is negative or no number.
        """
        if not 0 <= threshold_ms < math.inf:
            raise ValueError(f"a threshold is 0 or more milliseconds, not {threshold_ms!r}")
        self._begin_after_fork()
        with self._lock:
            self._threshold_ns = int(threshold_ms * 1e6)
            self._set_pace()

    def _set_pace(self) -> None:
        default_ns = int(DEFAULT_THRESHOLD_MS * 1e6) if self._windows else 0
        self._pace.threshold_ns = self._threshold_ns or default_ns
        self._change()

    def _change(self) -> None:
        self._has_changed = True
        if not self._is_watching:
            self._close_dropped()
        self._watch()
        self._wake()

    @property
    def threshold_ms(self) -> float:
        """What is recorded now, in milliseconds; 0 if nothing is."""
        return 0 if CANNOT else self._pace.threshold_ns / 1e6

    def is_on(self) -> bool:
        """Tell whether stalls are recorded where a loop is watched."""
        return self.threshold_ms > 0

    @contextmanager
    def window(self) -> Iterator[None]:
        """Hold it on meanwhile, for the running loop, with 100 ms if it is off."""
        loop = asyncio.get_running_loop()
        self._begin_after_fork()
        with self._lock:
            self._windows += 1
            self._set_pace()
            self.attach(loop)
        try:
            yield
        finally:
            with self._lock:
                self.detach(loop)
                self._windows -= 1
                self._set_pace()

    def _add(self, stall: Stall) -> None:
        stack, labels = (stall.look.stack, stall.look.labels) if stall.look else ((), ())
        self._counter.add(stack_key(stack), (1, stall.delay_ns), labels, stall.cause)

    def totals(self) -> list[StackTotal]:
        """Return stalls and nanoseconds by stack, labels and cause, as counted in this process."""
        self._begin_after_fork()
        return self._counter.totals()

    def count(self) -> int:
        """Return how many stalls have been counted in this process."""
        return sum(total.values[0] for total in self.totals())

    def loops(self) -> list[asyncio.AbstractEventLoop]:
        """Return the watched loops."""
        self._begin_after_fork()
        pulses = list(self._pulses.values())
        return [loop for pulse in pulses if (loop := pulse.loop()) is not None]

    def lag(self, loop: asyncio.AbstractEventLoop) -> LagFigures | None:
        """Return how a loop turned; None if it is not watched."""
        self._begin_after_fork()
        pulse = self._pulses.get(id(loop))
        if pulse is None or pulse.loop() is not loop:
            return None
        now_ns = time.monotonic_ns()
        step_ns = self._pace.tick_ns
        # A stretch is late for each moment in it, not once.
        late = sorted(
            late_ns
            for _, longest_ns in pulse.lateness(now_ns)
            for late_ns in range(longest_ns, 0, -step_ns)[: LAG_WINDOW_NS // step_ns]
        )[-LAG_WINDOW_NS // step_ns :]
        moments = max(min(now_ns - pulse.since_ns, LAG_WINDOW_NS) // step_ns, len(late), 1)
        p50, p90, p99 = (
            late[index] if (index := len(late) - 1 - int(moments * beyond)) >= 0 else 0
            for beyond in (0.5, 0.1, 0.01)
        )
        return LagFigures(p50, p90, p99, max(late, default=0), pulse.stalls, pulse.stall_ns)

    async def settle(self) -> None:
        """Give the thread a moment to count what has just ended."""
        for _ in range(_SETTLING_MS):
            if not any(pulse.has_news() for pulse in list(self._pulses.values())):
                return
            await asyncio.sleep(0.001)

    def _watch(self) -> None:
        """Start the thread unless it runs or has nothing to watch."""
        if self._is_watching or not self._pulses or not self.is_on():
            return
        for pulse in list(self._pulses.values()):
            pulse.begin()
        # Not threading.Thread: it is not the application's, and not to be counted.
        with suppress(RuntimeError):  # no more threads: tried again with the next loop
            _thread.start_new_thread(self._run, ())
            self._is_watching = True

    def _wake(self) -> None:
        with suppress(RuntimeError):  # it has been woken already
            self._bell.release()

    def _run(self) -> None:
        try:
            self._watch_while_needed()
        except Exception as error:
            with self._lock:
                self._pace.threshold_ns = self._threshold_ns = 0
                self._watched()
            _log(error)

    def _watch_while_needed(self) -> None:
        _name_thread()
        sleeper = _Sleeper(self._bell)
        while pulses := self._watched():
            are_open, quick_looks = True, 0
            while are_open and not self._has_changed:
                is_idle = all(pulse.is_idle for pulse in pulses)
                waking = sleeper.sleep(self._next_look_ns(pulses, is_idle))
                if self._has_changed:
                    break
                if is_idle and quick_looks and waking.is_punctual and _all_rest(pulses):
                    # Of an idle service this is nearly all that runs: what has not run
                    # for long is in no cache, and takes many times as long as it would.
                    quick_looks -= 1
                    for pulse in pulses:
                        pulse.note_rest()
                else:
                    quick_looks = _QUICK_LOOKS
                    _look(pulses, waking)
                    judged = [pulse.judge(waking) for pulse in pulses]
                    are_open = all(judged)
                    sleeper.begin()

    def _next_look_ns(self, pulses: list[LoopPulse], is_idle: bool) -> int:
        now_ns = time.monotonic_ns()
        if is_idle:
            return now_ns + self._pace.idle_tick_ns
        dues_ns = [at_ns for pulse in pulses if (at_ns := pulse.due_ns)]
        return min([now_ns + self._pace.tick_ns, *dues_ns])

    def _watched(self) -> list[LoopPulse]:
        """Return what to watch; if that is nothing, the thread has ended."""
        with self._lock:
            self._has_changed = False
            for key, pulse in self._pulses.copy().items():
                if pulse.loop() is None:
                    self._dropped.append(self._pulses.pop(key))
            pulses = list(self._pulses.values()) if self.is_on() else []
            if not pulses:
                for pulse in list(self._pulses.values()):
                    pulse.close()
            self._close_dropped()
            self._is_watching = bool(pulses)
            return pulses

    def _close_dropped(self) -> None:
        # On the watching thread while there is one, which could be reading from them.
        for pulse in self._dropped:
            pulse.close()
        self._dropped.clear()


def _name_thread() -> None:
    with suppress(OSError):  # where there is no such file, the thread has no name
        path = f"/proc/self/task/{threading.get_native_id()}/comm"
        Path(path).write_bytes(b"asgi_pprof")  # as the C core's


def _log(error: Exception) -> None:
    # Logging names its thread, which would leave a dummy for ours in threading.
    words = "asgi_pprof: watching event loops failed; no stalls are recorded"
    with suppress(RuntimeError):  # the interpreter is about to end
        threading.Thread(
            target=logger.error,
            args=(words,),
            kwargs={"exc_info": error},
            name="asgi_pprof log",
            daemon=True,
        ).start()


class _Sleeper:
    """
    Lets the watching thread sleep, and tells what kept it when it wakes late.

    Whoever waits for the GIL wakes once in a switch interval to ask for it: so
    its waits are counted, by a call that costs a fifth of a wake and so is not
    made at each. A sleep is one; what else there was since `begin` is taken for
    waiting for the GIL.

    Args:
        bell: A lock that is held; sleep ends early when it is released.
    """

    def __init__(self, bell: _thread.LockType) -> None:
        self._bell = bell
        self.begin()

    def begin(self) -> None:
        """Begin to count waits."""
        self._sleeps = 0
        self._waits = _waits()

    def sleep(self, until_ns: int) -> Waking:
        """Sleep until this moment."""
        is_rung = self._bell.acquire(True, max(until_ns - time.monotonic_ns(), 0) / 1e9)
        now_ns = time.monotonic_ns()
        self._sleeps += 1
        if is_rung or now_ns - until_ns < PUNCTUAL_NS:
            return Waking(now_ns, now_ns, 0)
        return Waking(now_ns, until_ns, min(self._asking_ns(), now_ns - until_ns))

    def _asking_ns(self) -> int:
        asked = _waits() - self._waits - self._sleeps - 1
        return max(int(asked * sys.getswitchinterval() * 1e9), 0)


def _look(pulses: list[LoopPulse], waking: Waking) -> None:
    stacks = current_frames([pulse.ident for pulse in pulses], locals_of=TURN_VARIABLES)
    for pulse in pulses:
        pulse.look(waking, stacks)


def _all_rest(pulses: list[LoopPulse]) -> bool:
    stacks = current_frames([pulse.ident for pulse in pulses], depth=2)
    return all(pulse.is_at_rest(stacks) for pulse in pulses)


def _waits() -> int:
    """Return how often the calling thread has waited for anything; 0 where that is not known."""
    if _RUSAGE_THREAD is None:
        return 0
    return resource.getrusage(_RUSAGE_THREAD).ru_nvcsw


stall_watch = StallWatch()


class StallCollector:
    """
    What held event loops.

    Args:
        watch: Where it is recorded.
    """

    def __init__(self, watch: StallWatch = stall_watch) -> None:
        self._watch = watch

    def count(self) -> int:
        """Return the number of stalls."""
        return self._watch.count()

    def note(self) -> str:
        """Return that it is off, if it is."""
        return "" if self._watch.is_on() else CANNOT or OFF

    def window(self) -> AbstractContextManager[None]:
        """Return a manager that switches it on for the running loop, if it is off."""
        return self._watch.window()

    async def snapshot(self) -> Callable[[], Profile]:
        """Give stalls/count and delay/nanoseconds by stack, with the tasks' labels."""
        await self._watch.settle()
        comment = self.note() or f"stretches of {self._watch.threshold_ms:g} ms and more"
        return functools.partial(_profile, self._watch.totals(), comment, time.time_ns())


def _profile(totals: list[StackTotal], comment: str, time_ns: int) -> Profile:
    kinds = ValueType("stalls", "count"), ValueType("delay", "nanoseconds")
    samples = name_totals(totals)
    return Profile(kinds, samples, kinds[0], period=1, time_ns=time_ns, comments=(comment,))
