"""
stats: figures of event loops, thread pools, garbage collection and the process, as text.

What is measured: one `name value` a line, which Prometheus reads (text format
0.0.4, without its comments) and so does `awk '$1 == ...'`: label values hold no
white space. Units are seconds and bytes; names that end in `_total` are
counters. A figure that is not known has no line, never a 0 in its place.

A loop is labelled with its thread's name. Tasks of loops that are not running are
counted under `not_running`. A pool is labelled with its threads' name (executors),
`anyio:` and the loop (that loop's default limiter), or `limiter:` and the loop (any
other limiter, while tasks wait for one of its threads). Process pools are labelled
`process_pool`. A second one of the same name is `name#2`.

How: all is read on request. Loops in other threads are read from outside, so a
loop that is stuck is shown and delays nothing. How late a loop was is known of
loops that are watched for stalls. Garbage collections are timed while a middleware
lives; their quantiles cover the last minute. How long work has waited for a thread is
known of the tasks that await it: at least for how long, since they have been seen to
wait, and at most, since they were seen not to wait, or did not exist.

What it costs: 0.4 us a task, 0.6 us up to CPython 3.13, in slices of 1 ms with
the loop's other work in between, after one slice for a copy of the list of all
tasks (3 to 5 ms for 100,000); and 0.1 us a frame of all threads, on a thread of ours.

What it misses: the figures are not of one moment. Not counted are work that waits
for a thread while no task awaits it (`submit`), pools without threads, and process
pools that have had no job.

Source: Prometheus, exposition_formats.md; prometheus_client, process_collector.py
and gc_collector.py, whose names are used where they have the figure.
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

from asgi_pprof.encoders.prometheus import Figure, figures_text, label_value, quantile_label, unique
from asgi_pprof.offload import run_in_thread, yield_gil
from asgi_pprof.runtime.children import process_pools, read_children
from asgi_pprof.runtime.gc_pauses import GcPauses
from asgi_pprof.runtime.loops import running_loops
from asgi_pprof.runtime.memory import Memory, MemoryReader
from asgi_pprof.runtime.pools import Pool, Task, Workers, default_limiter, limiter_pool
from asgi_pprof.runtime.proc import proc_status
from asgi_pprof.runtime.task_records import update_wait
from asgi_pprof.runtime.tasks import TaskList, alive, loop_of
from asgi_pprof.runtime.threads import known_threads
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
    "thread_pool_longest_wait_at_most_seconds",
    "process_pool_processes",
    "process_pool_busy",
    "process_pool_queued",
    "python_gc_collections_total",
    "python_gc_objects_collected_total",
    "python_gc_objects_uncollectable_total",
    "python_gc_pause_seconds",
    "python_gc_pause_seconds_total",
    "process_cpu_seconds_total",
    "process_resident_memory_bytes",
    "process_virtual_memory_bytes",
    "process_threads",
    "process_children",
    "process_children_cpu_seconds_total",
    "process_children_resident_memory_bytes",
    "process_resident_memory_part_bytes",
    "python_memstats_heap_alloc_bytes",
    "python_memstats_heap_inuse_bytes",
    "python_memstats_heap_idle_bytes",
    "python_memstats_heap_released_bytes",
    "python_memstats_heap_sys_bytes",
    "python_memstats_heap_objects",
    "python_memstats_stack_inuse_bytes",
    "python_memstats_stack_sys_bytes",
    "asgi_pprof_memory_bytes",
)
"""All names, in the order of their lines."""

NOT_RUNNING = "not_running"
_SLICE_S = 0.001
_QUANTILES = (0.5, 0.9, 0.99, 1.0)
_STATUS = {  # of /proc/self/status
    "VmRSS": "process_resident_memory_bytes",
    "VmSize": "process_virtual_memory_bytes",
    "Threads": "process_threads",
}


class _Loop(NamedTuple):
    """A running event loop, the name of its thread, and the number of its ready callbacks."""

    loop: asyncio.AbstractEventLoop
    name: str
    ready: int | None


_Queue = tuple[Pool, list[Task]]
"""A pool, and tasks that wait for it, the earliest first."""


class _Waiting(NamedTuple):
    """
    A pool, and the longest wait for one of its threads.

    `longest_ns` is how long it is known to be, None if no wait is known; `at_most_ns`
    how long it may be, None if that is not known.
    """

    pool: Pool
    longest_ns: int | None
    at_most_ns: int | None


class LoopLag(Protocol):
    """How late one loop's callbacks were in the last minute, and its stalls so far."""

    @property
    def p50_ns(self) -> int: ...
    @property
    def p90_ns(self) -> int: ...
    @property
    def p99_ns(self) -> int: ...
    @property
    def max_ns(self) -> int: ...
    @property
    def stalls(self) -> int: ...
    @property
    def stall_ns(self) -> int: ...


class LagSource(Protocol):
    """Knows how late loops are: the watch for stalls."""

    def is_on(self) -> bool:
        """Return whether loops are watched."""

    def lag(self, loop: asyncio.AbstractEventLoop) -> LoopLag | None:
        """Return how late a loop is; None if it is not watched."""

    async def settle(self) -> None:
        """Wait until a stall that has just ended is counted, 0.1 s at most."""


class Stats:
    """
    The figures of this process.

    Args:
        lag: Where the loops' lateness comes from.
        gc_pauses: The timer of garbage collections.
        own_memory: Returns the bytes that the profiler itself holds.
        clock: Test seam for `time.perf_counter`, which bounds the slices.
    """

    def __init__(
        self,
        lag: LagSource,
        gc_pauses: GcPauses,
        own_memory: Callable[[], int],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._lag = lag
        self._gc_pauses = gc_pauses
        self._own_memory = own_memory
        self._clock = clock
        self._tasks = TaskList()
        self._memory = MemoryReader()

    async def text(self) -> str:
        """Return all figures that are known now, a line each."""
        loops = _loops()  # before the first await, which changes what is ready
        await self._lag.settle()
        slices = Slices(_SLICE_S, self._clock)
        tasks = await self._count_tasks(slices)
        pools = await _pools(loops, slices)

        def text() -> str:
            figures = [
                *_task_figures(loops, tasks),
                *(figure for each in loops for figure in self._loop_figures(each)),
                *(figure for each in pools for figure in _pool_figures(each)),
                *_process_pool_figures(),
                *_gc_figures(self._gc_pauses),
                *_process_figures(),
                *_children_figures(),
                Figure("asgi_pprof_memory_bytes", (), self._own_memory()),
                *_memory_figures(self._memory.read()),
            ]
            return figures_text(figures, NAMES)

        return await run_in_thread(text)

    async def _count_tasks(self, slices: Slices) -> Counter[asyncio.AbstractEventLoop | None]:
        """Return the number of unfinished tasks by loop."""
        counts: Counter[asyncio.AbstractEventLoop | None] = Counter()
        await slices.yield_to_loop()  # the copy of all tasks is a slice of its own
        for task in alive(self._tasks.tasks()):
            counts[loop_of(task)] += 1
            if slices.is_over():
                await slices.yield_to_loop()
        return counts

    def _loop_figures(self, loop: _Loop) -> Iterator[Figure]:
        yield_gil()
        labels = (("loop", loop.name),)
        if loop.ready is not None:
            yield Figure("loop_ready", labels, loop.ready)
        lag = self._lag.lag(loop.loop) if self._lag.is_on() else None
        if lag is None:
            return
        late_ns = (lag.p50_ns, lag.p90_ns, lag.p99_ns, lag.max_ns)
        for quantile, ns in zip(_QUANTILES, late_ns, strict=True):
            yield Figure("loop_lag_seconds", (*labels, quantile_label(quantile)), ns / 1e9)
        yield Figure("loop_stalls_total", labels, lag.stalls)
        yield Figure("loop_stall_seconds_total", labels, lag.stall_ns / 1e9)


def _loops() -> list[_Loop]:
    """Return the running loops, the one with the oldest thread first."""
    running = {each.thread_ident: each.loop for each in running_loops()}
    threads = known_threads()
    known = [ident for ident in threads if ident in running]
    idents = [*known, *sorted(running.keys() - threads.keys())]  # of threads not made by Python
    names = unique(
        [label_value(threads[ident].name if ident in threads else str(ident)) for ident in idents]
    )
    loops = [running[ident] for ident in idents]
    return [_Loop(loop, name, _ready(loop)) for loop, name in zip(loops, names, strict=True)]


def _ready(loop: asyncio.AbstractEventLoop) -> int | None:
    """Return how many callbacks are ready to run; None if that cannot be read."""
    ready = getattr(loop, "_ready", None)
    if type(ready) is deque:
        return len(ready)
    # uvloop shows its one deque only to the garbage collector.
    deques = [each for each in gc.get_referents(loop) if type(each) is deque]
    is_uvloop = any(kind.__module__.startswith("uvloop") for kind in type(loop).__mro__)
    return len(deques[0]) if is_uvloop and len(deques) == 1 else None


async def _pools(loops: Sequence[_Loop], slices: Slices) -> list[_Waiting]:
    """Return the thread pools, and how long tasks have waited for each."""
    workers = await run_in_thread(Workers)  # 1,000 busy threads take longer than a slice
    await slices.yield_to_loop()
    found: list[_Queue] = []
    for queue in workers.waiting():
        found.append(queue)
        if slices.is_over():
            await slices.yield_to_loop()
    found += await _limiters(loops, workers, slices)
    names = unique([label_value(pool.name) for pool, _ in found])
    return [
        _Waiting(pool._replace(name=name), *_longest_wait_ns(pool, tasks))
        for name, (pool, tasks) in zip(names, found, strict=True)
    ]


async def _limiters(loops: Sequence[_Loop], workers: Workers, slices: Slices) -> list[_Queue]:
    """Return anyio's default limiters, and the other limiters that tasks wait for."""
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
    # FastAPI makes a limiter for each dependency that it exits; no task waits for these.
    waited_for = [each for each in others if each[0].queued]
    return defaults + sorted(waited_for, key=lambda each: each[0])


def _longest_wait_ns(pool: Pool, tasks: Iterable[Task]) -> tuple[int | None, int | None]:
    if not pool.queued:
        return 0, 0
    now_ns = time.monotonic_ns()
    waits_ns = [update_wait(task, now_ns) for task in tasks]
    longest_ns = max((known for known, _ in waits_ns), default=0)
    at_most_ns = [most for _, most in waits_ns if most is not None]
    return (
        longest_ns or None,  # 0: no scan has seen these tasks before
        max(at_most_ns) if at_most_ns and len(at_most_ns) == len(waits_ns) else None,
    )


def _task_figures(
    loops: Iterable[_Loop], tasks: Counter[asyncio.AbstractEventLoop | None]
) -> Iterator[Figure]:
    for each in loops:
        yield Figure("loop_tasks", (("loop", each.name),), tasks[each.loop])
    left = tasks.total() - sum(tasks[each.loop] for each in loops)
    if left:
        *_, name = unique([*(each.name for each in loops), NOT_RUNNING])
        yield Figure("loop_tasks", (("loop", name),), left)


def _pool_figures(waiting: _Waiting) -> Iterator[Figure]:
    pool = waiting.pool
    labels = (("pool", pool.name),)
    yield Figure("thread_pool_threads", labels, pool.size)
    yield Figure("thread_pool_busy", labels, pool.busy)
    yield Figure("thread_pool_queued", labels, pool.queued)
    if waiting.longest_ns is not None:
        yield Figure("thread_pool_longest_wait_seconds", labels, waiting.longest_ns / 1e9)
    if waiting.at_most_ns is not None:
        most_s = waiting.at_most_ns / 1e9
        yield Figure("thread_pool_longest_wait_at_most_seconds", labels, most_s)


def _process_pool_figures() -> Iterator[Figure]:
    pools = list(process_pools())
    names = unique(["process_pool"] * len(pools))
    for name, pool in zip(names, pools, strict=True):
        labels = (("pool", name),)
        yield Figure("process_pool_processes", labels, pool.size)
        yield Figure("process_pool_busy", labels, pool.busy)
        yield Figure("process_pool_queued", labels, pool.queued)


def _children_figures() -> Iterator[Figure]:
    children = read_children()
    if children is not None:
        yield Figure("process_children", (), children.number)
        yield Figure("process_children_cpu_seconds_total", (), children.cpu_s)
        yield Figure("process_children_resident_memory_bytes", (), children.resident_bytes)


def _gc_figures(gc_pauses: GcPauses) -> Iterator[Figure]:
    for generation, counts in enumerate(gc.get_stats()):
        labels = (("generation", str(generation)),)
        yield Figure("python_gc_collections_total", labels, counts["collections"])
        yield Figure("python_gc_objects_collected_total", labels, counts["collected"])
        yield Figure("python_gc_objects_uncollectable_total", labels, counts["uncollectable"])
    if gc_pauses.last_end_ns:
        yield Figure("python_gc_pause_seconds_total", (), gc_pauses.total_ns / 1e9)
    for generation, pauses_ns in gc_pauses.quantiles(_QUANTILES).items():
        for quantile, ns in zip(_QUANTILES, pauses_ns, strict=True):
            both = (("generation", str(generation)), quantile_label(quantile))
            yield Figure("python_gc_pause_seconds", both, ns / 1e9)


def _process_figures() -> Iterator[Figure]:
    yield Figure("process_cpu_seconds_total", (), time.process_time_ns() / 1e9)
    status = proc_status()
    for field, name in _STATUS.items():
        if field in status:
            yield Figure(name, (), status[field])


def _memory_figures(memory: Memory) -> Iterator[Figure]:
    for part, size in memory.parts.items():
        if size:
            yield Figure("process_resident_memory_part_bytes", (("part", part),), size)
    figures = {
        "stack_inuse_bytes": memory.stack_inuse,
        "stack_sys_bytes": memory.stack_system,
    }
    if not memory.unknown:
        figures |= {
            "heap_alloc_bytes": memory.alloc,
            "heap_inuse_bytes": memory.inuse,
            "heap_idle_bytes": memory.idle,
            "heap_released_bytes": memory.released,
            "heap_sys_bytes": memory.system,
            "heap_objects": memory.objects,
        }
    for name, value in figures.items():
        yield Figure(f"python_memstats_{name}", (), value)
