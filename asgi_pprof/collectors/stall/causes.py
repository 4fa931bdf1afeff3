"""
Why an event loop's thread stood still: its own code, a garbage collection, the GIL, or no CPU.

Linux counts for each thread its time on a CPU, its time waiting for one, and how
often it was run. A thread that waits for the GIL runs once in each switch interval
to ask for it. Where the system tells nothing (not Linux, or no /proc), only garbage
collections are told apart, and only while they are timed (`runtime.gc_pauses`).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from time import monotonic_ns as _clock_ns  # asyncio's and libuv's own
from typing import NamedTuple

from asgi_pprof.profile import Location, pseudo_location
from asgi_pprof.runtime.gc_pauses import GcPauses
from asgi_pprof.runtime.proc import LoopThread, Usage

NOT_RUNNING = pseudo_location("process not running")
COLLECTING = pseudo_location("garbage collection")
WAITING_FOR_GIL = pseudo_location("waiting for the GIL")

PUNCTUAL_NS = 5_000_000
_MOST_RUNS_WHILE_STOPPED = 8  # SIGSTOP, SIGCONT and what was due; a working thread runs more often


class Wakeup(NamedTuple):
    """
    How the watch thread woke for a scan.

    Args:
        now_ns: When it woke.
        due_ns: When it was due; equal to `now_ns` if it was late by a negligible time.
        for_gil_ns: How much of the delay it waited for the GIL.
    """

    now_ns: int
    due_ns: int
    for_gil_ns: int

    @property
    def is_punctual(self) -> bool:
        """Whether nothing delayed it."""
        return self.now_ns == self.due_ns

    @property
    def starved_ns(self) -> int:
        """How long it was delayed by anything but the GIL: it was not run."""
        return max(self.now_ns - self.due_ns - self.for_gil_ns, 0)


class ThreadAccount:
    """
    What a loop's thread has used, and how the watch thread was delayed, since `restart`.

    It opens a descriptor at the first reading. Reading lets the GIL go.

    Args:
        native_id: The system's id of the thread.
        open_thread: Opens what the system tells of a thread.
        gc_pauses: The timer of garbage collections.
    """

    def __init__(
        self, native_id: int, open_thread: Callable[[int], LoopThread], gc_pauses: GcPauses
    ) -> None:
        self._gc_pauses = gc_pauses
        self.native_id = native_id
        self._open_thread = open_thread
        self._thread: LoopThread | None = None
        self.forget()

    def forget(self) -> None:
        """Forget what was used so far."""
        self._usage_at_start = b""
        self._for_gil_ns = self._starved_ns = 0

    def close(self) -> None:
        """Close the descriptor, and forget; the next reading opens it again."""
        if self._thread is not None:
            self._thread.close()
        self._thread = None
        self.forget()

    def follow(self, native_id: int) -> None:
        """Go on with another thread."""
        self.close()
        self.native_id = native_id

    def restart(self) -> int | None:
        """
        Begin anew at a moment at which the loop was running.

        Returns:
            The nanoseconds of CPU the thread has used since the last time, None if unknown.
        """
        before, self._usage_at_start = self._usage_at_start, self._usage()
        self._for_gil_ns = self._starved_ns = 0
        return Usage.cpu_between(before, self._usage_at_start)

    def add(self, wakeup: Wakeup) -> None:
        """Add a delay of the watch thread."""
        self._for_gil_ns += wakeup.for_gil_ns
        self._starved_ns += wakeup.starved_ns

    def cause(self, ended_ns: int, delay_ns: int) -> Location | None:
        """Return what stopped the loop for most of a delay; None if its own code, or unknown."""
        half_ns = delay_ns // 2
        if self._collecting_ns(ended_ns - delay_ns, ended_ns) >= half_ns:
            return COLLECTING
        used = Usage.since(self._usage_at_start, self._usage())
        if used is None:
            return None
        if self._starved_ns >= half_ns and used.runs <= _MOST_RUNS_WHILE_STOPPED:
            return NOT_RUNNING
        # A thread at work also runs once in each switch interval if others take
        # the CPU from it, as does one that reads a little at a time; but then the
        # watch thread does not wait long for the GIL.
        asking_ns = used.runs * int(sys.getswitchinterval() * 1e9)
        asks = asking_ns >= half_ns and used.cpu_ns + used.waited_ns < half_ns
        return WAITING_FOR_GIL if asks and self._for_gil_ns >= delay_ns // 4 else None

    def is_forced(self, ended_ns: int, delay_ns: int) -> bool:
        """Return whether a request of ours collected garbage for most of a delay, on any thread."""
        began_ns = ended_ns - delay_ns
        forced_ns = sum(
            max(min(to_ns, ended_ns) - max(from_ns, began_ns), 0)
            for from_ns, to_ns in self._gc_pauses.forced_spans()
        )
        return forced_ns * 2 >= delay_ns

    def _usage(self) -> bytes:
        if self._thread is None:
            self._thread = self._open_thread(self.native_id)
        return self._thread.usage()

    def _collecting_ns(self, began_ns: int, ended_ns: int) -> int:
        """Return for how long garbage was collected between two moments, on any thread."""
        to_clock_ns = _clock_ns() - time.time_ns()
        return sum(
            pause_ns
            for pause_ns, end_ns in self._gc_pauses.pauses()
            if began_ns < end_ns + to_clock_ns <= ended_ns
        )
