"""
goroutineleak: the asyncio tasks that nothing can ever wake.

What is measured: tasks that wait for something which only they, and other such
tasks, can reach: a queue whose producer is gone, two locks taken in opposite
order. A reference to the task itself does not keep it alive: its holder could
only cancel it.

How: as CPython's garbage collector finds garbage. We traverse all that the
waiting tasks refer to, and subtract these internal references from the reference
counts. An object with external references left is reachable, and so is all that
it refers to. A task is reachable if what it waits for is, or a reachable task waits
for it, or a reachable object that is no plain container refers to it: a timeout
will cancel it. In doubt it counts as reachable: what is not traversed (modules,
types, loops, running code, very long containers) has no references to subtract.
The unreachable tasks are searched once more 20 ms later, on their own, and
references are read before and after they are counted. Most services have no leaks,
which `reach` sees with a few thousand objects; all is traversed only in doubt.

What it costs: nothing until a profile is requested; then 0.3 to 0.4 ms a task, on
the serving loop, in slices of 1 ms. A thread that the loop waits for gets the GIL
only between slices. If there may be leaks, also some 10 us for each object that tasks
reach. Objects that die meanwhile die a little later.

What it misses: whatever is also referred to weakly, or by an extension that
keeps addresses, or exceeds the limit of objects; a task in a local variable of a
reachable task, which may cancel it there. Of two searches at a time each makes
what the other traverses reachable. On a free-threaded build reference counts do
not add up, and nothing is found.

Source: runtime, proposal 74609 (goroutine leak detection via GC); CPython,
Python/gc.c, deduce_unreachable.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import signal
import sys
import sysconfig
import time
from collections.abc import Callable, Iterable, Iterator
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

from asgi_pprof.collectors.goroutine.leak_graph import Addresses, AwaitedTasks, Graph
from asgi_pprof.collectors.goroutine.object_kinds import SKIP, ObjectKinds
from asgi_pprof.collectors.goroutine.reach import Reach
from asgi_pprof.collectors.goroutine.references import Task, future_of, is_done, suspended_chain
from asgi_pprof.runtime.tasks import loop_of
from asgi_pprof.slices import Slices

_SLICE_S = 0.001
_PAUSE_S = 0.02
MAX_OBJECTS = 200_000
"""How many objects one pass traverses."""

_MAX_NEAR = 2_000  # objects that suffice to see most tasks to be reachable,
_MAX_FIRST = 20_000  # and those with which the others are
_MAX_FEW = 1_000  # tasks; what more of them wait for exceeds those limits anyway
_MAX_HOLDERS = 50_000  # objects traversed for what may cancel a task from outside
_COUNTS_LIE = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))


async def find_leaked(
    tasks: Iterable[Task],
    awaited: AwaitedTasks,
    *,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[set[Task], bool]:
    """
    Return the tasks that can never be woken, and whether the search was cut short.

    Runs on a loop, in slices, and yields to it at least once if it finds any.

    Args:
        tasks: All tasks that are not done, of any loop.
        awaited: Gives the tasks that a task waits for; asked only of these.
        clock: Test seam for `time.perf_counter`, which bounds the slices.
    """
    if _COUNTS_LIE:
        return set(), False
    known = list(tasks)
    search = _Search(known, awaited, clock)
    if not await search.may_have_leaks():
        return set(), False
    suspects = await search.unreachable(await search.waiting())
    if not suspects:
        return set(), search.is_cut
    cancellable = await search.held_by_others([task for task, _ in suspects])
    await search.pause()
    found = await search.unreachable(suspects, cancellable, again=True)
    return {task for task, _ in found}, search.is_cut


class _Search:
    """One search: what its passes over the graph have in common."""

    def __init__(
        self, tasks: list[Task], awaited: AwaitedTasks, clock: Callable[[], float]
    ) -> None:
        self._tasks = tasks
        self._awaited = awaited
        self._slices = Slices(_SLICE_S, clock)
        self._kinds = ObjectKinds()
        self._modules = Addresses()
        self.is_cut = False
        """Whether there were more than `MAX_OBJECTS` objects; leaks may be missing then."""

    async def pause(self) -> None:
        """Let other work run, so that references that were only being passed on are gone."""
        await asyncio.sleep(_PAUSE_S)
        self._slices.begin()

    async def waiting(self) -> list[tuple[Task, Any]]:
        """Return the tasks that wait, with what they wait for."""
        found: list[tuple[Task, Any]] = []
        await self._run(self._find_waiting(found))
        return found

    def _find_waiting(self, found: list[tuple[Task, Any]]) -> Iterator[None]:
        for task in self._tasks:
            future = future_of(task)
            if future is not None:
                found.append((task, future))
            yield

    async def may_have_leaks(self) -> bool:
        """
        Return False if some objects suffice to see that all tasks are reachable.

        Tasks that the loops soon lead to need not be in the graph: what they refer to
        has external references then, and is reachable as well. Only a task that one of
        them may cancel looks unreachable, so all are searched if there are any.
        """
        if len(self._tasks) > _MAX_FEW:
            return True
        waiting = await self._not_in_reach(await self.waiting(), _MAX_NEAR)
        if not waiting:
            return False
        if not self._modules:
            await self._run(self._add_modules())
        waiting = await self._not_in_reach(waiting, _MAX_FIRST)
        if not waiting:
            return False
        graph = Graph(self._kinds, self._modules, _MAX_FIRST)
        return bool(await self._unreachable(graph, waiting)) or graph.is_cut

    async def _not_in_reach(
        self, waiting: list[tuple[Task, Any]], limit: int
    ) -> list[tuple[Task, Any]]:
        held: list[object] = []
        near = Reach(self._kinds, waiting, self._awaited)
        reach = Reach(self._kinds, waiting, self._awaited)
        try:
            if self._modules:
                await self._run(near.find_held(self._modules, _MAX_NEAR, held))
            await self._run(reach.start())
            await self._run(reach.follow(itertools.chain(held, self._scheduled()), limit))
            return reach.not_found()
        finally:
            await self._run(near.clear())
            await self._run(reach.clear())

    async def unreachable(
        self,
        waiting: list[tuple[Task, Any]],
        cancellable: Iterable[Task] = (),
        again: bool = False,
    ) -> list[tuple[Task, Any]]:
        """
        Return those of the waiting tasks, with their futures, that nothing can wake.

        Empties `waiting`: a reference of ours would look like an external one.

        Args:
            cancellable: Tasks that are reachable because something may cancel them.
            again: Search thoroughly: check that the references that were subtracted
                are still there, and find nothing if there are too many objects.
        """
        graph = Graph(self._kinds, self._modules, MAX_OBJECTS)
        found = await self._unreachable(graph, waiting, cancellable, again)
        self.is_cut |= graph.is_cut
        return [] if again and graph.is_cut else found

    async def _unreachable(
        self,
        graph: Graph,
        waiting: list[tuple[Task, Any]],
        cancellable: Iterable[Task] = (),
        again: bool = False,
    ) -> list[tuple[Task, Any]]:
        if not self._modules:
            await self._run(self._add_modules())
        try:
            await self._run(graph.start(waiting))
            await self._run(graph.traverse())
            await self._run(graph.count_external())
            if again:
                await self._run(graph.recheck())
            for task in cancellable:
                graph.mark_task(task)
            await self._run(graph.propagate(self._tasks, self._awaited))
            found: list[tuple[Task, Any]] = []
            await self._run(graph.unreachable(found))
            return found
        finally:
            await self._run(graph.clear())

    async def held_by_others(self, tasks: list[Task]) -> list[Task]:
        """Return the tasks that a timer, a signal, a module's or a runnable task's object holds."""
        held: list[Task] = []
        for roots in (self._scheduled(), self._globals()):
            graph = Graph(self._kinds, self._modules, _MAX_HOLDERS)
            try:
                await self._run(graph.start_from(roots, tasks))
                await self._run(graph.traverse())
                await self._run(graph.propagate((), self._awaited))
                held += graph.reachable(tasks)
            finally:
                await self._run(graph.clear())
        return held

    async def _run(self, steps: Iterator[None]) -> None:
        for _ in steps:
            if self._slices.is_over():
                await self._slices.yield_to_loop()

    def _add_modules(self) -> Iterator[None]:
        # What a module holds is reachable. It is not traversed: an application's
        # settings, models and caches would use up the limit of objects.
        for namespace in _namespaces():
            self._modules[id(namespace)] = -1
            for value in list(namespace.values()):
                if self._kinds.of(value) != SKIP:
                    self._modules[id(value)] = -1
            yield

    def _scheduled(self) -> Iterator[object]:
        loops = set()
        for task in self._tasks:
            loop = loop_of(task)
            if id(loop) not in loops:
                loops.add(id(loop))
                yield from gc.get_referents(loop)
            else:
                yield None  # so that a slice can end here
        for number in signal.valid_signals():
            yield signal.getsignal(number)
        for task in self._tasks:
            if future_of(task) is None and not is_done(task):
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
