"""
stall: what held an event loop for longer than a threshold.

What is measured: every delay of 100 ms or more (settable) in which a watched loop
began no new iteration, cumulative for the life of the process: one stall and its
nanoseconds, with the stack and the labels of the task that held the loop. A stall in
which several were seen is divided among them, and counts at the one with the largest
part; the others have the count 0. Leaves in angle brackets name a cause other than
the loop's own code for most of the stall, where it is known: `<garbage collection>`,
`<waiting for the GIL>`, and `<process not running>` for a process that was stopped or
got no CPU.

A stall that the profiler itself causes has the label `asgi_pprof`.

How: one thread scans all loops every 75 ms, every 225 ms while they have nothing to
do (`loop_monitor`), and once more when an iteration passes the threshold. Each scan
looks at a stall that is under way, more and more seldom after the first 2.4 s. A call
in C that keeps the GIL is seen when it ends, before the loop's thread goes on. The
start of an iteration is read from asyncio's and uvloop's loops themselves, so
durations are right to some milliseconds.

What it costs: nothing in a request's way. An idle service pays only for the
thread's wakeups. A loop that is seen in an iteration gets one callback, the probe,
13 a second at most. Smaller thresholds cost more in proportion. Each loop takes one
descriptor.

What it misses: what ran in a stall between two looks. A stall is one iteration, however
many callbacks ran in it. A callback's own labels are not known, only a task's. After
operators, which unlike calls do not hand over the GIL, the line can be that of the
next call. After a time in which no loop had anything to do, a stall shorter than 230
ms can fall between two scans: of 100 ms more than half are not seen. (Scanning twice
as often would cost twice as much.) With uvloop an iteration counts from when a callback last
set a timer or asked for the time, and callbacks that are C functions are not seen.
Of loops that are neither asyncio's nor uvloop's, and of uvloop's where it is not
Linux, only what is left of a stall at a scan counts. Where the system does not tell
what threads use (not Linux, or no /proc), no cause is known but garbage collection,
delays without the GIL or the CPU count only in an iteration, and scans are 75 ms
apart at all times. Between two iterations a loop that waits for the GIL looks like
one that waits for events, and is probed only if the watch thread was delayed as
well. Nothing is watched on a free-threaded build, where frames of running threads
cannot be read safely, nor in sub-interpreters.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from contextlib import AbstractContextManager

from asgi_pprof.collectors.stall.watch import StallWatch
from asgi_pprof.profile import Profile, ValueType
from asgi_pprof.stacks import StackTotal, name_totals

OFF = "off: stalls of the event loop are not recorded"


class StallCollector:
    """
    Collects what blocked event loops.

    Args:
        watch: The recorder.
    """

    def __init__(self, watch: StallWatch) -> None:
        self._watch = watch

    def count(self) -> int:
        """Return the number of stalls."""
        return self._watch.count()

    def note(self) -> str:
        """Return why it is off, "" if it is on."""
        return "" if self._watch.is_on() else self._watch.why_off() or OFF

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
