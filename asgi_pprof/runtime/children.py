"""
Child processes of this process, and the jobs of its process pools.

What is measured: children that are alive, with all their threads, but not their own
children; and `concurrent.futures.ProcessPoolExecutor`s, whose workers are such children.

How: /proc lists each thread's children. An executor has a thread that hands out its
jobs, and that thread's object has them.

What it costs: some 20 us a thread and 30 us a child, on request only.

What it misses: which child runs which job, which no process knows but the child.

Source: Linux, proc(5), children and stat; CPython, Lib/concurrent/futures/process.py.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from asgi_pprof.offload import yield_gil
from asgi_pprof.runtime.libraries import resource
from asgi_pprof.runtime.proc import native_thread_ids, stat_fields


class Children(NamedTuple):
    """
    The children of this process.

    Args:
        number: How many are alive.
        resident_bytes: The sum of their resident memory; what they share counts for each.
        cpu_s: The CPU time of all of them, and of those that have ended and been waited for.
    """

    number: int
    resident_bytes: int
    cpu_s: float


class ProcessPool(NamedTuple):
    """
    A process pool.

    Args:
        size: How many processes it has.
        busy: How many of them have a job, at most.
        queued: The number of jobs that no process has begun.
    """

    size: int
    busy: int
    queued: int


def read_children() -> Children | None:
    """Return what is known of the children; None where there is no /proc."""
    numbers = _child_numbers()
    if numbers is None:
        return None
    ticks, page = os.sysconf("SC_CLK_TCK"), os.sysconf("SC_PAGESIZE")
    alive, pages, cpu_ticks = 0, 0, 0
    for number in numbers:
        yield_gil()
        with suppress(OSError, IndexError, ValueError):  # it has ended
            fields = stat_fields(f"/proc/{number}/stat")
            cpu_ticks += sum(map(int, fields[11:15]))  # with its own children that have ended
            pages += int(fields[21])
            alive += fields[0] != "Z"
    ended = resource.getrusage(resource.RUSAGE_CHILDREN) if resource else None
    ended_s = ended.ru_utime + ended.ru_stime if ended else 0.0
    return Children(alive, pages * page, cpu_ticks / ticks + ended_s)


def _child_numbers() -> list[int] | None:
    numbers: list[int] = []
    is_known = False
    for thread in native_thread_ids():
        yield_gil()
        with suppress(OSError):
            text = Path(f"/proc/self/task/{thread}/children").read_text()
            numbers += map(int, text.split())
            is_known = True
    return numbers if is_known else None


def process_pools() -> Iterator[ProcessPool]:
    """Yield the process pools that have begun work, the oldest first."""
    module = sys.modules.get("concurrent.futures.process")
    managers: Any = getattr(module, "_threads_wakeups", None)
    for manager in list(managers or ()):
        with suppress(AttributeError, TypeError, RuntimeError):
            yield _process_pool(manager)


def _process_pool(manager: Any) -> ProcessPool:
    # The states, and not `running()`, which takes a lock that may be held for long.
    states = [item.future._state for item in list(manager.pending_work_items.values())]
    size = len(manager.processes)
    # A future is running from when its job is in the queue between the processes, which
    # holds one more than there are processes.
    begun = states.count("RUNNING")
    busy = min(begun, size)
    return ProcessPool(size, busy, states.count("PENDING") + begun - busy)
