"""References and states of objects, as the leak search reads them: it runs no code of theirs."""

from __future__ import annotations

import asyncio
import gc
import sys
from collections import deque
from collections.abc import Callable, Iterator
from types import CoroutineType, FunctionType, GeneratorType, GetSetDescriptorType
from typing import Any

from asgi_pprof.collectors.goroutine.object_kinds import FUTURES, TASKS
from asgi_pprof.runtime import type_info
from asgi_pprof.runtime.chains import awaitables
from asgi_pprof.runtime.frames import Generator, awaited, is_generator
from asgi_pprof.runtime.tasks import coroutine_of

Task = asyncio.Task[Any]

_MAX_LENGTH = 10_000  # of a container: its references are read in one go
_LENGTHS: dict[int, Callable[[Any], int]] = {
    id(each): each.__len__ for each in (list, tuple, set, frozenset, dict, deque)
}
# From 3.14 on a frame shows the collector references that it only borrows from its own
# variables (Include/internal/pycore_stackref.h).
_BORROWS = sys.version_info >= (3, 14)
# 3.13 does not show the collector an object's dict that is only a view of the object
# (Objects/dictobject.c, PyObject_VisitManagedDict), so it has to be asked for.
HIDES_DICTS = sys.version_info[:2] == (3, 13)
_INLINE_VALUES = 1 << 2  # Include/object.h, Py_TPFLAGS_INLINE_VALUES


def future_of(task: Task) -> Any:
    """
    Return what a task waits for, None if it is done, can run, or is no task of asyncio's.

    Unlike `tasks.waits_for` it asks neither the task nor the future for anything.
    """
    if not type_info.is_subclass(type(task), TASKS) or _state(task) != "PENDING":
        return None
    return object.__getattribute__(task, "_fut_waiter")


def is_done(future: Any) -> bool:
    """Return whether a future or task of asyncio's is done; False for any other object."""
    return type_info.is_subclass(type(future), FUTURES) and _state(future) != "PENDING"


def _state(future: Any) -> Any:
    return object.__getattribute__(future, "_state")


def is_main(task: Task) -> bool:
    """Return whether a loop runs until this task is done: the loop's caller may end it."""
    for callback in object.__getattribute__(task, "_callbacks") or ():
        function = callback[0]
        kind = type(function)
        if kind is FunctionType or "cython_function" in type_info.qualname(kind):
            if "run_until_complete" in function.__qualname__:
                return True
    return False


def suspended_chain(task: Task) -> Iterator[Generator]:
    """Yield the coroutines and generators of a task that is suspended, outermost first."""
    return filter(is_generator, awaitables(coroutine_of(task)))


def referents(value: Any) -> list[Any]:
    """
    Return what an object refers to, each as often as it holds a reference; or nothing.

    Never too much. A borrowed reference (3.14) is none that it holds: running
    frames have those, and frames that stand at a plain `yield`; none is borrowed
    across an await (Python/flowgraph.c, optimize_load_fast).
    """
    if is_generator(value):
        if _is_running(value):
            return []
        found = gc.get_referents(value)
        if _BORROWS and awaited(value) is None:
            return list({id(each): each for each in found}.values())
        return found
    of: type = type(value)
    while of is not object:
        length = _LENGTHS.get(id(of))
        if length is not None and length(value) > _MAX_LENGTH:
            return []
        of = type_info.base(of) or object
    return gc.get_referents(value)


def is_empty(value: Any) -> bool:
    """Return whether an object is a list, dict or the like without items."""
    length = _LENGTHS.get(id(type(value)))
    return length is not None and not length(value)


def _is_running(generator: Any) -> bool:
    if type(generator) is CoroutineType:
        return bool(generator.cr_running)
    if type(generator) is GeneratorType:
        return bool(generator.gi_running)
    # An asynchronous generator counts as running while it waits, too.
    return bool(generator.ag_running) and generator.ag_await is None


def own_dict(value: object) -> object | None:
    """Return an object's `__dict__`, None if it has none."""
    for each in type_info.mro(type(value)):
        own = type_info.namespace(each).get("__dict__")
        if type(own) is GetSetDescriptorType:
            return own.__get__(value)  # type: ignore[no-any-return]
    return None


def has_inline_values(value: object) -> bool:
    """Return whether an object may keep its attributes in itself, and its dict be a view."""
    return bool(type_info.flags(type(value)) & _INLINE_VALUES)


def _own_references() -> int:
    objects = [object()]
    values = objects[0:1]
    return list(map(sys.getrefcount, values))[0]


OWN_REFERENCES = _own_references()
"""What `sys.getrefcount` gives, mapped over part of a list, for an object of that list alone."""
