"""
Live frames and coroutine chains as stacks of locations, leaf first.

Frames are read and let go within one call: a kept frame keeps its locals alive.
"""

from __future__ import annotations

import gc
import sys
from bisect import bisect_right
from collections import deque
from collections.abc import Iterator
from types import (
    AsyncGeneratorType,
    CodeType,
    CoroutineType,
    FrameType,
    GeneratorType,
    ModuleType,
)
from typing import cast

from asgi_pprof.profile import Function, Location, Stack, pseudo_location

MAX_DEPTH = 128  # as Go's profstackdepth; go tool pprof -top reads deeper ones, slowly
TRUNCATED = pseudo_location("truncated: outer frames not recorded")
UNKNOWN = pseudo_location("unknown")

_MAX_CHAIN = 100_000  # awaits followed before a chain counts as endless


RawStack = tuple[tuple[CodeType, int], ...]
"""Codes and bytecode offsets, leaf first: what is cheap to note and to name later."""


def capture(frame: FrameType | None) -> RawStack:
    """Return where a live frame and its callers are, for `Symbols.stack`; about 0.1 us a frame."""
    places: list[tuple[CodeType, int]] = []
    while frame is not None and len(places) <= MAX_DEPTH:  # one more shows that it was cut
        places.append((frame.f_code, frame.f_lasti))
        frame = frame.f_back
    return tuple(places)


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
        stack = tuple(self.instruction(code, lasti) for code, lasti in raw[:MAX_DEPTH])
        return (*stack, TRUNCATED) if len(raw) > MAX_DEPTH else stack

    def frame(self, frame: FrameType) -> Location:
        """Return where a live frame is now."""
        return Location(self.function(frame.f_code), frame.f_lineno or frame.f_code.co_firstlineno)


def _module_names() -> dict[str, str]:
    names: dict[str, str] = {}
    for name, module in list(sys.modules.items()):
        # Asking the object itself could load a lazy module, or a proxy of one.
        if issubclass(type(module), ModuleType):
            filename = object.__getattribute__(module, "__dict__").get("__file__")
            if isinstance(filename, str):
                names.setdefault(filename, name)
    return names


def call_stack(frame: FrameType | None, symbols: Symbols, until: FrameType | None = None) -> Stack:
    """
    Return the stack of a live frame, leaf first, at most `MAX_DEPTH` locations.

    Args:
        frame: The innermost frame.
        symbols: Where names come from.
        until: The outermost frame wanted; all of them if None.
    """
    stack: list[Location] = []
    while frame is not None:
        if len(stack) == MAX_DEPTH:
            stack.append(TRUNCATED)
            break
        stack.append(symbols.frame(frame))
        frame = None if frame is until else frame.f_back
    return tuple(stack)


def await_stack(awaitable: object, symbols: Symbols) -> Stack:
    """
    Return where a suspended coroutine waits, through all it awaits, leaf first.

    At most `MAX_DEPTH` locations, those nearest to the leaf. () for an
    awaitable with no frames, such as a future.
    """
    chain: deque[FrameType] = deque(maxlen=MAX_DEPTH + 1)
    chain.extend(_awaited_frames(awaitable))
    stack = [symbols.frame(frame) for frame in reversed(chain)]
    if len(stack) > MAX_DEPTH:
        stack[MAX_DEPTH] = TRUNCATED
    return tuple(stack)


def _awaited_frames(awaitable: object) -> Iterator[FrameType]:
    """Yield the frames of a chain of awaits, outermost first."""
    for _ in range(_MAX_CHAIN):
        if isinstance(awaitable, CoroutineType):
            frame, inner = awaitable.cr_frame, awaitable.cr_await
        elif isinstance(awaitable, GeneratorType):
            frame, inner = awaitable.gi_frame, awaitable.gi_yieldfrom
        elif isinstance(awaitable, AsyncGeneratorType):
            frame, inner = awaitable.ag_frame, awaitable.ag_await
        elif (carried := _carried(awaitable)) is not None:
            frame, inner = None, carried
        else:
            return
        if frame is not None:
            yield frame
        awaitable = inner


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
        if type(referent).__name__ in _CARRIERS:
            return cast(object, referent)
    return None
