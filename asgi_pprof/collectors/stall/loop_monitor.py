"""
Monitors one event loop from another thread. An idle loop is never woken.

At each scan the watch thread reads the stack of the loop's thread, which shows
whether the loop is in an iteration and since when (`runtime.iterations`). Only
then do we schedule a probe, by `call_soon_threadsafe`. The delay lasts from the
start of the iteration we saw to the start of the one that runs the probe. While
the probe is pending, each scan looks at what the loop does, and the delay is
divided among what was seen (`divide`).

We also probe where the loop may or may not wait for events: its frames are hidden
(in a greenlet, by somebody's wrapper), its iterations cannot be read, or the watch
thread itself was delayed. And we probe every ten seconds or so, because the loop
may run on another thread by now. Then only the time from scheduling the probe to
its run is certain, and no more is counted.

A scan first observes every loop, then advances every monitor by `TRANSITIONS`:
advancing may release the GIL, after which the stacks would be of another moment.
All of this runs on the watch thread, except `_run_probe`, which runs on the loop.
"""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextvars import Context
from dataclasses import dataclass, field
from enum import Enum
from itertools import zip_longest
from time import monotonic_ns as _clock_ns  # asyncio's and libuv's own
from typing import NamedTuple

from asgi_pprof.collectors.stall.causes import (
    NOT_RUNNING,
    PUNCTUAL_NS,
    WAITING_FOR_GIL,
    ThreadAccount,
    Wakeup,
)
from asgi_pprof.collectors.stall.lag import LagFigures, Lateness
from asgi_pprof.profile import Label, Location
from asgi_pprof.runtime.frames import RawStack, ThreadStack, ThreadStacks, current_frames
from asgi_pprof.runtime.gc_pauses import GcPauses, is_timing
from asgi_pprof.runtime.iterations import ITERATION_VARIABLES, iteration_clock
from asgi_pprof.runtime.own_work import OWN_WORK, is_own, own_work
from asgi_pprof.runtime.proc import LoopThread
from asgi_pprof.runtime.task_labels import fold_default_name, task_labels


class State(Enum):
    """What the watch thread knows of a loop between two scans."""

    UNKNOWN = "new, or not running at the last scan"
    IDLE = "waiting for events at the last scan"
    PROBED = "a probe is scheduled; it may have run since the last scan"


class Event(Enum):
    """What a scan finds."""

    STOPPED = "the loop does not run"
    PENDING = "the probe has not run"
    WAITING = "no probe is pending, and the loop is certain to wait for events"
    ITERATING = "no probe is pending, and the loop is in an iteration since a known moment"
    UNCERTAIN = "no probe is pending, and it is not certain what the loop does"


TRANSITIONS = {
    State.UNKNOWN: {
        Event.STOPPED: State.UNKNOWN,
        Event.WAITING: State.PROBED,  # to learn which thread runs it, and under which frames
        Event.ITERATING: State.PROBED,
        Event.UNCERTAIN: State.PROBED,
    },
    State.IDLE: {
        Event.STOPPED: State.UNKNOWN,
        Event.WAITING: State.IDLE,
        Event.ITERATING: State.PROBED,
        Event.UNCERTAIN: State.PROBED,
    },
    State.PROBED: {
        Event.STOPPED: State.UNKNOWN,  # the loop need not iterate now: this delay is no stall
        Event.PENDING: State.PROBED,
        # After these the probe has run, which ends the delay.
        Event.WAITING: State.IDLE,
        Event.ITERATING: State.PROBED,
        Event.UNCERTAIN: State.PROBED,
    },
}

_QUIET_CPU_NS = 1_000_000  # between two scans; an idle uvicorn uses 0.5 ms in 225
_SHORTEST_INTERVAL_NS = 5_000_000
_PROBE_ANYWAY_NS = 10_000_000_000
_COARSE_NS = 5_000_000  # libuv's clock may be the system's coarse one, of 250 Hz
_LOOKS = 32  # at 75 ms from scan to scan, the first 2.4 s are looked at in every scan


@dataclass(slots=True)
class Threshold:
    """From which delay on a stall is counted, and how often to scan; shared by all monitors."""

    ns: int

    def is_stall(self, delay_ns: int) -> bool:
        """Tell whether a delay is a stall; none is at a threshold of 0, which is off."""
        return 0 < self.ns <= delay_ns

    @property
    def interval_ns(self) -> int:
        """The time from scan to scan, short enough that every stall is seen."""
        return max(min(self.ns, 100_000_000) * 3 // 4, _SHORTEST_INTERVAL_NS)

    @property
    def quiet_interval_ns(self) -> int:
        """The same while all loops are quiet; a stall between two scans is missed then."""
        return max(min(self.ns, 100_000_000) * 9 // 4, _SHORTEST_INTERVAL_NS)


class Observation(NamedTuple):
    """
    What a loop's thread was executing: its stack, and the labels of the current task.

    Args:
        iteration_ns: When the loop's iteration began; 0 if that is not known.
        due_ns: When the scan was due that saw it.
        seen_ns: When that scan came; 0 if nothing was seen.
    """

    stack: RawStack = ()
    labels: tuple[Label, ...] = ()
    iteration_ns: int = 0
    due_ns: int = 0
    seen_ns: int = 0

    @property
    def is_own(self) -> bool:
        """Whether the profiler itself was seen."""
        return OWN_WORK in self.labels

    def as_own(self) -> Observation:
        """Return the same, caused by the profiler."""
        labels = dict(self.labels) | dict([OWN_WORK])
        return self._replace(labels=tuple(sorted(labels.items())))


Part = tuple[Observation, int]
"""What was seen in a delay, and its part of the nanoseconds."""


class Stall(NamedTuple):
    """A delay that is counted, divided among what was seen; () if it was over before a scan."""

    delay_ns: int
    parts: tuple[Part, ...]
    cause: Location | None

    @property
    def others_ns(self) -> int:
        """The nanoseconds that the profiler itself has not caused."""
        return self.delay_ns - sum(part_ns for seen, part_ns in self.parts if seen.is_own)


def divide(looks: Sequence[Observation], began_ns: int, ended_ns: int) -> Iterator[Part]:
    """
    Divide a delay among what was seen in it, the earliest first; the parts add up to the delay.

    Of the time between two looks each gets half. If the later scan was delayed, most often
    by a call that kept the GIL, the time of that delay is the later look's: the call is
    what it saw.
    """
    start_ns = began_ns
    for look, following in zip_longest(looks, looks[1:]):
        end_ns = (look.seen_ns + following.due_ns) // 2 if following else ended_ns
        end_ns = min(max(end_ns, start_ns), ended_ns)
        yield look, end_ns - start_ns
        start_ns = end_ns


@dataclass(slots=True)
class Probe:
    """A callback scheduled on the loop, and what it records when it runs."""

    scheduled_ns: int
    observed: Observation  # the iteration it was scheduled in
    looks: list[Observation] = field(default_factory=list)  # all at that iteration
    last_seen_ns: int = 0  # the observed iteration, if it was over when the probe was scheduled
    is_observed_late: bool = False  # after the delay had passed the threshold
    native_id: int = 0
    ident: int = 0
    iteration_ns: int = 0
    is_clock_reliable: bool = True
    ran_ns: int = 0

    def observe(self, observed: Observation) -> None:
        """Follow another iteration from now on, or none if this has seen nothing."""
        self.observed, self.last_seen_ns, self.is_observed_late = observed, 0, False
        self.looks = [observed] if observed.seen_ns else []

    def needs_look(self, now_ns: int) -> bool:
        """
        Tell whether to look again: when the delay has grown by a 32nd since the last look.

        So the number of looks grows only with the logarithm of a long delay: 330 in six
        hours, and none stands for more than 3 % of the time before it.
        """
        return (
            not self.looks or (now_ns - self.looks[-1].seen_ns) * _LOOKS >= now_ns - self.since_ns
        )

    @property
    def since_ns(self) -> int:
        """When the delay began, as far as is known."""
        return self.observed.iteration_ns or self.scheduled_ns

    def is_later(self, iteration_ns: int, now_ns: int) -> bool:
        """
        Tell whether an iteration came after the observed one, by a clock that can be believed.

        A different iteration that is seen after the probe was scheduled has begun
        since. If its start says otherwise, a test has put its own clock into the loop.
        """
        since_ns = self.scheduled_ns - _COARSE_NS
        return 0 < self.observed.iteration_ns < iteration_ns and since_ns <= iteration_ns <= now_ns

    def ended_ns(self, next_ns: int) -> int:
        """Return until when the observed iteration lasted for certain, given the next one."""
        return min(next_ns, self.last_seen_ns or next_ns)

    def span(self) -> tuple[int, int]:
        """
        Return when the delay began and ended, once the probe has run.

        What comes before the probe was scheduled counts only if the loop's own clock
        can be believed; the time from then to its run is certain.
        """
        if self.is_clock_reliable and self.is_later(self.iteration_ns, self.ran_ns):
            # Callbacks that ran before the probe in its own iteration are no part of it.
            return self.since_ns, self.ended_ns(self.iteration_ns)
        if self.is_clock_reliable and self.observed.iteration_ns == self.iteration_ns:
            return max(self.scheduled_ns, self.iteration_ns), self.ran_ns
        return self.scheduled_ns, self.ran_ns


class LoopMonitor:
    """
    Monitors one loop. Make it on the loop's thread, while the loop runs.

    Args:
        loop: The loop; not kept alive.
        threshold: From which delay on a stall is counted.
        on_stall: Called with each stall, on the watch thread.
        wake: Called on the loop's thread at the end of a stall; wakes the watch thread.
        open_thread: Opens what the system tells of a thread.
        gc_pauses: The timer of garbage collections.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        threshold: Threshold,
        on_stall: Callable[[Stall], None],
        wake: Callable[[], None],
        open_thread: Callable[[int], LoopThread],
        gc_pauses: GcPauses,
    ) -> None:
        self.users = 0
        self.is_quiet = False  # it was idle, and has used next to no CPU, since the scan before
        self.ident = threading.get_ident()  # of the thread that runs the loop, as far as is known
        self._loop = weakref.ref(loop)
        self._threshold = threshold
        self._on_stall = on_stall
        self._wake = wake
        self._context = Context()  # a probe must not carry the labels of the request that attaches
        self._clock = iteration_clock(loop)
        self._account = ThreadAccount(threading.get_native_id(), open_thread, gc_pauses)
        self._lateness = Lateness()
        self._stalls = self._stall_ns = 0
        self.count_from_now()
        self._forget()

    def count_from_now(self) -> None:
        """Leave out of the next stall what came before this moment."""
        self._counted_ns = _clock_ns()  # until when stalls have been counted

    def _forget(self) -> None:
        self._state = State.UNKNOWN
        self._probe: Probe | None = None  # while PROBED
        self._answered_ns = 0  # when the last probe ran; 0 if the thread it ran on is gone
        # What the last scan saw, if no probe was pending; or an iteration after the probed one.
        self._found: Observation | None = None
        self._is_waiting = False
        self._account.forget()

    def loop(self) -> asyncio.AbstractEventLoop | None:
        """Return the loop, unless it is closed or gone."""
        loop = self._loop()
        return None if loop is None or loop.is_closed() else loop

    def close(self) -> None:
        """Close what is open, and begin anew if it is scanned again."""
        self._account.close()
        self._forget()

    @property
    def deadline_ns(self) -> int | None:
        """When to scan besides the interval: as a pending delay passes the threshold."""
        probe = self._probe
        if probe is None or probe.ran_ns or probe.is_observed_late:
            return None
        return probe.since_ns + self._threshold.ns

    def has_uncounted_stall(self) -> bool:
        """Tell whether a stall has ended and the watch thread has not counted it; any thread."""
        probe, found = self._probe, self._found
        if probe is None:  # the watch thread may release the GIL before it schedules the probe
            return found is not None and self._threshold.is_stall(_clock_ns() - found.iteration_ns)
        if probe.ran_ns:
            return self._is_stall(probe, probe.ran_ns)
        # On the loop's own thread the probe is about to run; other loops may hang for ever.
        return self.ident == threading.get_ident() and self._is_stall(probe, _clock_ns())

    def _is_stall(self, probe: Probe, now_ns: int) -> bool:
        return self._threshold.is_stall(now_ns - probe.since_ns)

    def observe(self, wakeup: Wakeup, stacks: ThreadStacks) -> None:
        """
        Look at what the loop does; call `advance` next.

        Args:
            wakeup: How the watch thread woke.
            stacks: The threads' stacks. If a call in C has kept the GIL until now, the
                loop's thread is still at that call, and goes on as soon as it can.
        """
        self._found, self._is_waiting = None, False
        loop, stack, probe = self.loop(), stacks.get(self.ident), self._probe
        if stack is None:
            self._answered_ns = 0  # its thread has ended
        elif loop is not None and loop.is_running():
            start_ns = self._clock.start_ns(loop, stack)
            if probe is None or probe.ran_ns:
                if start_ns:
                    self._found = _observe(loop, stack, start_ns, wakeup)
                else:
                    self._is_waiting = self._clock.is_reliable and self._clock.is_waiting(stack)
            elif probe.is_later(start_ns, wakeup.now_ns):
                self._found = _observe(loop, stack, start_ns, wakeup)
            elif probe.observed.iteration_ns in (0, start_ns) and probe.needs_look(wakeup.now_ns):
                probe.looks.append(_observe(loop, stack, start_ns, wakeup))

    def is_still_quiet(self, stacks: ThreadStacks) -> bool:
        """Tell whether a loop that was quiet at the last scan waits for events."""
        stack = stacks.get(self.ident) if self.is_quiet else None
        return stack is not None and self._clock.is_waiting(stack)

    def stay_idle(self) -> None:
        """Do what a scan does for a loop that stays IDLE; may release the GIL."""
        cpu_ns = self._account.restart()
        self.is_quiet = cpu_ns is not None and cpu_ns < _QUIET_CPU_NS

    def advance(self, wakeup: Wakeup) -> bool:
        """
        Count delays that have ended, and schedule a probe unless the loop is idle.

        Returns:
            False if the loop is closed or gone.
        """
        loop = self.loop()
        event = self._event(loop, wakeup)
        before, self._state = self._state, TRANSITIONS[self._state][event]
        self.is_quiet = False
        if before is self._state is State.IDLE:
            self.stay_idle()
            return True
        if loop is None or event is Event.STOPPED:
            self._forget()
            return loop is not None
        self._account.add(wakeup)
        if self._probe is None:
            self._count_unseen(wakeup)
        elif event is Event.PENDING:
            self._check_pending(self._probe, wakeup.now_ns)
            return True
        else:
            self._finish(self._probe, wakeup)
        if event is not Event.ITERATING:
            self._account.restart()
        if self._state is State.PROBED:
            self._schedule_probe(loop, wakeup)
        return True

    def _event(self, loop: asyncio.AbstractEventLoop | None, wakeup: Wakeup) -> Event:
        if loop is None or not loop.is_running():
            return Event.STOPPED
        if self._probe is not None and not self._probe.ran_ns:
            return Event.PENDING
        if self._found is not None:
            return Event.ITERATING
        answered_recently = wakeup.now_ns - self._answered_ns < _PROBE_ANYWAY_NS
        is_certain = self._is_waiting and answered_recently and wakeup.is_punctual
        return Event.WAITING if is_certain else Event.UNCERTAIN

    def _schedule_probe(self, loop: asyncio.AbstractEventLoop, wakeup: Wakeup) -> None:
        found, now_ns = self._found, _clock_ns()
        probe = Probe(now_ns, Observation())
        probe.observe(found or Observation())
        if found and now_ns - wakeup.now_ns > PUNCTUAL_NS and self._is_over(loop, found):
            # We have waited for the GIL since the scan, and the loop has gone on.
            probe.last_seen_ns = wakeup.now_ns
        probe.is_observed_late = self._is_stall(probe, wakeup.now_ns)
        self._found = None
        try:
            loop.call_soon_threadsafe(self._run_probe, probe, context=self._context)
        except RuntimeError:  # it has been closed meanwhile
            self._state = State.UNKNOWN
        else:
            self._probe = probe

    def _is_over(self, loop: asyncio.AbstractEventLoop, found: Observation) -> bool:
        stack = current_frames((self.ident,), locals_of=ITERATION_VARIABLES).get(self.ident)
        return stack is None or self._clock.start_ns(loop, stack) != found.iteration_ns

    def _check_pending(self, probe: Probe, now_ns: int) -> None:
        if self._found is not None:
            # The probed iteration is over; from now on the probe measures the one we found.
            ended_ns = probe.ended_ns(self._found.iteration_ns)
            self._end_delay(probe, probe.since_ns, ended_ns)
            self._account.restart()
            probe.observe(self._found)
        # Only one scan comes for the threshold's sake, whether it could observe the loop or not.
        probe.is_observed_late |= self._is_stall(probe, now_ns)

    @own_work
    def _run_probe(self, probe: Probe) -> None:
        """Record that the loop has come this far; runs on the loop."""
        loop = self._loop()
        if loop is None:
            return
        probe.native_id, probe.ident = threading.get_native_id(), threading.get_ident()
        stack = current_frames((probe.ident,), locals_of=ITERATION_VARIABLES).get(probe.ident)
        probe.is_clock_reliable = stack is not None and self._clock.calibrate(stack)
        probe.iteration_ns = self._clock.start_ns(loop, stack) if stack is not None else 0
        probe.ran_ns = _clock_ns()
        if self._is_stall(probe, probe.ran_ns):
            self._wake()

    def _finish(self, probe: Probe, wakeup: Wakeup) -> None:
        self._probe, self._answered_ns = None, probe.ran_ns
        if probe.native_id == self._account.native_id:
            delay_ns = self._end_delay(probe, *probe.span())
            self._lateness.add(probe.ran_ns, max(delay_ns, probe.ran_ns - probe.scheduled_ns))
        else:  # the observed stack is not that of the thread that runs the loop
            self._account.follow(probe.native_id)
            self.ident = probe.ident
        self._account.restart()
        self._account.add(wakeup)

    def _count_unseen(self, wakeup: Wakeup) -> None:
        """
        Count a delay of the watch thread as the loop's too, if its cause stopped both.

        It was over when the loop went on, maybe before the watch thread did.
        """
        found = self._found
        ended_ns = min(found.iteration_ns, wakeup.now_ns) if found else wakeup.now_ns
        delay_ns = self._end_delay(None, wakeup.due_ns, ended_ns)
        if delay_ns:
            self._lateness.add(ended_ns, delay_ns)

    def _end_delay(self, probe: Probe | None, began_ns: int, ended_ns: int) -> int:
        """Count a delay if it is a stall, and return the nanoseconds that were counted."""
        began_ns = max(began_ns, self._counted_ns)
        delay_ns = ended_ns - began_ns
        if not self._threshold.is_stall(delay_ns):
            return 0
        cause = self._account.cause(ended_ns, delay_ns)
        if probe is None and cause not in (NOT_RUNNING, WAITING_FOR_GIL):
            # That another thread kept the GIL from us says nothing of a loop that did not need it.
            return 0
        self._counted_ns = ended_ns
        looks = probe.looks if probe else ()
        if self._account.is_forced(ended_ns, delay_ns):
            looks = [look.as_own() for look in looks] or [Observation().as_own()]
        stall = Stall(delay_ns, tuple(divide(looks, began_ns, ended_ns)), cause)
        self._on_stall(stall)
        if self._threshold.is_stall(stall.others_ns):
            self._stalls += 1
            self._stall_ns += stall.others_ns
        return delay_ns

    def lag(self) -> LagFigures:
        """Return how late the loop's callbacks were in the last minute; any thread."""
        now_ns, probe = _clock_ns(), self._probe
        pending_ns = now_ns - probe.scheduled_ns if probe is not None and not probe.ran_ns else 0
        late = self._lateness.quantiles(now_ns, pending_ns, self._threshold.interval_ns)
        return LagFigures(*late, self._stalls, self._stall_ns)


def _observe(
    loop: asyncio.AbstractEventLoop, stack: ThreadStack, iteration_ns: int, wakeup: Wakeup
) -> Observation:
    places = stack.places()
    if is_timing(places[0][0]):
        places = places[1:]  # where a call in C collects, the timer's own code gets the GIL first
    observed = Observation(places, _labels(loop), iteration_ns, wakeup.due_ns, wakeup.now_ns)
    return observed.as_own() if is_own(code for code, _ in places) else observed


def _labels(loop: asyncio.AbstractEventLoop) -> tuple[Label, ...]:
    try:
        task = asyncio.current_task(loop)
        if task is None:
            return ()
        labels = task_labels(task)
        fold_default_name(labels)
        return tuple(sorted(labels.items()))
    except Exception:
        return ()  # an application's own labels or task could do anything; the stack is kept
