"""
Live frames and coroutine chains as stacks of locations, leaf first.

Frames are read and let go within one call: a kept frame keeps its locals alive.
"""

from __future__ import annotations

import gc
import sys
from bisect import bisect_right
from collections import deque
from collections.abc import Iterator, Sequence
from types import (
    AsyncGeneratorType,
    CodeType,
    CoroutineType,
    FrameType,
    GeneratorType,
    ModuleType,
)
from typing import Any, cast

from asgi_pprof.native import native
from asgi_pprof.profile import Function, Location, Stack, pseudo_location

MAX_DEPTH = 128  # as Go's profstackdepth; go tool pprof -top reads deeper ones, slowly
TRUNCATED = pseudo_location("truncated: outer frames not recorded")
UNKNOWN = pseudo_location("unknown")

_MAX_CHAIN = 100_000  # awaits followed before a chain counts as endless

wrappers: dict[int, CodeType] = {}
"""Code of ours that stands around what it calls, by identity: no stack shows it."""

RawStack = tuple[tuple[CodeType, int], ...]
"""Codes and bytecode offsets, leaf first: what is cheap to note and to name later."""


def current_frames() -> dict[int, FrameType]:
    """
    Return the innermost frame of each thread, by the thread's number.

    Clear it after use: it holds the caller's own frame, and so itself.

    On 3.11 collecting garbage inside of `sys._current_frames` can hang the process:
    see `native_current_frames` in the C core. 3.12 collects elsewhere.
    """
    if sys.version_info >= (3, 12):
        return sys._current_frames()
    if native:
        return cast("dict[int, FrameType]", native.current_frames())
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        return sys._current_frames()
    finally:
        if was_enabled:
            gc.enable()


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
        stack = tuple(
            self.instruction(code, lasti)
            for code, lasti in raw[:MAX_DEPTH]
            if id(code) not in wrappers
        )
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
        if id(frame.f_code) not in wrappers:
            stack.append(symbols.frame(frame))
        frame = None if frame is until else frame.f_back
    return tuple(stack)


Chain = Sequence[tuple[object, FrameType | None]]
"""Awaitables, outermost first, each with its frame if it has one."""


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
        symbols.frame(frame) if frame is not None else _frameless(awaitable)
        for awaitable, frame in reversed(chain)
    ]
    if len(stack) > MAX_DEPTH:
        stack[MAX_DEPTH] = TRUNCATED
    return tuple(stack)


def _awaited(awaitable: object) -> Iterator[tuple[object, FrameType | None]]:
    outermost = awaitable
    for _ in range(_MAX_CHAIN):
        if isinstance(awaitable, CoroutineType):
            frame, inner = awaitable.cr_frame, awaitable.cr_await
        elif isinstance(awaitable, GeneratorType):
            frame, inner = awaitable.gi_frame, awaitable.gi_yieldfrom
        elif isinstance(awaitable, AsyncGeneratorType):
            frame, inner = awaitable.ag_frame, awaitable.ag_await
        elif (carried := _carried(awaitable)) is not None:
            awaitable = carried
            continue
        elif hasattr(type(awaitable), "cr_await"):  # Cython's, and so uvloop's
            coroutine = cast("CoroutineType[Any, Any, Any]", awaitable)
            frame, inner = coroutine.cr_frame, coroutine.cr_await
        else:
            # None has not begun or is about to run; what a future is for is another question.
            if not (awaitable is None or awaitable is outermost or _is_future(awaitable)):
                yield awaitable, None
            return
        if frame is not None and id(frame.f_code) not in wrappers:
            yield awaitable, frame
        awaitable = inner


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
