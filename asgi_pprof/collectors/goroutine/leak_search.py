"""
goroutineleak: the asyncio tasks that nothing can ever wake.

What is measured: tasks that wait for something which only they, and others
like them, can reach: a queue whose producer is gone, two locks taken in
opposite order. Who merely holds such a task could cancel it, no more.

How: as the collector of garbage does it. All that the waiting tasks refer to
is walked; what is referred to more often than the walk explains is held by
somebody outside, and lives, and so does all it reaches. A task lives if what
it waits for does, or a living task waits for it, or a living object that is no
plain container refers to it: a timeout will cancel it. In doubt it lives: what
is not walked (modules, types, loops, running code, a container of very many)
explains nothing. The finds are then examined once more, 20 ms later, on their
own, and references are read before and after they are counted.

What it costs: nothing until somebody asks; then some 0.1 ms a task, on the
serving loop, in slices of 4 ms. Objects that die meanwhile die a little later.

What it misses: whatever is also referred to weakly, or by an extension that
keeps addresses, or has no room in the budget of objects; a task that a local
variable of a living task holds, for it may be cancelled there. Two searches
at a time hide everything from each other. On a free-threaded build reference
counts do not add up, and nothing is found.

Source: runtime, proposal 74609 (goroutine leak detection via GC); CPython,
Python/gc.c, deduce_unreachable.
"""

from __future__ import annotations

import asyncio
import gc
import signal
import sys
import sysconfig
import time
from collections.abc import Callable, Iterable, Iterator
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

from asgi_pprof.collectors.goroutine.leak_graph import (
    SKIP,
    Addresses,
    Awaited,
    Graph,
    Kinds,
    Task,
    future_of,
    suspended_chain,
)

_SLICE_S = 0.004
_PAUSE_S = 0.02
_MAX_OBJECTS = 200_000
_MAX_HOLDERS = 50_000  # objects looked at for who may cancel a task from outside
_COUNTS_LIE = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))


async def find_leaked(
    tasks: Iterable[Task],
    awaited: Awaited,
    *,
    clock: Callable[[], float] = time.perf_counter,
) -> set[Task]:
    """
    Return the tasks that can never be woken.

    Runs on a loop, in slices, and yields to it at least once if it finds any.

    Args:
        tasks: All tasks that are not done, of any loop.
        awaited: Gives the tasks that a task waits for; asked only of these.
        clock: Test seam for `time.perf_counter`, which bounds the slices.
    """
    if _COUNTS_LIE:
        return set()
    known = list(tasks)
    search = _Search(known, awaited, clock)
    suspects = await search.unreachable(await search.waiting())
    if not suspects:
        return set()
    cancellable = await search.held_by_others([task for task, _ in suspects])
    await search.pause()
    found = await search.unreachable(suspects, cancellable, again=True)
    return {task for task, _ in found}


class _Search:
    """One search: what its walks have in common."""

    def __init__(self, tasks: list[Task], awaited: Awaited, clock: Callable[[], float]) -> None:
        self._tasks = tasks
        self._awaited = awaited
        self._clock = clock
        self._slice_end = clock() + _SLICE_S
        self._kinds = Kinds()
        self._modules = Addresses()

    async def pause(self) -> None:
        """Let the others go on, so that what was in passing has passed."""
        await asyncio.sleep(_PAUSE_S)
        self._slice_end = self._clock() + _SLICE_S

    async def waiting(self) -> list[tuple[Task, Any]]:
        """Return the tasks that wait, with what they wait for."""
        found: list[tuple[Task, Any]] = []
        await self._sliced(self._find_waiting(found))
        return found

    def _find_waiting(self, found: list[tuple[Task, Any]]) -> Iterator[None]:
        for task in self._tasks:
            future = future_of(task)
            if future is not None:
                found.append((task, future))
            yield

    async def unreachable(
        self,
        waiting: list[tuple[Task, Any]],
        cancellable: Iterable[Task] = (),
        again: bool = False,
    ) -> list[tuple[Task, Any]]:
        """
        Return those of the waiting tasks, with their futures, that nothing can wake.

        Empties `waiting`: a reference of ours would look like somebody's.

        Args:
            cancellable: Tasks that live because somebody may cancel them.
            again: Examine thoroughly: be sure of references that have been
                counted, and find nothing if the budget does not suffice.
        """
        if not self._modules:
            await self._sliced(self._note_modules())
        graph = Graph(self._kinds, self._modules, _MAX_OBJECTS)
        try:
            await self._sliced(graph.start(waiting))
            await self._sliced(graph.walk())
            if again and graph.is_cut:
                return []
            await self._sliced(graph.count())
            if again:
                await self._sliced(graph.recount())
            for task in cancellable:
                graph.enliven_task(task)
            await self._sliced(graph.enliven(self._tasks, self._awaited))
            found: list[tuple[Task, Any]] = []
            await self._sliced(graph.leaked(found))
            return found
        finally:
            await self._sliced(graph.drop())

    async def held_by_others(self, tasks: list[Task]) -> list[Task]:
        """Return the tasks that a timer, a signal, a module's or a runnable task's object holds."""
        held: list[Task] = []
        for roots in (self._scheduled(), self._globals()):
            graph = Graph(self._kinds, self._modules, _MAX_HOLDERS)
            try:
                await self._sliced(graph.start_held(tasks, roots))
                await self._sliced(graph.walk())
                await self._sliced(graph.enliven((), self._awaited))
                held += graph.living(tasks)
            finally:
                await self._sliced(graph.drop())
        return held

    async def _sliced(self, steps: Iterator[None]) -> None:
        for _ in steps:
            if self._clock() > self._slice_end:
                await asyncio.sleep(0)
                self._slice_end = self._clock() + _SLICE_S

    def _note_modules(self) -> Iterator[None]:
        # What a module holds lives. It is not walked: else an application's
        # settings, models and caches would use the budget up.
        for namespace in _namespaces():
            self._modules[id(namespace)] = -1
            for value in list(namespace.values()):
                if self._kinds.of(value) != SKIP:
                    self._modules[id(value)] = -1
            yield

    def _scheduled(self) -> Iterator[object]:
        loops = set()
        for task in self._tasks:
            loop = task.get_loop()
            if id(loop) not in loops:
                loops.add(id(loop))
                yield from gc.get_referents(loop)
            else:
                yield None  # a place to divide
        for number in signal.valid_signals():
            yield signal.getsignal(number)
        for task in self._tasks:
            if future_of(task) is None and not task.done():
                yield from suspended_chain(task)

    def _globals(self) -> Iterator[object]:
        for namespace in _namespaces():
            for value in list(namespace.values()):
                if type(value) not in (FunctionType, BuiltinFunctionType):
                    yield value


def _namespaces() -> Iterator[dict[str, object]]:
    for module in list(sys.modules.values()):
        if type(module) is ModuleType:
            yield module.__dict__
