"""
goroutine: every asyncio task, what it waits for, since when, and who made it.

What is measured: one count per task that is not done, of every event loop in
the process, with its whole await chain as the stack (leaf first), the labels of
its context, its name, its state (running, runnable, or what it waits for), and
how many requests to cancel it are open.
Of a task that waits for one worker thread, the thread's frames are the inner part
of the stack. The dump (debug=2) adds numbers: the task's own, of the tasks it
waits for, of those that wait for it, and of the one that made it.

How: on request, the coroutine's chain of awaits is followed from outside. This
runs on the serving loop in slices of 4 ms, with the loop's other work in
between. Another loop that does not answer within a second is read all the same,
and marked; what blocks it comes first.

What it costs: about 20 us a task, on request only; see `task_tracking` for what is
recorded of tasks all the time.

What it misses: tasks change between two slices, so the profile does not show a
single moment. Tasks of loops in other threads are read while these run: a task
that moves while it is read is read again.

Source: runtime/pprof, writeGoroutine; CPython, Lib/asyncio/tasks.py.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import time
from array import array
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from asgi_pprof.collectors import AlwaysOn
from asgi_pprof.collectors.goroutine.waits import Task, Wait, Waits
from asgi_pprof.labels import unreadable
from asgi_pprof.merge import SampleKey
from asgi_pprof.profile import (
    Goroutine,
    Profile,
    Sample,
    Stack,
    count_profile,
    pseudo_location,
)
from asgi_pprof.runtime.chains import await_chain
from asgi_pprof.runtime.frames import (
    capture,
    current_frames,
    generator_frame,
    is_generator,
    is_running,
    running_frames,
    unwrapped,
)
from asgi_pprof.runtime.loops import RunningLoop, running_loops
from asgi_pprof.runtime.pools import Work
from asgi_pprof.runtime.task_labels import (
    fold_default_name,
    is_default_name,
    task_labels,
    task_name,
)
from asgi_pprof.runtime.task_records import record_of
from asgi_pprof.runtime.tasks import (
    TaskList,
    alive,
    cancelling,
    coroutine_of,
    is_done,
    loop_of,
    waits_for,
)
from asgi_pprof.runtime.threads import known_threads
from asgi_pprof.slices import Slices
from asgi_pprof.stacks import MAX_DEPTH, TRUNCATED, UNKNOWN, Symbols, chain_stack

ANSWER_S = 1.0
"""How long a loop may take to run a callback before it counts as blocked."""

_SLICE_S = 0.004
_COUNT_EXACTLY = 5_000
_MAX_NAMED = 10  # of the tasks that a task waits for, or that wait for it
_RUN = 1_000  # tasks sorted at a time
_BEFORE_ALL = 1 << 62
_MINUTE_NS = 60_000_000_000
_WORKER = pseudo_location("worker thread")
_BLOCKED = ("loop", "does not answer")


class TaskCollector(AlwaysOn):
    """
    The asyncio tasks of this process.

    Args:
        clock: Test seam for `time.perf_counter`, which bounds the slices.
        answer_s: How long other loops may take to answer.
    """

    def __init__(
        self, clock: Callable[[], float] = time.perf_counter, answer_s: float = ANSWER_S
    ) -> None:
        self._clock = clock
        self._answer_s = answer_s
        self._list = TaskList()

    def count(self) -> int:
        """Return the number of tasks that are not done; above 5,000, of all that are registered."""
        entries = self._list.tasks()
        if len(entries) > _COUNT_EXACTLY:
            return len(entries)  # reading the state of each would block the loop
        return sum(1 for _ in alive(entries))

    async def snapshot(self) -> Callable[[], Profile]:
        """Give goroutine/count: one sample per stack, labels, name and state."""
        # Counted at once, in the slices: 100,000 samples kept until the end would
        # set off garbage collections that take longer than any slice.
        scan = await self.begin_scan()
        counts: Counter[SampleKey] = Counter()
        async for task in self.tasks(scan):
            counts[scan.sample_key(task)] += 1
        profile = profile_of("goroutine", counts, scan.comments())
        return lambda: profile

    async def goroutines(self) -> AsyncGenerator[Goroutine, None]:
        """Yield what blocks a loop, the task that asks, then the others by age."""
        scan = await self.begin_scan()
        edges, ranked = Edges(), _Ranked()
        async for task in self.tasks(scan):
            ranked.add(scan.rank(task), task)
            for awaited in scan.awaited(task):
                edges.add(record_of(task).id, record_of(awaited).id)
                await scan.yield_if_due()
        for running in scan.blocked:
            if running.task is None:
                yield scan.callback(running)
        for task in ranked.in_order():
            if not is_done(task):
                yield scan.goroutine(task, edges)
            await scan.yield_if_due()

    async def tasks(self, scan: Scan) -> AsyncIterator[Task]:
        """Yield all tasks that are not done by the time they are reached."""
        for task in alive(self._list.tasks()):
            if not is_done(task):
                yield task
            await scan.yield_if_due()

    async def begin_scan(self) -> Scan:
        """Begin a scan: find out which loops answer, and what threads do."""
        loops = [each for each in running_loops() if each.loop is not asyncio.get_running_loop()]
        blocked = await _not_answering(loops, self._answer_s) if loops else []
        return Scan(blocked, Slices(_SLICE_S, self._clock))


class _Ranked:
    """
    Tasks to be read in the order of their ranks, of which no two are equal.

    No step takes long, and there is no container for each task: those would set off
    garbage collections that take longer than any slice.
    """

    def __init__(self) -> None:
        self._ranks = array("q")
        self._tasks: list[Task] = []
        self._runs: list[list[int]] = []  # indexes in the order of their ranks

    def add(self, rank: int, task: Task) -> None:
        self._ranks.append(rank)
        self._tasks.append(task)
        if len(self._tasks) % _RUN == 0:
            self._end_run()

    def _end_run(self) -> None:
        start = len(self._runs) * _RUN
        rank_of = self._ranks.__getitem__
        self._runs.append(sorted(range(start, len(self._tasks)), key=rank_of))

    def in_order(self) -> Iterator[Task]:
        """Yield the tasks; call it once, after all have been added."""
        self._end_run()
        rank_of = self._ranks.__getitem__
        return map(self._tasks.__getitem__, heapq.merge(*self._runs, key=rank_of))


class Edges:
    """Which task waits for which, by number: the first ten of each, and how many more."""

    def __init__(self) -> None:
        self._ends = {"awaits": _Numbers(), "awaited_by": _Numbers()}

    def add(self, waiter: int, awaited: int) -> None:
        """Record that one task waits for the other."""
        self._ends["awaits"].add(waiter, awaited)
        self._ends["awaited_by"].add(awaited, waiter)

    def labels(self, number: int) -> dict[str, str]:
        """Return the edges of a task as labels."""
        return {kind: text for kind, ends in self._ends.items() if (text := ends.text(number))}


class _Numbers:
    """Numbers of tasks by that of a task, as texts: those are no work for garbage collections."""

    def __init__(self) -> None:
        self._first: dict[int, str] = {}
        self._count: Counter[int] = Counter()

    def add(self, task: int, number: int) -> None:
        if self._count[task] < _MAX_NAMED:
            self._first[task] = f"{self._first.get(task, '')} {number}"
        self._count[task] += 1

    def text(self, task: int) -> str:
        numbers = sorted(map(int, self._first.get(task, "").split()))
        return _and_more(numbers, self._count[task])


def _and_more(first: Sequence[object], count: int) -> str:
    left_out = count - len(first)
    return ", ".join(map(str, first)) + (f" and {left_out} more" if left_out else "")


class _Reading(NamedTuple):
    """A task at one moment; `wait` is None if it can run."""

    state: str
    stack: Stack
    wait: Wait | None
    waited_ns: int


class Scan:
    """
    One pass over the tasks, with the names, reasons and threads it has found out.

    Args:
        blocked: Loops that do not answer.
        slices: Divide the scan.
    """

    def __init__(self, blocked: Sequence[RunningLoop], slices: Slices) -> None:
        self.blocked = blocked
        self._slices = slices
        self._blocked_loops = [each.loop for each in blocked]
        self._asking = asyncio.current_task()
        self._symbols = Symbols()
        self._waits = Waits()
        self._running = _running_tasks()
        self._queued: Counter[str] = Counter()

    async def yield_if_due(self) -> None:
        """At the end of a slice yield to the loop, then see again which tasks and threads run."""
        if self._slices.is_over():
            await self._slices.yield_to_loop()
            self._waits.read_threads()
            self._running = _running_tasks()

    def goroutine(self, task: Task, edges: Edges) -> Goroutine:
        """Return a task as dumps show it; one that cannot be read with the reason as its state."""
        try:
            return self._goroutine(task, edges)
        except Exception as error:
            labels = tuple(sorted(_name_label(task).items()))
            return Goroutine(record_of(task).id, unreadable(error), (UNKNOWN,), labels)

    def _goroutine(self, task: Task, edges: Edges) -> Goroutine:
        reading = self._read(task)
        record = record_of(task)
        labels = {**self._labels(task), **edges.labels(record.id)}
        if reading.wait is not None:
            if reading.wait.workers:
                labels["workers"] = reading.wait.workers
            if threads := [work.thread for work in reading.wait.work]:
                labels["thread"] = _and_more(threads[:_MAX_NAMED], len(threads))
        return Goroutine(
            record.id,
            reading.state,
            reading.stack,
            tuple(sorted(labels.items())),
            # As in Go, leaked ones have no time.
            minutes=0 if record.leaked else reading.waited_ns // _MINUTE_NS,
            leaked=record.leaked,
            created_by=self._symbols.instruction(record.code, record.lasti)
            if record.code
            else None,
            creator=record.creator,
        )

    def sample_key(self, task: Task) -> SampleKey:
        """
        Return what equal tasks have in common: stack and labels.

        Only labels with few values: no numbers of tasks, nor the ones in default names.
        A task that cannot be read has the reason as its state.
        """
        try:
            return self._sample_key(task)
        except Exception as error:
            labels = {**_name_label(task), "state": unreadable(error)}
            return (UNKNOWN,), tuple(sorted(labels.items()))

    def _sample_key(self, task: Task) -> SampleKey:
        reading = self._read(task)
        labels = self._labels(task)
        fold_default_name(labels)
        if requests := labels.get("cancelling"):
            labels["cancelling"] = _magnitude(requests)
        labels["state"] = reading.state
        if reading.wait is not None:
            if awaited := _names(reading.wait.tasks):
                labels["awaits"] = awaited
            if reading.wait.workers:
                self._queued[reading.wait.workers] += 1
        return reading.stack, tuple(sorted(labels.items()))

    def callback(self, running: RunningLoop) -> Goroutine:
        """Return a callback that blocks a loop as dumps show it."""
        ident = running.thread_ident
        stack = self._symbols.stack(capture(current_frames((ident,)).get(ident))) or (UNKNOWN,)
        return Goroutine(0, "running", stack, (_BLOCKED, ("task", "none: a callback")))

    def awaited(self, task: Task) -> Iterable[Task]:
        """Return the tasks that a task waits for, as far as they can be read."""
        with suppress(Exception):  # of classes of the application's
            return self._awaited(task)
        return ()

    def _awaited(self, task: Task) -> Iterable[Task]:
        future = waits_for(task)
        if future is None or self._is_running(task):
            return ()
        return self._waits.wait(future, await_chain(coroutine_of(task))).tasks

    def rank(self, task: Task) -> int:
        """Return a task's place in a dump: that which blocks a loop, that which asks, by age."""
        if task is self._asking:
            return 0
        blocks = self._is_running(task) and loop_of(task) in self._blocked_loops
        return record_of(task).id - (_BEFORE_ALL if blocks else 0)

    def comments(self) -> tuple[str, ...]:
        """Return the comments of a profile of the tasks read so far."""
        threads = known_threads()
        names = [threads[ident].name if ident in threads else ident for ident, _, _ in self.blocked]
        blocked = (
            f"the loop of thread {name} does not answer: read from outside" for name in names
        )
        queued = (
            f"{count} {'tasks wait' if count > 1 else 'task waits'} for a thread: {workers}"
            for workers, count in self._queued.items()
        )
        return *blocked, *queued

    def _is_running(self, task: Task) -> bool:
        return any(each.task is task for each in self._running)

    def _read(self, task: Task) -> _Reading:
        for _ in range(3):
            future = waits_for(task)
            reading = self._read_once(task, future)
            if waits_for(task) is future:
                break  # else it has moved, on a loop of another thread
        return reading

    def _read_once(self, task: Task, future: Any) -> _Reading:
        for running in self._running:
            if running.task is task and (stack := _running_stack(running, self._symbols)):
                return _Reading("running", stack, None, 0)
        waited_ns = record_of(task).update(future, time.monotonic_ns())
        chain = await_chain(coroutine_of(task))
        stack = chain_stack(chain, self._symbols)
        if future is None:
            return _Reading("runnable", stack or (UNKNOWN,), None, 0)
        wait = self._waits.wait(future, chain)
        if len(wait.work) == 1:
            stack = (*self._worker_stack(*wait.work), _WORKER, *stack)
            if len(stack) > MAX_DEPTH:
                stack = (*stack[:MAX_DEPTH], TRUNCATED)
        return _Reading(wait.reason, stack or (UNKNOWN,), wait, waited_ns)

    def _worker_stack(self, work: Work) -> Stack:
        if work.stack or not work.function:
            return self._symbols.stack(work.stack)
        return (pseudo_location(work.function),)

    def _labels(self, task: Task) -> dict[str, str]:
        labels = task_labels(task)
        if self._blocked_loops and loop_of(task) in self._blocked_loops:
            labels.update((_BLOCKED,))
        if requests := cancelling(task):
            labels["cancelling"] = str(requests)
        return labels


def _magnitude(number: str) -> str:
    """Return a number of one digit as it is, and of a longer one how many digits it has."""
    return number if len(number) == 1 else f"{10 ** (len(number) - 1)} or more"


def _name_label(task: Task) -> dict[str, str]:
    labels = {"task": task_name(task)}
    fold_default_name(labels)
    return labels


def _running_tasks() -> list[RunningLoop]:
    return [running for running in running_loops() if running.task is not None]


def _running_stack(running: RunningLoop, symbols: Symbols) -> Stack:
    """Return the live frames of a running task, down to its outermost coroutine."""
    coroutine = unwrapped(coroutine_of(running.task)) if running.task is not None else None
    if not is_generator(coroutine):
        return ()
    frames = running_frames(coroutine)
    if not frames and is_running(coroutine):
        # In a greenlet: that has all the frames of the thread, and the coroutine is not among them.
        ident = running.thread_ident
        inner = capture(current_frames((ident,), MAX_DEPTH).get(ident))
        place = generator_frame(coroutine)
        frames = running_frames(coroutine)  # unless it has just come back
        if not frames and place is not None and is_running(coroutine):
            frames = (*inner, place)
    return symbols.stack(frames)


def _names(tasks: Iterable[Task]) -> str:
    """Return the names of the first few of these tasks, each once."""
    names = set()
    for task in itertools.islice(tasks, _MAX_NAMED):
        name = task_name(task)
        if is_default_name(name):
            name = str(getattr(coroutine_of(task), "__qualname__", "Task"))
        names.add(name)
    return ", ".join(sorted(names))


async def _not_answering(loops: Iterable[RunningLoop], answer_s: float) -> list[RunningLoop]:
    """Return those of some loops in other threads that run no callback within that time."""
    here = asyncio.get_running_loop()
    answers = {each: here.create_future() for each in loops}

    def receive(answer: asyncio.Future[None]) -> None:
        if not answer.done():
            answer.set_result(None)

    def answer(future: asyncio.Future[None]) -> None:
        with suppress(RuntimeError):  # closed: no answer is expected any more
            here.call_soon_threadsafe(receive, future)

    for running, future in answers.items():
        try:
            running.loop.call_soon_threadsafe(answer, future)
        except Exception:
            receive(future)  # closed meanwhile, or a loop of the application's own class
    await asyncio.wait(answers.values(), timeout=answer_s)
    return [running for running, future in answers.items() if not future.done()]


def profile_of(name: str, counts: Counter[SampleKey], comments: tuple[str, ...] = ()) -> Profile:
    """Return NAME/count with a sample for each stack and labels."""
    samples = [Sample(stack, (count,), labels) for (stack, labels), count in counts.items()]
    return count_profile(name, samples, time.time_ns(), comments)
