"""
The CPU time of every thread of the process, from its own clock.

On Linux each thread has a clock that any thread of the process may read. Elsewhere
(macOS) all other threads have one number together: what the process used beyond
the calling thread.

Source: clock_getcpuclockid(3); Linux, include/linux/posix-timers_types.h,
MAKE_THREAD_CPUCLOCK. `time.pthread_getcpuclockid` is not used: it crashes on a
thread that has ended, where the kernel answers EINVAL.
"""

from __future__ import annotations

import threading
import time

from asgi_pprof.runtime.proc import native_thread_ids
from asgi_pprof.runtime.threads import known_threads

_PERTHREAD_SCHED = 6  # CPUCLOCK_PERTHREAD_MASK | CPUCLOCK_SCHED


class ThreadClocks:
    """
    The CPU time that each thread has used since this object was made.

    It must be made and read in one thread, whose time is not among `others`.

    Attributes:
        own_id: The native id of that thread.
        own_ns: What it has used until the last reading.
        process_ns: What the process has used until then.
        alive: The native ids of the threads that were alive then.
    """

    def __init__(self) -> None:
        self.own_id = threading.get_native_id()
        self._start = _thread_times()
        self._last = dict(self._start)
        self._names: dict[int, str] = {}
        self._process_start = time.process_time_ns()
        self._own_start = time.thread_time_ns()
        self.process_ns = 0
        self.own_ns = 0
        self.alive: set[int] = set()

    def read(self) -> None:
        """Read the clocks. A thread that lives between two readings only has no entry."""
        times = _thread_times()
        self._last.update(times)
        self.alive = set(times)
        self._names.update(
            (thread.native_id, thread.name)
            for thread in known_threads().values()
            if thread.native_id is not None
        )
        self.process_ns = time.process_time_ns() - self._process_start
        self.own_ns = time.thread_time_ns() - self._own_start

    def threads(self) -> list[tuple[str, int, int]]:
        """Return (name, native id, nanoseconds) of each other thread, as of its last reading."""
        return [
            # The difference is negative if the system has reused the id for a new thread.
            (self._name(thread_id), thread_id, max(0, cpu_ns - self._start.get(thread_id, 0)))
            for thread_id, cpu_ns in sorted(self._last.items())
            if thread_id != self.own_id
        ]

    def others(self) -> list[tuple[str, int, int]]:
        """
        Return `threads`, and what the process used beyond them.

        That is the time of threads that started and ended between two readings. It
        comes last, with id 0.
        """
        used = self.threads()
        rest_ns = self.process_ns - self.own_ns - sum(cpu_ns for _, _, cpu_ns in used)
        # The clocks are not read at one instant: less than a tick is no thread.
        if rest_ns > 10_000_000:
            used.append(("other threads", 0, rest_ns))
        return used

    def _name(self, thread_id: int) -> str:
        return f"thread {self._names.get(thread_id, 'outside Python')}"


def _thread_times() -> dict[int, int]:
    times = {}
    for thread_id in native_thread_ids():
        try:
            times[thread_id] = time.clock_gettime_ns(~thread_id << 3 | _PERTHREAD_SCHED)
        except OSError:
            continue  # the thread has just ended
    return times
