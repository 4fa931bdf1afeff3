"""
Chains of awaits: what a suspended coroutine awaits, what that awaits, to the end.

Nothing is kept of a frame but its code and where it was: a kept frame keeps its locals alive.
"""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Iterator, Sequence
from types import AsyncGeneratorType, CodeType, CoroutineType, GeneratorType
from typing import Any, NamedTuple, cast

from asgi_pprof.runtime.frames import MAX_DEPTH, awaited, generator_frame, is_generator, unwrapped

_MAX_CHAIN = 100_000  # awaits followed before a chain counts as endless


class WrapperCodes:
    """The code of our wrappers. No stack shows frames that run it."""

    def __init__(self) -> None:
        self.by_id: dict[int, CodeType] = {}  # kept alive, so that no id is used twice

    def add(self, function: object) -> None:
        """Add a function's code, if it is written in Python."""
        code = getattr(function, "__code__", None)
        if isinstance(code, CodeType):
            self.by_id[id(code)] = code


wrappers = WrapperCodes()


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
        if place is not None and id(place[0]) not in wrappers.by_id:
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
