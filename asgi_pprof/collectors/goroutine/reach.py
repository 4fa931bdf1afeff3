"""
Tasks that are soon found from the other side: from what the loops and modules refer to.

The graph of all that tasks refer to is often an application's routes, settings and
caches, 100,000 objects for six tasks. Most of what tasks wait for is a few references
away from a timer, a connection, a task that can run, or an object of a module that the
task itself uses. So these are followed first, breadth first and up to a limit.

A task that is found here is one that `leak_graph` would find to be reachable: only
references are followed by which it marks objects, from objects which it counts as
external. In doubt a reference is not followed.
"""

from __future__ import annotations

import gc
from array import array
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

from asgi_pprof.collectors.goroutine.leak_graph import Addresses, AwaitedTasks
from asgi_pprof.collectors.goroutine.object_kinds import (
    FOREIGN,
    FRAME,
    SKIP,
    SUSPENDED,
    TASK,
    ObjectKinds,
)
from asgi_pprof.collectors.goroutine.references import (
    Task,
    is_done,
    is_empty,
    is_main,
    referents,
    suspended_chain,
)

_CHUNK = 1_000  # objects released in one step


class Reach:
    """
    The waiting tasks, and which of them have been found.

    Args:
        kinds: Those of all objects.
        waiting: Tasks with what they wait for; must not change meanwhile.
        awaited: Gives the tasks that a task waits for.
    """

    def __init__(
        self, kinds: ObjectKinds, waiting: list[tuple[Task, Any]], awaited: AwaitedTasks
    ) -> None:
        self._kinds = kinds
        self._waiting = waiting
        self._awaited = awaited
        self._left = len(waiting)
        self._is_found = bytearray(len(waiting))
        self._found: list[int] = []  # what they refer to is not followed yet
        self._tasks = Addresses()
        self._futures = Addresses()  # to the last task that waits for each
        self._waits_too = array("q")  # the task before that waits for the same future, or -1
        self._in_chains = Addresses()
        self._seen = Addresses()
        self._to_follow: deque[object] = deque()
        self._followed: list[object] = []  # kept alive, so that no address is used again

    def start(self) -> Iterator[None]:
        """Take down what each task waits for."""
        for number, (task, future) in enumerate(self._waiting):
            self._tasks[id(task)] = number
            before = self._futures.get(id(future))
            self._waits_too.append(-1 if before is None else before)
            self._futures[id(future)] = number
            for each in suspended_chain(task):
                self._in_chains[id(each)] = number
            yield
        for number, (task, future) in enumerate(self._waiting):
            kind = self._kinds.of(future)
            is_other = kind == TASK and self._tasks.get(id(future)) is None
            if kind in (SKIP, FOREIGN) or is_other or is_done(future) or is_main(task):
                self._find(number)
            yield

    def follow(self, roots: Iterable[object], limit: int) -> Iterator[None]:
        """Follow references from reachable objects until that many objects have been read."""
        for each in roots:
            if self._kinds.of(each) not in (SKIP, TASK):
                self._add(each)
            yield
        while self._left and len(self._followed) < limit:
            if self._found:
                self._follow_task(self._found.pop())
            elif self._to_follow:
                self._follow_object(self._to_follow.popleft())
            else:
                return
            yield

    def not_found(self) -> list[tuple[Task, Any]]:
        """Return the other tasks, with what they wait for."""
        return [
            each for each, found in zip(self._waiting, self._is_found, strict=True) if not found
        ]

    def find_held(self, modules: Addresses, limit: int, held: list[object]) -> Iterator[None]:
        """Add what the tasks refer to and a module holds, among the nearest objects."""
        for task, future in self._waiting:
            for each in (*suspended_chain(task), future):
                if self._kinds.of(each) not in (SKIP, TASK):
                    self._add(each)
            yield
        while self._to_follow and len(self._followed) < limit:
            value = self._to_follow.popleft()
            if id(value) in modules:
                held.append(value)
            else:
                self._followed.append(value)
                for each in self._kinds.without_known_skip(referents(value)):
                    if self._kinds.of(each) not in (SKIP, TASK, FRAME):
                        self._add_if_tracked(each)
            yield

    def clear(self) -> Iterator[None]:
        """Release all objects, few at a time."""
        self._to_follow.clear()
        while self._followed:
            del self._followed[-_CHUNK:]
            yield
        for addresses in (self._seen, self._in_chains, self._futures, self._tasks):
            yield from addresses.clear()

    def _find(self, number: int) -> None:
        if not self._is_found[number]:
            self._is_found[number] = 1
            self._left -= 1
            self._found.append(number)

    def _find_waiters(self, future: object) -> None:
        number = self._futures.get(id(future))
        while number is not None and number >= 0:
            self._find(number)
            number = self._waits_too[number]

    def _add(self, value: object) -> None:
        if id(value) not in self._seen:
            self._seen[id(value)] = -1
            self._to_follow.append(value)

    def _add_if_tracked(self, value: object) -> None:
        if (gc.is_tracked(value) or type(value) is dict) and not is_empty(value):
            self._add(value)

    def _follow_task(self, number: int) -> None:
        task, future = self._waiting[number]
        self._find_waiters(task)
        if self._kinds.of(future) == TASK:
            self._find_task(future)
        else:
            self._find_waiters(future)
        for each in self._awaited(task):
            self._find_task(each)
        for chained in suspended_chain(task):
            if id(chained) not in self._seen:
                self._seen[id(chained)] = -1
                self._to_follow.appendleft(chained)  # near to other tasks

    def _find_task(self, task: object) -> None:
        number = self._tasks.get(id(task))
        if number is not None:
            self._find(number)

    def _follow_object(self, value: object) -> None:
        self._followed.append(value)
        self._find_waiters(value)
        holder = self._kinds.of(value)
        for each in self._kinds.without_known_skip(referents(value)):
            kind = self._kinds.of(each)
            if kind == TASK:
                if holder >= SUSPENDED:
                    self._find_task(each)
            elif kind not in (SKIP, FRAME) and id(each) not in self._in_chains:
                self._add_if_tracked(each)
