"""
stats: figures of event loops, thread pools, garbage collection and the process, as text.

What is measured: one `name value` a line, as Prometheus reads them (text format
0.0.4, without its comments) and as `awk '$1 == ...'` does: label values hold no
white space. Units are seconds and bytes; what ends in `_total` only grows. A
figure that is not known has no line, never a 0 in its place.

Loops go by the names of their threads, tasks of loops that nobody runs are
`not_running`. Pools are executors by the names of their threads, each loop's
`anyio:` limiter, and as `limiter:` any other while tasks wait for a thread of
its. The second of one name is `name#2`.

How: everything is read when somebody asks, loops in other threads from outside:
one that is stuck shows, and holds up nothing. How late loops were is known of
those that are watched (`collectors.stall`). Pauses of the collector are timed
while a middleware lives; their quantiles are those of the last 256. Since when
work waits for a thread is known of the tasks that await it, by
`goroutine.task_tracking`: 15 s too little at most where tasks are tracked.

What it costs: 0.4 us a task, 0.6 us up to CPython 3.13, in slices of 1 ms with
the loop's other work in between, after one for a copy of the list of all (3 to
5 ms for 100,000); and 0.1 us a frame of all threads, on a thread of ours.

What it misses: the figures are not of one moment. Work that waits for a thread
and that no task awaits directly (`gather` of futures, `submit`), pools that have
no threads, and process pools.

Source: Prometheus, exposition_formats.md; prometheus_client, process_collector.py
and gc_collector.py, whose names these are where it has them.
"""

from __future__ import annotations

import asyncio
import gc
import math
import re
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from asgi_pprof.collectors.stall.stalls import stall_watch
from asgi_pprof.offload import run_in_thread, yield_gil
from asgi_pprof.runtime.gc_pauses import gc_pauses
from asgi_pprof.runtime.loops import running_loops
from asgi_pprof.runtime.pools import Pool, Task, Workers, default_limiter, limiter_pool
from asgi_pprof.runtime.proc import proc_status
from asgi_pprof.runtime.task_records import record_of
from asgi_pprof.runtime.tasks import TaskList, alive, waits_for
from asgi_pprof.slices import Slices

NAMES = (
    "loop_tasks",
    "loop_ready",
    "loop_lag_seconds",
    "loop_stalls_total",
    "loop_stall_seconds_total",
    "thread_pool_threads",
    "thread_pool_busy",
    "thread_pool_queued",
    "thread_pool_longest_wait_seconds",
    "python_gc_collections_total",
    "python_gc_objects_collected_total",
    "python_gc_objects_uncollectable_total",
    "python_gc_pause_seconds",
    "python_gc_pause_seconds_total",
    "process_cpu_seconds_total",
    "process_resident_memory_bytes",
    "process_virtual_memory_bytes",
    "process_threads",
)
"""All names, in the order of their lines."""

NOT_RUNNING = "not_running"
_SLICE_S = 0.001
_BREAKS_LINES = re.compile(r"[\s\x00-\x1f\x7f]")
_QUANTILES = (0.5, 0.9, 0.99, 1.0)
_STATUS = {  # of /proc/self/status
    "VmRSS": "process_resident_memory_bytes",
    "VmSize": "process_virtual_memory_bytes",
    "Threads": "process_threads",
}

_tasks = TaskList()


class Figure(NamedTuple):
    """One line: a name of `NAMES`, label names and values, and a number."""

    name: str
    labels: tuple[tuple[str, str], ...]
    value: float

    def line(self) -> str:
        """Return it in Prometheus's text format."""
        labels = ",".join(f'{name}="{_escaped(value)}"' for name, value in self.labels)
        series = f"{self.name}{{{labels}}}" if labels else self.name
        return f"{series} {_number(self.value)}"


class _Loop(NamedTuple):
    """An event loop, what its thread is called, and how many callbacks are ready in it."""

    loop: asyncio.AbstractEventLoop
    name: str
    ready: int | None


_Queue = tuple[Pool, list[Task]]
"""A pool, and tasks that wait for it, the first ones first."""


class _Waiting(NamedTuple):
    """A pool, and for how many nanoseconds at least a task has waited for it; None if unknown."""

    pool: Pool
    longest_ns: int | None


async def stats_text(clock: Callable[[], float] = time.perf_counter) -> str:
    """
    Return all figures there are now, a line each.

    Args:
        clock: Test seam for `time.perf_counter`, which bounds the slices.
    """
    loops = _loops()  # at once: what is ready changes as soon as this waits
    await stall_watch.settle()
    slices = Slices(_SLICE_S, clock)
    tasks = await _count_tasks(slices)
    pools = await _pools(loops, slices)

    def text() -> str:
        figures = [
            *_task_figures(loops, tasks),
            *(figure for each in loops for figure in _loop_figures(each)),
            *(figure for each in pools for figure in _pool_figures(each)),
            *_gc_figures(),
            *_process_figures(),
        ]
        return stats_lines(figures)

    return await run_in_thread(text)


def stats_lines(figures: Iterable[Figure]) -> str:
    """Return figures as text: by name in the order of `NAMES`, then by their labels."""
    in_order = sorted(figures, key=lambda each: (NAMES.index(each.name), each.labels))
    return "".join(f"{each.line()}\n" for each in in_order)


def _loops() -> list[_Loop]:
    """Return the loops that run, by the age of their threads."""
    running = {each.thread_ident: each.loop for each in running_loops()}
    threads = {thread.ident: thread.name for thread in threading.enumerate()}
    known = [ident for ident in threads if ident in running]
    idents = [*known, *sorted(running.keys() - threads.keys())]  # of threads not made by Python
    names = unique([label(threads.get(ident, str(ident))) for ident in idents])
    loops = [running[ident] for ident in idents]
    return [_Loop(loop, name, _ready(loop)) for loop, name in zip(loops, names, strict=True)]


def label(text: str) -> str:
    """Return a label's value that a line can hold: whatever splits words or lines is `_`."""
    return _BREAKS_LINES.sub("_", text.encode("utf-8", "replace").decode())


def unique(names: Sequence[str]) -> list[str]:
    """Return the names, those that come again with a number."""
    taken: dict[str, None] = {}
    numbers: Counter[str] = Counter()
    for name in names:
        new = name
        while new in taken:
            numbers[name] += 1
            new = f"{name}#{numbers[name] + 1}"
        taken[new] = None
    return list(taken)


def _ready(loop: asyncio.AbstractEventLoop) -> int | None:
    """Return how many callbacks are ready to run, None if that is not to be seen."""
    ready = getattr(loop, "_ready", None)
    if type(ready) is deque:
        return len(ready)
    # uvloop's is not for Python's eyes, only for the garbage collector's: its one deque.
    deques = [each for each in gc.get_referents(loop) if type(each) is deque]
    is_uvloop = any(kind.__module__.startswith("uvloop") for kind in type(loop).__mro__)
    return len(deques[0]) if is_uvloop and len(deques) == 1 else None


async def _count_tasks(slices: Slices) -> Counter[asyncio.AbstractEventLoop]:
    """Return how many tasks that are not done each loop has."""
    counts: Counter[asyncio.AbstractEventLoop] = Counter()
    await slices.yield_to_loop()  # the copy of all tasks is a slice of its own
    for task in alive(_tasks.tasks()):
        counts[task.get_loop()] += 1
        if slices.is_over():
            await slices.yield_to_loop()
    return counts


async def _pools(loops: Sequence[_Loop], slices: Slices) -> list[_Waiting]:
    """Return the pools of threads, and how long tasks have waited for them."""
    workers = await run_in_thread(Workers)  # a thousand threads at work take longer than a slice
    await slices.yield_to_loop()
    found: list[_Queue] = []
    for queue in workers.waiting():
        found.append(queue)
        if slices.is_over():
            await slices.yield_to_loop()
    found += await _limiters(loops, workers, slices)
    names = unique([label(pool.name) for pool, _ in found])
    return [
        _Waiting(pool._replace(name=name), _longest_wait_ns(pool, tasks))
        for name, (pool, tasks) in zip(names, found, strict=True)
    ]


async def _limiters(loops: Sequence[_Loop], workers: Workers, slices: Slices) -> list[_Queue]:
    """Return anyio's default limiters, and others that tasks wait for."""
    known: dict[int, Any] = {}
    defaults: list[_Queue] = []
    for each in loops:
        limiter = default_limiter(each.loop)
        if limiter is not None:
            known[id(limiter)] = limiter
            defaults.append(limiter_pool(f"anyio:{each.name}", limiter))
    others: list[_Queue] = []
    names = {id(each.loop): each.name for each in loops}
    for limited in workers.limited():
        if limited is not None and id(limited[1]) not in known:
            loop, limiter = limited
            known[id(limiter)] = limiter
            others.append(limiter_pool(f"limiter:{names.get(id(loop), NOT_RUNNING)}", limiter))
        if slices.is_over():
            await slices.yield_to_loop()
    # FastAPI makes a limiter for each dependency it leaves: for those nobody waits.
    waited_for = [each for each in others if each[0].queued]
    return defaults + sorted(waited_for, key=lambda each: each[0])


def _longest_wait_ns(pool: Pool, tasks: Iterable[Task]) -> int | None:
    if not pool.queued:
        return 0
    now_ns = time.monotonic_ns()
    waits_ns = [record_of(task).update(waits_for(task), now_ns) for task in tasks]
    return max(waits_ns, default=0) or None  # 0: nobody has looked at them before


def _task_figures(
    loops: Iterable[_Loop], tasks: Counter[asyncio.AbstractEventLoop]
) -> Iterator[Figure]:
    for each in loops:
        yield Figure("loop_tasks", (("loop", each.name),), tasks[each.loop])
    left = tasks.total() - sum(tasks[each.loop] for each in loops)
    if left:
        *_, name = unique([*(each.name for each in loops), NOT_RUNNING])
        yield Figure("loop_tasks", (("loop", name),), left)


def _loop_figures(loop: _Loop) -> Iterator[Figure]:
    yield_gil()
    labels = (("loop", loop.name),)
    if loop.ready is not None:
        yield Figure("loop_ready", labels, loop.ready)
    lag = stall_watch.lag(loop.loop) if stall_watch.is_on() else None
    if lag is None:
        return
    late_ns = (lag.p50_ns, lag.p90_ns, lag.p99_ns, lag.max_ns)
    for quantile, ns in zip(_QUANTILES, late_ns, strict=True):
        yield Figure("loop_lag_seconds", (*labels, _quantile(quantile)), ns / 1e9)
    yield Figure("loop_stalls_total", labels, lag.stalls)
    yield Figure("loop_stall_seconds_total", labels, lag.stall_ns / 1e9)


def _pool_figures(waiting: _Waiting) -> Iterator[Figure]:
    pool = waiting.pool
    labels = (("pool", pool.name),)
    yield Figure("thread_pool_threads", labels, pool.size)
    yield Figure("thread_pool_busy", labels, pool.busy)
    yield Figure("thread_pool_queued", labels, pool.queued)
    if waiting.longest_ns is not None:
        yield Figure("thread_pool_longest_wait_seconds", labels, waiting.longest_ns / 1e9)


def _gc_figures() -> Iterator[Figure]:
    for generation, counts in enumerate(gc.get_stats()):
        labels = (("generation", str(generation)),)
        yield Figure("python_gc_collections_total", labels, counts["collections"])
        yield Figure("python_gc_objects_collected_total", labels, counts["collected"])
        yield Figure("python_gc_objects_uncollectable_total", labels, counts["uncollectable"])
    if pauses_ns := sorted(pause_ns for pause_ns, end_ns in gc_pauses.pauses() if end_ns):
        yield Figure("python_gc_pause_seconds_total", (), gc_pauses.total_ns / 1e9)
        for quantile in _QUANTILES:
            index = math.ceil(quantile * len(pauses_ns)) - 1
            yield Figure("python_gc_pause_seconds", (_quantile(quantile),), pauses_ns[index] / 1e9)


def _process_figures() -> Iterator[Figure]:
    yield Figure("process_cpu_seconds_total", (), time.process_time_ns() / 1e9)
    status = proc_status()
    for field, name in _STATUS.items():
        if field in status:
            yield Figure(name, (), status[field])


def _quantile(quantile: float) -> tuple[str, str]:
    return "quantile", _number(quantile)


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"')


def _number(value: float) -> str:
    if math.isinf(value):
        return "+Inf"
    return str(int(value)) if value == int(value) else repr(value)
