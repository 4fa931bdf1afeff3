"""
CPU time of every thread of the process, by its own clock.

Linux gives each thread a clock that any thread of the process may read; where
there is none (macOS), all other threads are one number, what the process used
beyond the calling thread.

Source: clock_getcpuclockid(3); Linux, include/linux/posix-timers_types.h,
MAKE_THREAD_CPUCLOCK. `time.pthread_getcpuclockid` is not used: it crashes on a
thread that has ended, where the kernel answers EINVAL.
"""

from __future__ import annotations

import threading
import time

from asgi_pprof.runtime.proc import native_thread_ids

_PERTHREAD_SCHED = 6  # CPUCLOCK_PERTHREAD_MASK | CPUCLOCK_SCHED


class ThreadClocks:
    """
    What each thread has used since this object was made.

    Made and read on one thread, the one whose time is not among `others`.
    """

    def __init__(self) -> None:
        self._own_id = threading.get_native_id()
        self._start = _thread_times()
        self._last = dict(self._start)
        self._names: dict[int, str] = {}
        self._process_start = time.process_time_ns()
        self._own_start = time.thread_time_ns()
        self.process_ns = 0
        self._own_ns = 0

    def read(self) -> None:
        """Look at the clocks; a thread is known by the times it was looked at."""
        self._last.update(_thread_times())
        self._names.update(
            (thread.native_id, thread.name)
            for thread in threading.enumerate()
            if thread.native_id is not None
        )
        self.process_ns = time.process_time_ns() - self._process_start
        self._own_ns = time.thread_time_ns() - self._own_start

    def threads(self) -> list[tuple[str, int, int]]:
        """Return (name, native id, nanoseconds) for each other thread as last read."""
        return [
            # Below 0 where the system has given an id to a new thread.
            (self._name(thread_id), thread_id, max(0, cpu_ns - self._start.get(thread_id, 0)))
            for thread_id, cpu_ns in sorted(self._last.items())
            if thread_id != self._own_id
        ]

    def others(self) -> list[tuple[str, int, int]]:
        """
        Return the same as `threads`, and what the process used beyond it.

        That (threads that started and ended between two looks) comes last,
        with id 0.
        """
        used = self.threads()
        rest_ns = self.process_ns - self._own_ns - sum(cpu_ns for _, _, cpu_ns in used)
        # The clocks are not read at one instant: what is below a tick is no thread.
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
            continue  # it has just ended
    return times
