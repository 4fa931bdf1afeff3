"""
What the leak search does with an object, decided by its type alone.

Nothing here runs code of the objects or of their types.
"""

from __future__ import annotations

import asyncio
import sys
import weakref
from collections import OrderedDict, defaultdict, deque
from contextvars import Context
from importlib.machinery import ExtensionFileLoader
from traceback import FrameSummary, StackSummary
from types import (
    AsyncGeneratorType,
    CodeType,
    CoroutineType,
    FrameType,
    GeneratorType,
    GetSetDescriptorType,
    MappingProxyType,
    MethodDescriptorType,
    ModuleType,
    WrapperDescriptorType,
)
from typing import Any

from asgi_pprof.runtime import type_info

# In this order: the graph compares them.
SKIP = 0  # not traversed, so what it refers to has an external reference
CONTAINER = 1  # holds a task without meaning to do anything with it
FUTURE = 2  # refers to tasks in order to wake them
TASK = 3
FRAME = 4
SUSPENDED = 5  # a coroutine or generator: its frame may cancel a task
INSTANCE = 6  # may cancel a task it refers to
TASK_GROUP = 7  # may also cancel the tasks in its containers
FOREIGN = 8  # of an extension, which may keep the addresses of objects: reachable

TASKS = type_info.addresses(asyncio.Task, getattr(asyncio.tasks, "_PyTask", None))
FUTURES = type_info.addresses(asyncio.Future, getattr(asyncio.futures, "_PyFuture", None))
_ATOMS = type_info.addresses(
    *(str, bytes, bytearray, memoryview, int, float, complex, bool, range, slice, object),
    *(type(None), type(Ellipsis), type(NotImplemented), CodeType, weakref.ref),
    *(WrapperDescriptorType, MethodDescriptorType, GetSetDescriptorType),
    # In debug mode each task has a traceback of some hundred objects that hold only strings.
    *(FrameSummary, StackSummary),
)
_CONTAINERS = type_info.addresses(
    list, tuple, set, frozenset, dict, deque, OrderedDict, defaultdict, MappingProxyType, Context
)
_SKIPPED = type_info.addresses(type, ModuleType, asyncio.AbstractEventLoop)
_GENERATORS = type_info.addresses(CoroutineType, GeneratorType, AsyncGeneratorType)
_TASK_GROUPS = {
    ("asyncio.taskgroups", "TaskGroup"),
    ("asyncio.tasks", "_GatheringFuture"),
    ("anyio._backends._asyncio", "CancelScope"),
    ("anyio._backends._asyncio", "TaskGroup"),
    ("aiohttp.helpers", "TimerContext"),
}


class ObjectKinds:
    """The kinds of objects, remembered by type."""

    def __init__(self) -> None:
        self._by_type: dict[int, int] = {}  # by address: a metaclass may define a hash
        self._types: list[type] = []  # kept alive, so that no address is used again

    def of(self, value: object) -> int:
        """Return the kind of an object."""
        of = type(value)
        kind = self._by_type.get(id(of))
        if kind is None:
            kind = self._by_type[id(of)] = _kind(of)
            self._types.append(of)
        return kind

    def without_known_skip(self, values: list[Any]) -> list[Any]:
        """Return the objects without those, most of all, whose type is known to be skipped."""
        by_type = self._by_type
        return [each for each in values if by_type.get(id(type(each))) != SKIP]


def _kind(of: type) -> int:
    if id(of) in _ATOMS or type_info.is_subclass(of, _SKIPPED):
        return SKIP
    if type_info.is_subclass(of, TASKS):
        return TASK
    if id(of) in FUTURES:
        return FUTURE
    if id(of) in _CONTAINERS or type_info.qualname(of).startswith("hamt"):
        return CONTAINER
    if id(of) in _GENERATORS:
        return SUSPENDED
    if of is FrameType:
        return FRAME
    bases = type_info.mro(of)
    if any(_is_foreign(base) for base in bases):
        return FOREIGN
    if any((type_info.module(base), type_info.qualname(base)) in _TASK_GROUPS for base in bases):
        return TASK_GROUP
    return INSTANCE


def _is_foreign(of: type) -> bool:
    name = type_info.module(of)
    top = name.partition(".")[0]
    if top in ("ctypes", "_ctypes"):
        return True
    if top in sys.stdlib_module_names:
        return False
    spec = getattr(sys.modules.get(name), "__spec__", None)
    return isinstance(getattr(spec, "loader", None), ExtensionFileLoader)
