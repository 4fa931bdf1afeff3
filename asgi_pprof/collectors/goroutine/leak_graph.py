"""
What waiting tasks refer to, as a graph that is walked, counted and brought to life.

Everything is done in steps, between which the caller may let others go on, and
nothing here runs code of the objects it looks at: types are told apart by
address, and no object is compared, hashed or asked for an attribute.
"""

from __future__ import annotations

import asyncio
import gc
import sys
import weakref
from array import array
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from contextvars import Context
from importlib.machinery import ExtensionFileLoader
from types import (
    AsyncGeneratorType,
    CodeType,
    CoroutineType,
    FrameType,
    FunctionType,
    GeneratorType,
    GetSetDescriptorType,
    MappingProxyType,
    MethodDescriptorType,
    ModuleType,
    WrapperDescriptorType,
)
from typing import Any

from asgi_pprof.runtime.frames import awaited, is_generator

Task = asyncio.Task[Any]
Awaited = Callable[[Task], Iterable[Task]]

_MAX_LENGTH = 10_000  # of a container: reading its references is not divided
_MAX_CHAIN = 100_000  # awaits followed before a chain counts as endless
_CHUNK = 1_000  # reference counts read at once, about 50 us
_SHARDS = 16  # a dict of 200,000 grows in one step of 6 ms

# 3.13 does not show the collector an object's dict that is but a view of it
# (Objects/dictobject.c, PyObject_VisitManagedDict), so it has to be asked for.
_HIDES_DICTS = sys.version_info[:2] == (3, 13)
_INLINE_VALUES = 1 << 2  # Include/object.h, Py_TPFLAGS_INLINE_VALUES
_BORROWS = sys.version_info >= (3, 14)  # see _referents

# What is done with an object, by its type.
SKIP = 0  # not walked, and explains nothing: lives
_PLAIN = 1  # holds a task without meaning to do anything with it
_FUTURE = 2  # refers to tasks in order to wake them
_TASK = 3
_FRAME = 4
_SUSPENDED = 5  # a coroutine or generator: its frame may cancel a task
_INSTANCE = 6  # may cancel a task it refers to
_NURSERY = 7  # may cancel the tasks in its containers, too
_FOREIGN = 8  # of an extension: may be reached by its address


def _addresses(*types: object) -> frozenset[int]:
    # A metaclass may define __eq__ and __hash__: types are told apart by address.
    return frozenset(map(id, types))


_ATOMS = _addresses(
    *(str, bytes, bytearray, memoryview, int, float, complex, bool, range, slice, object),
    *(type(None), type(Ellipsis), type(NotImplemented), CodeType, weakref.ref),
    *(WrapperDescriptorType, MethodDescriptorType, GetSetDescriptorType),
)
_PLAINS = _addresses(
    list, tuple, set, frozenset, dict, deque, OrderedDict, defaultdict, MappingProxyType, Context
)
_UNWALKED = _addresses(type, ModuleType, asyncio.AbstractEventLoop)
_TASKS = _addresses(asyncio.Task, getattr(asyncio.tasks, "_PyTask", None))
_FUTURES = _addresses(asyncio.Future, getattr(asyncio.futures, "_PyFuture", None))
_CHAINED = _addresses(CoroutineType, GeneratorType, AsyncGeneratorType)
_LENGTHS: dict[int, Callable[[Any], int]] = {
    id(each): each.__len__ for each in (list, tuple, set, frozenset, dict, deque)
}
_CARRIERS = {  # what stands between an await and the generator it drives
    "async_generator_asend",
    "async_generator_athrow",
    "anext_awaitable",
    "coroutine_wrapper",
}
_NURSERIES = {
    ("asyncio.taskgroups", "TaskGroup"),
    ("asyncio.tasks", "_GatheringFuture"),
    ("anyio._backends._asyncio", "CancelScope"),
    ("anyio._backends._asyncio", "TaskGroup"),
    ("aiohttp.helpers", "TimerContext"),
}


def future_of(task: Task) -> Any:
    if _TASKS.isdisjoint(map(id, _mro(type(task)))) or task.done():
        return None
    return object.__getattribute__(task, "_fut_waiter")


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

    def drop(self) -> Iterator[None]:
        for shard in self._shards:
            shard.clear()
            yield


class Kinds:
    """What is done with the objects of each type; runs no code of theirs."""

    def __init__(self) -> None:
        self._by_type: dict[int, int] = {}  # a metaclass may define a hash
        self._types: list[type] = []  # so that no address is used again

    def of(self, value: object) -> int:
        of = type(value)
        kind = self._by_type.get(id(of))
        if kind is None:
            kind = self._by_type[id(of)] = _kind(of)
            self._types.append(of)
        return kind


def _kind(of: type) -> int:
    mro = _mro(of)
    bases = set(map(id, mro))
    if id(of) in _ATOMS or not _UNWALKED.isdisjoint(bases):
        return SKIP
    if not _TASKS.isdisjoint(bases):
        return _TASK
    if id(of) in _FUTURES:
        return _FUTURE
    if id(of) in _PLAINS or _name(of).startswith("hamt"):
        return _PLAIN
    if id(of) in _CHAINED:
        return _SUSPENDED
    if of is FrameType:
        return _FRAME
    if any(_is_foreign(base) for base in mro):
        return _FOREIGN
    if any((_module(base), _name(base)) in _NURSERIES for base in mro):
        return _NURSERY
    return _INSTANCE


# A class may define these names itself, or its metaclass may.
_mro: Callable[[type], tuple[type, ...]] = type.__dict__["__mro__"].__get__
_base: Callable[[type], type | None] = type.__dict__["__base__"].__get__
_name: Callable[[type], str] = type.__dict__["__qualname__"].__get__
_flags: Callable[[type], int] = type.__dict__["__flags__"].__get__
_namespace: Callable[[type], Any] = type.__dict__["__dict__"].__get__
_own_module: Callable[[type], object] = type.__dict__["__module__"].__get__


def _module(of: type) -> str:
    name = _own_module(of)
    return name if type(name) is str else ""


def _is_foreign(of: type) -> bool:
    name = _module(of)
    top = name.partition(".")[0]
    if top in ("ctypes", "_ctypes"):
        return True
    if top in sys.stdlib_module_names:
        return False
    spec = getattr(sys.modules.get(name), "__spec__", None)
    return isinstance(getattr(spec, "loader", None), ExtensionFileLoader)


class Graph:
    """
    What tasks refer to, by numbers: the tasks come first, then all else as found.

    Keeps no containers in containers: 200,000 lists would set off collections
    of garbage longer than any slice.
    """

    def __init__(self, kinds: Kinds, modules: Addresses, max_objects: int) -> None:
        self._kinds = kinds
        self._modules = modules
        self._max_objects = max_objects
        self.is_cut = False
        self._objects: list[Any] = []
        self._numbers = Addresses()
        self._kind = bytearray()
        self._tasks = 0  # how many there are
        self._first_walked = 0
        self._roots = 0  # where the objects end that are walked wherever they are held
        self._awaits = array("q")  # each task's future, -1: one that lives
        self._waiters: dict[int, list[int]] = {}
        self._is_awaiting = bytearray()  # part of a task's own chain of awaits
        self._has_task = bytearray()  # refers to one of the tasks
        self._ends = array("q")  # where each object's references end in:
        self._references = array("q")
        self._explained = array("q")
        self._surplus = array("q")
        self._hollow: list[int] = []
        self._lives = bytearray()
        self._new: list[int] = []  # lives, its references do not yet

    def _add(self, value: object, kind: int) -> int:
        number = len(self._objects)
        self._numbers[id(value)] = number
        self._objects.append(value)
        self._kind.append(kind)
        self._explained.append(0)
        for flags in (self._is_awaiting, self._has_task, self._lives):
            flags.append(0)
        return number

    # Walking

    def start(self, waiting: list[tuple[Task, Any]]) -> Iterator[None]:
        """Take the tasks that still wait for the same, out of the list."""
        futures = []
        while waiting:
            task, future = waiting.pop()
            if future_of(task) is future:
                self._add(task, _TASK)
                futures.append(future)
            yield
        self._tasks = len(self._objects)
        futures.reverse()
        for number in range(self._tasks):
            self._awaits.append(self._add_future(futures.pop(), number))
            self._is_awaiting[number] = 1
            for each in suspended_chain(self._objects[number]):
                if self._numbers.get(id(each)) is None:
                    self._is_awaiting[self._add(each, self._kinds.of(each))] = 1
            yield
        self._roots = self._tasks

    def _add_future(self, future: Any, task: int) -> int:
        kind = self._kinds.of(future)
        known = self._numbers.get(id(future))
        if kind in (SKIP, _FOREIGN) or _is_done(future) or (kind == _TASK and known is None):
            return -1
        number = self._add(future, kind) if known is None else known
        self._waiters.setdefault(number, []).append(task)
        return number

    def start_held(self, tasks: list[Task], roots: Iterator[object]) -> Iterator[None]:
        """Take tasks that are not to be walked, and objects that live."""
        for task in tasks:
            self._awaits.append(self._add(task, _TASK))  # for nothing that is known here
        self._tasks = self._first_walked = len(tasks)
        self._ends.extend([0] * self._tasks)
        for each in roots:
            kind = self._kinds.of(each)
            if kind not in (SKIP, _TASK) and self._numbers.get(id(each)) is None:
                self._enliven(self._add(each, kind))
            yield
        self._roots = len(self._objects)

    def walk(self) -> Iterator[None]:
        """Find all that is referred to, breadth first: what is near matters most."""
        number = self._first_walked
        while number < len(self._objects):
            self._references.extend(self._walk_one(number))
            self._ends.append(len(self._references))
            number += 1
            yield

    def _walk_one(self, number: int) -> array[int]:
        kind = self._kind[number]
        value = self._objects[number]
        found = array("q")
        if kind == _TASK and number >= self._tasks:
            self._enliven(number)
            return found
        in_module = self._is_in_module(number)
        referents = _referents(value)
        for each in referents:
            known = self._numbers.get(id(each))
            if known is None and not in_module:
                known = self._discover(each)
            if known is None or in_module and known >= self._tasks:
                continue
            found.append(known)
            self._explained[known] += 1
            if known < self._tasks:
                self._has_task[number] = 1
            if self._is_awaiting[number] and self._kind[known] == _FRAME:
                self._is_awaiting[known] = 1
        if in_module or kind == _FOREIGN:
            self._enliven(number)
        if not referents and type(value) is dict and value:
            self._hollow.append(number)
        return found

    def _is_in_module(self, number: int) -> bool:
        if number < self._roots or self._is_awaiting[number]:
            return False
        return id(self._objects[number]) in self._modules

    def _discover(self, value: object) -> int | None:
        kind = self._kinds.of(value)
        if kind == SKIP or not (gc.is_tracked(value) or type(value) is dict):
            return None
        if len(self._objects) >= self._max_objects:
            self.is_cut = True
            return None
        return self._add(value, kind)

    # Counting

    def count(self) -> Iterator[None]:
        """Compare how often each object is referred to with what the walk explains."""
        for start in range(0, len(self._objects), _CHUNK):
            values = self._objects[start : start + _CHUNK]
            counts = list(map(sys.getrefcount, values))
            for number, count in enumerate(counts, start):
                self._surplus.append(count - _OUR_COUNT - self._explained[number])
            for number, refs in enumerate(map(weakref.getweakrefcount, values), start):
                if refs and not self._is_weakly_held(number):
                    self._enliven(number)
            del values
            yield

    def _is_weakly_held(self, number: int) -> bool:
        # Registries of tasks, of the loop's asynchronous generators and of waits
        # that are timed hold weakly what they cannot wake.
        return (
            self._is_awaiting[number] == 1
            or self._kind[number] == _SUSPENDED
            or number in self._waiters
        )

    def recount(self) -> Iterator[None]:
        """
        Take back what references explained that are there no longer.

        One that was there before the counts and is after them was there when
        they were taken; any other may be somebody's outside, mistaken for it.
        """
        for number in range(len(self._objects)):
            before = self._slice(number)
            after = array("q", self._still(number)) if before else before
            if before != after:
                lost = Counter(before)
                lost.subtract(after)
                for known, times in lost.items():
                    self._surplus[known] += max(0, times)
            yield

    def _still(self, number: int) -> Iterator[int]:
        in_module = self._is_in_module(number)
        for each in _referents(self._objects[number]):
            known = self._numbers.get(id(each))
            if known is not None and (known < self._tasks or not in_module):
                yield known

    # Living

    def enliven_task(self, task: Task) -> None:
        known = self._numbers.get(id(task))
        if known is not None and known < self._tasks:
            self._enliven(known)

    def enliven(self, tasks: Iterable[Task], awaited: Awaited) -> Iterator[None]:
        """Mark all that lives, given all tasks there are."""
        for number, surplus in enumerate(self._surplus):
            if surplus > 0 and not self._is_awaiting[number]:
                self._enliven(number)
            if not number % _CHUNK:
                yield
        for number, future in enumerate(self._awaits):
            if future == -1 or _is_main(self._objects[number]):
                self._enliven(number)
            yield
        for task in tasks:
            self._enliven_children(task, awaited)
            yield
        yield from self._own_hollow()
        yield from self._spread_all(awaited)
        if _HIDES_DICTS and self._surplus:
            for number in range(len(self._objects)):
                if not self._lives[number] and self._is_viewed(number):
                    self._enliven(number)
                yield
            yield from self._spread_all(awaited)

    def _spread_all(self, awaited: Awaited) -> Iterator[None]:
        while self._new:
            number = self._new.pop()
            if self._kind[number] == _TASK:
                self._enliven_children(self._objects[number], awaited)
            self._spread(number)
            yield

    def _enliven(self, number: int) -> None:
        if not self._lives[number]:
            self._lives[number] = 1
            self._new.append(number)

    def _enliven_children(self, task: Task, awaited: Awaited) -> None:
        known = self._numbers.get(id(task))
        if task.done() or known is not None and not self._lives[known]:
            return
        for child in awaited(task):
            self.enliven_task(child)

    def _spread(self, number: int) -> None:
        kind = self._kind[number]
        for task in self._waiters.get(number, ()):
            self._enliven(task)
        if number < self._tasks and self._awaits[number] >= 0:
            self._enliven(self._awaits[number])
        for known in self._slice(number):
            if known >= self._tasks:
                self._enliven(known)
            elif kind >= _SUSPENDED:
                self._enliven(known)
        if kind >= _INSTANCE:
            for known in self._slice(number):
                if self._kind[known] == _PLAIN:
                    self._spread_container(number, known)

    def _spread_container(self, owner: int, container: int) -> None:
        """Go on to the tasks in an object's own dict, and in all containers of a nursery."""
        is_nursery = self._kind[owner] == _NURSERY
        if self._has_task[container] and (is_nursery or self._is_own_dict(owner, container)):
            for known in self._slice(container):
                if known < self._tasks:
                    self._enliven(known)
        if is_nursery:
            for inner in self._slice(container):
                if self._has_task[inner] and self._kind[inner] == _PLAIN:
                    for known in self._slice(inner):
                        if known < self._tasks:
                            self._enliven(known)

    def _is_own_dict(self, owner: int, container: int) -> bool:
        return _own_dict(self._objects[owner]) is self._objects[container]

    def _is_viewed(self, number: int) -> bool:
        value = self._objects[number]
        if self._kind[number] < _INSTANCE or not _flags(type(value)) & _INLINE_VALUES:
            return False
        own = _own_dict(value)
        if own is None or self._numbers.get(id(own)) is not None:
            return False
        return sys.getrefcount(own) > 3  # the object's, ours and the argument

    def _own_hollow(self) -> Iterator[None]:
        # From 3.13 on an object's dict may be a view of the object, with no
        # references of its own: who has the dict then has the object.
        hollow = {number for number in self._hollow if self._lives[number]}
        for number in range(len(self._objects) if hollow else 0):
            if self._kind[number] >= _INSTANCE and not hollow.isdisjoint(self._slice(number)):
                self._enliven(number)
            yield

    def _slice(self, number: int) -> array[int]:
        start = self._ends[number - 1] if number else 0
        return self._references[start : self._ends[number]]

    # Results

    def leaked(self, found: list[tuple[Task, Any]]) -> Iterator[None]:
        """Add the tasks that do not live, and still wait for the same, with their futures."""
        for number in range(self._tasks):
            task, future = self._objects[number], self._awaits[number]
            if not self._lives[number] and future_of(task) is self._objects[future]:
                found.append((task, self._objects[future]))
            yield

    def living(self, tasks: list[Task]) -> list[Task]:
        return [task for number, task in enumerate(tasks) if self._lives[number]]

    def drop(self) -> Iterator[None]:
        """Let everything go: the last reference to many objects may be ours by now."""
        while self._objects:
            del self._objects[-_CHUNK:]
            yield
        yield from self._numbers.drop()


def _count_of_ours() -> int:
    objects = [object()]
    values = objects[0:1]
    return list(map(sys.getrefcount, values))[0]


_OUR_COUNT = _count_of_ours()


def _referents(value: Any) -> list[Any]:
    """
    Return what an object holds, each as often as it holds it, or nothing.

    Never too much: from 3.14 on the collector is shown references that a frame
    only borrows from its own variables (Include/internal/pycore_stackref.h).
    Running frames have those, and frames that stand at a plain `yield`; no
    borrowing goes beyond an await (Python/flowgraph.c, optimize_load_fast).
    """
    of = type(value)
    if id(of) in _CHAINED:
        if _is_running(value):
            return []
        referents = gc.get_referents(value)
        if _BORROWS and awaited(value) is None:
            return list({id(each): each for each in referents}.values())
        return referents
    while of is not object:
        length = _LENGTHS.get(id(of))
        if length is not None and length(value) > _MAX_LENGTH:
            return []
        of = _base(of) or object
    return gc.get_referents(value)


def _is_running(value: Any) -> bool:
    if type(value) is CoroutineType:
        return bool(value.cr_running)
    if type(value) is GeneratorType:
        return bool(value.gi_running)
    # It counts as running while it waits, too.
    return bool(value.ag_running) and value.ag_await is None


def suspended_chain(task: Task) -> Iterator[Any]:
    """Yield the coroutines and generators of a task that is suspended, outermost first."""
    awaitable: object = task.get_coro()
    for _ in range(_MAX_CHAIN):
        while type(awaitable).__name__ in _CARRIERS:
            awaitable = next(
                (each for each in gc.get_referents(awaitable) if _is_driven(each)), None
            )
        if not is_generator(awaitable):
            return
        yield awaitable
        awaitable = awaited(awaitable)


def _own_dict(value: object) -> object | None:
    for base in _mro(type(value)):
        own = _namespace(base).get("__dict__")
        if type(own) is GetSetDescriptorType:
            return own.__get__(value)  # type: ignore[no-any-return]
    return None


def _is_driven(value: object) -> bool:
    return is_generator(value) or type(value).__name__ in _CARRIERS


def _is_done(future: Any) -> bool:
    if _FUTURES.isdisjoint(map(id, _mro(type(future)))):
        return False
    return bool(object.__getattribute__(future, "_state") != "PENDING")


def _is_main(task: Task) -> bool:
    """Whether a loop runs until this task is done: whoever runs it may end it."""
    for callback in object.__getattribute__(task, "_callbacks") or ():
        function = callback[0]
        if type(function) is FunctionType or "cython_function" in _name(type(function)):
            if "run_until_complete" in function.__qualname__:
                return True
    return False
