"""Reads the state of the process that a profiler changes."""

from __future__ import annotations

import gc
import os
import signal
import threading
import tracemalloc
from pathlib import Path

from asgi_pprof.native.core import native
from asgi_pprof.offload import workers


def wakeup_descriptor() -> int:
    """Return signal.set_wakeup_fd's descriptor; main thread only."""
    descriptor = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(descriptor, warn_on_full_buffer=False)
    return descriptor


def clock_timers() -> int:
    """Return how many POSIX timers the process has."""
    try:
        lines = Path("/proc/self/timers").read_text().splitlines()
    except OSError:
        return 0
    return sum(line.startswith("ID:") for line in lines)


def process_state() -> dict[str, object]:
    """Return signals, timers, hooks and threads, as JSON has them; main thread only."""
    timer = signal.getitimer(signal.ITIMER_PROF)
    return {
        "handler": str(signal.getsignal(signal.SIGPROF)),
        "timer": timer,
        "sampling": timer != (0.0, 0.0) or clock_timers() > 0,
        "wakeup": wakeup_descriptor(),
        "tracing": tracemalloc.is_tracing(),
        "heap rate": native.heap_stats()["rate"] if native else 0,
        "threads": sorted(thread.name for thread in threading.enumerate()),
        "native threads": _own_threads(),
        "callbacks": len(gc.callbacks),
    }


def _own_threads() -> int:
    """Return how many threads have the name of ours, but for the worker that middlewares keep."""
    kept = min(workers._threads, 1) if workers._users else 0
    return -kept + sum(_thread_name(task) == "asgi_pprof" for task in os.listdir("/proc/self/task"))


def _thread_name(task: str) -> str:
    try:
        return Path(f"/proc/self/task/{task}/comm").read_text().strip()
    except OSError:
        return ""  # it has just ended
