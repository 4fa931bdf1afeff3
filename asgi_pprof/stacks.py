"""
Live frames and coroutine chains as stacks of locations, leaf first.

Nothing is kept of a frame but its code and where it was: a kept frame keeps its locals alive.
"""

from __future__ import annotations

import gc
import sys
from bisect import bisect_right
from collections import deque
from collections.abc import Iterator, Sequence
from types import AsyncGeneratorType, CodeType, CoroutineType, GeneratorType, ModuleType
from typing import Any, NamedTuple, cast

from asgi_pprof.profile import Function, Location, Stack, pseudo_location
from asgi_pprof.runtime.frames import MAX_DEPTH as MAX_DEPTH
from asgi_pprof.runtime.frames import RawStack as RawStack
from asgi_pprof.runtime.frames import awaited, generator_frame, is_generator, unwrapped
from asgi_pprof.runtime.frames import capture as capture
from asgi_pprof.runtime.frames import current_frames as current_frames

TRUNCATED = pseudo_location("truncated: outer frames not recorded")
UNKNOWN = pseudo_location("unknown")

_MAX_CHAIN = 100_000  # awaits followed before a chain counts as endless

wrappers: dict[int, CodeType] = {}
"""Code of ours that stands around what it calls, by identity: no stack shows it."""


class Symbols:
    """
    Names for code, remembered for the length of one collection.

    Codes are remembered by identity and kept alive meanwhile: equal code
    objects of different files compare equal.
    """

    def __init__(self) -> None:
        self._modules = _module_names()
        self._functions: dict[int, tuple[CodeType, Function]] = {}
        self._lines: dict[int, tuple[list[int], list[int]]] = {}

    def function(self, code: CodeType) -> Function:
        """Return a code's function, named after the module where that is loaded."""
        known = self._functions.get(id(code))
        if known is None:
            name = self.qualify(code.co_filename, code.co_qualname)
            known = code, Function(name, code.co_filename, code.co_firstlineno)
            self._functions[id(code)] = known
        return known[1]

    def qualify(self, filename: str, qualname: str) -> str:
        """Return the name with the module of the file in front, if one is loaded from it."""
        module = self._modules.get(filename)
        return f"{module}.{qualname}" if module else qualname

    def instruction(self, code: CodeType, lasti: int) -> Location:
        """Return the location of a bytecode offset, as `frame.f_lasti` gives it."""
        if id(code) not in self._lines:
            self.function(code)  # keeps the code alive, and with it the id
            ranges = [(start, line) for start, _, line in code.co_lines() if line is not None]
            self._lines[id(code)] = (
                [start for start, _ in ranges],
                [line for _, line in ranges],
            )
        starts, lines = self._lines[id(code)]
        index = bisect_right(starts, lasti) - 1
        line = lines[index] if index >= 0 else code.co_firstlineno
        return Location(self.function(code), line)

    def stack(self, raw: RawStack) -> Stack:
        """Return the locations of a captured stack, with the mark of truncation if it was cut."""
        stack = tuple(
            self.instruction(code, lasti)
            for code, lasti in raw[:MAX_DEPTH]
            if id(code) not in wrappers
        )
        return (*stack, TRUNCATED) if len(raw) > MAX_DEPTH else stack


def _module_names() -> dict[str, str]:
    names: dict[str, str] = {}
    # A copy, which nobody else changes: making pairs of the items may collect garbage (3.11).
    for name, module in sys.modules.copy().items():
        # Asking the object itself could load a lazy module, or a proxy of one.
        if issubclass(type(module), ModuleType):
            filename = object.__getattribute__(module, "__dict__").get("__file__")
            if isinstance(filename, str):
                names.setdefault(filename, name)
    return names


class Awaited(NamedTuple):
    """An awaitable of a chain and where it is suspended; no code if it has no frame."""

    awaitable: object
    code: CodeType | None = None
    lasti: int = 0


Chain = Sequence[Awaited]
"""Awaitables, outermost first."""


def await_chain(awaitable: object) -> Chain:
    """
    Return what a suspended coroutine awaits, and what that awaits, to the end.

    Of a chain longer than `MAX_DEPTH` the innermost part, and one more. Without
    the future at the end; () if there is only that.
    """
    return list(deque(_awaited(awaitable), MAX_DEPTH + 1))


def chain_stack(chain: Chain, symbols: Symbols) -> Stack:
    """Return where the awaitables of a chain wait, leaf first, at most `MAX_DEPTH` locations."""
    stack = [
        _frameless(each.awaitable)
        if each.code is None
        else symbols.instruction(each.code, each.lasti)
        for each in reversed(chain)
    ]
    if len(stack) > MAX_DEPTH:
        stack[MAX_DEPTH] = TRUNCATED
    return tuple(stack)


def _awaited(awaitable: object) -> Iterator[Awaited]:
    outermost = awaitable
    for _ in range(_MAX_CHAIN):
        awaitable = unwrapped(awaitable)
        if is_generator(awaitable):
            place, inner = generator_frame(awaitable), awaited(awaitable)
        elif (carried := _carried(awaitable)) is not None:
            awaitable = carried
            continue
        elif hasattr(type(awaitable), "cr_await"):
            place, inner = _of_cython(awaitable)
        else:
            # None has not begun or is about to run; what a future is for is another question.
            if not (awaitable is None or awaitable is outermost or _is_future(awaitable)):
                yield Awaited(awaitable)
            return
        if place is not None and id(place[0]) not in wrappers:
            yield Awaited(awaitable, *place)
        awaitable = inner


def _of_cython(coroutine: Any) -> tuple[tuple[CodeType, int] | None, object]:
    """Return where a coroutine of Cython's, and so uvloop's, is, and what it awaits."""
    frame = coroutine.cr_frame  # of its own making, and nobody else's
    inner = None if coroutine.cr_running else coroutine.cr_await
    return None if frame is None else (frame.f_code, frame.f_lasti), inner


def _is_future(awaitable: object) -> bool:
    kind = type(awaitable)
    return hasattr(kind, "_asyncio_future_blocking") or kind.__name__ == "FutureIter"


def _frameless(awaitable: object) -> Location:
    """Return a place for an awaitable without frames: an iterator that is no generator."""
    kind = type(awaitable)
    return pseudo_location(f"{kind.__module__}.{kind.__qualname__}")


_CARRIERS = {
    # What stands between an await and the coroutine or generator it drives;
    # none of them tells what it carries, so the collector's view is asked.
    "async_generator_asend",
    "async_generator_athrow",
    "anext_awaitable",
    "coroutine_wrapper",
}


def _carried(awaitable: object) -> object | None:
    if type(awaitable).__name__ not in _CARRIERS:
        return None
    for referent in gc.get_referents(awaitable):
        if isinstance(referent, CoroutineType | GeneratorType | AsyncGeneratorType):
            return referent
        if hasattr(type(referent), "cr_await"):
            return cast(object, referent)
        if type(referent).__name__ in _CARRIERS:
            return cast(object, referent)
    return None
