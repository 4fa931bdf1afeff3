"""
The graph of what waiting tasks refer to, searched in the phases of CPython's garbage collector.

    start, traverse     find the objects, and the internal references between them
    count_external      subtract internal references from reference counts: the rest is external
    recheck             count a reference as external if it has changed since `traverse`
    propagate           mark what has external references, and all that is reachable from it
    unreachable         what is left

Each phase is an iterator of steps, between which the caller may yield to the
loop. Nothing here runs code of the objects: no object is compared, hashed or
asked for an attribute.

Source: CPython, Python/gc.c, deduce_unreachable.
"""

from __future__ import annotations

import gc
import sys
import weakref
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from asgi_pprof.collectors.goroutine.object_kinds import (
    CONTAINER,
    FOREIGN,
    FRAME,
    INSTANCE,
    SKIP,
    SUSPENDED,
    TASK,
    TASK_GROUP,
    ObjectKinds,
)
from asgi_pprof.collectors.goroutine.references import (
    HIDES_DICTS,
    OWN_REFERENCES,
    Task,
    future_of,
    has_inline_values,
    is_done,
    is_empty,
    is_main,
    own_dict,
    referents,
    suspended_chain,
)

AwaitedTasks = Callable[[Task], Iterable[Task]]

_CHUNK = 1_000  # objects in one step: reading so many reference counts takes about 50 us
_SHARDS = 16  # a dict of 200,000 grows in one step of 6 ms


class Addresses:
    """A dict from an object's address to a number, which grows in small steps."""

    def __init__(self) -> None:
        self._shards: list[dict[int, int]] = [{} for _ in range(_SHARDS)]

    def __bool__(self) -> bool:
        return any(self._shards)

    def __setitem__(self, address: int, number: int) -> None:
        self._shards[address >> 4 & (_SHARDS - 1)][address] = number

    def __contains__(self, address: int) -> bool:
        return address in self._shards[address >> 4 & (_SHARDS - 1)]

    def get(self, address: int) -> int | None:
        return self._shards[address >> 4 & (_SHARDS - 1)].get(address)

    def clear(self) -> Iterator[None]:
        for shard in self._shards:
            shard.clear()
            yield


class Graph:
    """
    Objects by number: first the tasks, then all else in the order it is found.

    There are no containers in containers: 200,000 lists would set off garbage
    collections longer than any slice.

    Args:
        modules: Addresses of what modules hold.
        max_objects: How many objects are traversed.
    """

    def __init__(self, kinds: ObjectKinds, modules: Addresses, max_objects: int) -> None:
        self._kinds = kinds
        self._modules = modules
        self._max_objects = max_objects
        self.is_cut = False
        """Whether there were more objects than `max_objects`."""
        self._objects: list[Any] = []
        self._numbers = Addresses()
        self._kind = bytearray()
        self._tasks = 0  # how many there are
        self._first_traversed = 0
        self._first_found = 0  # objects before this one are traversed even if a module holds them
        self._futures = array("q")  # what each task waits for, -1: something reachable
        self._waiters: dict[int, list[int]] = {}
        self._is_in_chain = bytearray()  # part of a task's own chain of awaits
        self._has_task = bytearray()  # refers to one of the tasks
        self._references = array("q")  # of all objects in turn
        self._ends = array("q")  # where each object's references end
        self._external = array("q")  # how many references to each object are external
        self._empty_dicts: list[int] = []  # with items, but without references of their own
        self._is_reachable = bytearray()
        self._to_propagate: list[int] = []  # reachable; what they refer to is not marked yet

    def _add(self, value: object, kind: int) -> int:
        number = len(self._objects)
        self._numbers[id(value)] = number
        self._objects.append(value)
        self._kind.append(kind)
        for flags in (self._is_in_chain, self._has_task, self._is_reachable):
            flags.append(0)
        return number

    # start

    def start(self, waiting: list[tuple[Task, Any]]) -> Iterator[None]:
        """Add the tasks that still wait for the same future; empties the list."""
        futures = []
        while waiting:
            task, future = waiting.pop()
            if future_of(task) is future:
                self._add(task, TASK)
                futures.append(future)
            yield
        self._tasks = len(self._objects)
        futures.reverse()
        for number in range(self._tasks):
            self._futures.append(self._add_future(futures.pop(), number))
            self._is_in_chain[number] = 1
            for each in suspended_chain(self._objects[number]):
                if self._numbers.get(id(each)) is None:
                    self._is_in_chain[self._add(each, self._kinds.of(each))] = 1
            yield
        self._first_found = self._tasks

    def _add_future(self, future: Any, task: int) -> int:
        kind = self._kinds.of(future)
        known = self._numbers.get(id(future))
        if kind in (SKIP, FOREIGN) or is_done(future) or (kind == TASK and known is None):
            return -1
        number = self._add(future, kind) if known is None else known
        self._waiters.setdefault(number, []).append(task)
        return number

    def start_from(self, roots: Iterator[object], tasks: list[Task]) -> Iterator[None]:
        """Add reachable objects, and tasks that are not traversed, to see which are reachable."""
        for task in tasks:
            self._futures.append(self._add(task, TASK))  # itself: no future is known here
        self._tasks = self._first_traversed = len(tasks)
        self._ends.extend([0] * self._tasks)
        for each in roots:
            kind = self._kinds.of(each)
            if kind not in (SKIP, TASK) and self._numbers.get(id(each)) is None:
                self._mark(self._add(each, kind))
            yield
        self._first_found = len(self._objects)

    # traverse

    def traverse(self) -> Iterator[None]:
        """Find all objects and their references, breadth first: what is near matters most."""
        number = self._first_traversed
        while number < len(self._objects):
            self._traverse_one(number)
            self._ends.append(len(self._references))
            number += 1
            yield

    def _traverse_one(self, number: int) -> None:
        value, kind = self._objects[number], self._kind[number]
        if kind == TASK and number >= self._tasks:
            self._mark(number)  # it is not among those that wait
            return
        in_module = self._is_in_module(number)
        if in_module or kind == FOREIGN:
            self._mark(number)
        found = referents(value)
        if not found and type(value) is dict and value:
            self._empty_dicts.append(number)
        for each in self._kinds.without_known_skip(found):
            known = self._numbers.get(id(each))
            if known is None and not in_module:
                known = self._discover(each)
            if known is not None and (known < self._tasks or not in_module):
                self._add_reference(number, known)

    def _add_reference(self, number: int, known: int) -> None:
        self._references.append(known)
        if known < self._tasks:
            self._has_task[number] = 1
        if self._is_in_chain[number] and self._kind[known] == FRAME:
            self._is_in_chain[known] = 1

    def _is_in_module(self, number: int) -> bool:
        if number < self._first_found or self._is_in_chain[number]:
            return False
        return id(self._objects[number]) in self._modules

    def _discover(self, value: object) -> int | None:
        kind = self._kinds.of(value)
        if kind == SKIP or not (gc.is_tracked(value) or type(value) is dict) or is_empty(value):
            return None
        if len(self._objects) >= self._max_objects:
            self.is_cut = True
            return None
        return self._add(value, kind)

    def _referred_to(self, number: int) -> array[int]:
        start = self._ends[number - 1] if number else 0
        return self._references[start : self._ends[number]]

    # count_external

    def count_external(self) -> Iterator[None]:
        """Subtract the internal references from the reference counts."""
        self._external = array("q", [-OWN_REFERENCES]) * len(self._objects)
        for start in range(0, len(self._references), _CHUNK):
            for known in self._references[start : start + _CHUNK]:
                self._external[known] -= 1
            yield
        for start in range(0, len(self._objects), _CHUNK):
            values = self._objects[start : start + _CHUNK]
            counts = list(map(sys.getrefcount, values))
            for number, count in enumerate(counts, start):
                self._external[number] += count
            for number, refs in enumerate(map(weakref.getweakrefcount, values), start):
                if refs and not self._has_harmless_weakrefs(number):
                    self._mark(number)
            del values
            yield

    def _has_harmless_weakrefs(self, number: int) -> bool:
        # Registries of tasks, of the loop's asynchronous generators and of timed waits
        # refer weakly to what they cannot wake.
        return (
            self._is_in_chain[number] == 1
            or self._kind[number] == SUSPENDED
            or number in self._waiters
        )

    def recheck(self) -> Iterator[None]:
        """
        Count internal references as external that are not there any more.

        A reference that was there before the counts and is there after them was
        there when they were taken; any other may be external and have been
        subtracted as internal.
        """
        for number in range(len(self._objects)):
            before = self._referred_to(number)
            after = array("q", self._referred_to_now(number)) if before else before
            if before != after:
                lost = Counter(before)
                lost.subtract(after)
                for known, times in lost.items():
                    self._external[known] += max(0, times)
            yield

    def _referred_to_now(self, number: int) -> Iterator[int]:
        in_module = self._is_in_module(number)
        for each in referents(self._objects[number]):
            known = self._numbers.get(id(each))
            if known is not None and (known < self._tasks or not in_module):
                yield known

    # propagate

    def mark_task(self, task: Task) -> None:
        """Mark one of the tasks as reachable."""
        known = self._numbers.get(id(task))
        if known is not None and known < self._tasks:
            self._mark(known)

    def propagate(self, tasks: Iterable[Task], awaited: AwaitedTasks) -> Iterator[None]:
        """
        Mark all that is reachable.

        Args:
            tasks: All tasks there are: what those wait for that are not in the graph is reachable.
            awaited: Gives the tasks that a task waits for.
        """
        for number, external in enumerate(self._external):
            if external > 0 and not self._is_in_chain[number]:
                self._mark(number)
            if not number % _CHUNK:
                yield
        for number, future in enumerate(self._futures):
            if future == -1 or is_main(self._objects[number]):
                self._mark(number)
            yield
        for task in tasks:
            self._mark_awaited(task, awaited)
            yield
        yield from self._mark_owners_of_empty_dicts()
        yield from self._propagate_marks(awaited)
        if HIDES_DICTS and self._external:
            for number in range(len(self._objects)):
                if not self._is_reachable[number] and self._has_dict_elsewhere(number):
                    self._mark(number)
                yield
            yield from self._propagate_marks(awaited)

    def _mark(self, number: int) -> None:
        if not self._is_reachable[number]:
            self._is_reachable[number] = 1
            self._to_propagate.append(number)

    def _mark_awaited(self, task: Task, awaited: AwaitedTasks) -> None:
        known = self._numbers.get(id(task))
        if is_done(task) or known is not None and not self._is_reachable[known]:
            return
        for each in awaited(task):
            self.mark_task(each)

    def _propagate_marks(self, awaited: AwaitedTasks) -> Iterator[None]:
        while self._to_propagate:
            number = self._to_propagate.pop()
            if self._kind[number] == TASK:
                self._mark_awaited(self._objects[number], awaited)
            self._propagate_one(number)
            yield

    def _propagate_one(self, number: int) -> None:
        kind = self._kind[number]
        for task in self._waiters.get(number, ()):
            self._mark(task)
        if number < self._tasks and self._futures[number] >= 0:
            self._mark(self._futures[number])
        for known in self._referred_to(number):
            # A reference to a task does not make it reachable if its holder only keeps it.
            if known >= self._tasks or kind >= SUSPENDED:
                self._mark(known)
        if kind >= INSTANCE:
            for known in self._referred_to(number):
                if self._kind[known] == CONTAINER:
                    self._propagate_container(number, known)

    def _propagate_container(self, owner: int, container: int) -> None:
        """Mark the tasks in an object's own dict, and those in all containers of a task group."""
        is_group = self._kind[owner] == TASK_GROUP
        if self._has_task[container] and (is_group or self._is_own_dict(owner, container)):
            self._mark_tasks_of(container)
        if is_group:
            for inner in self._referred_to(container):
                if self._has_task[inner] and self._kind[inner] == CONTAINER:
                    self._mark_tasks_of(inner)

    def _is_own_dict(self, owner: int, container: int) -> bool:
        return own_dict(self._objects[owner]) is self._objects[container]

    def _mark_tasks_of(self, number: int) -> None:
        for known in self._referred_to(number):
            if known < self._tasks:
                self._mark(known)

    def _mark_owners_of_empty_dicts(self) -> Iterator[None]:
        # From 3.13 on an object's dict may be a view of the object, with no references
        # of its own: the object is reachable from its dict.
        reachable = {number for number in self._empty_dicts if self._is_reachable[number]}
        for number in range(len(self._objects) if reachable else 0):
            if self._kind[number] >= INSTANCE:
                if not reachable.isdisjoint(self._referred_to(number)):
                    self._mark(number)
            yield

    def _has_dict_elsewhere(self, number: int) -> bool:
        """Return whether something else refers to an object's dict that is hidden (3.13)."""
        value = self._objects[number]
        if self._kind[number] < INSTANCE or not has_inline_values(value):
            return False
        own = own_dict(value)
        if own is None or self._numbers.get(id(own)) is not None:
            return False
        return sys.getrefcount(own) > 3  # the object's, ours and the argument's

    # Results

    def unreachable(self, found: list[tuple[Task, Any]]) -> Iterator[None]:
        """Add the unreachable tasks that still wait for the same future, with that."""
        for number in range(self._tasks):
            task, future = self._objects[number], self._futures[number]
            if not self._is_reachable[number] and future_of(task) is self._objects[future]:
                found.append((task, self._objects[future]))
            yield

    def reachable(self, tasks: list[Task]) -> list[Task]:
        """Return the reachable ones of the tasks it was started with."""
        return [task for number, task in enumerate(tasks) if self._is_reachable[number]]

    def clear(self) -> Iterator[None]:
        """Release all objects, few at a time: the last reference to many may be ours by now."""
        while self._objects:
            del self._objects[-_CHUNK:]
            yield
        yield from self._numbers.clear()
