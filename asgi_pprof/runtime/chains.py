"""
Chains of awaits: what a suspended coroutine awaits, what that awaits, and so on.

The frames of a greenlet that stands between two coroutines are part of the chain.

Of a frame only its code and its bytecode offset are kept: a kept frame keeps its locals alive.
"""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Iterator, Sequence
from types import CodeType
from typing import Any, NamedTuple

from asgi_pprof.runtime import type_info
from asgi_pprof.runtime.frames import (
    MAX_DEPTH,
    awaited,
    generator_frame,
    is_generator,
    unwrapped,
)
from asgi_pprof.runtime.greenlets import greenlet_frames, runs_greenlet

_MAX_CHAIN = 100_000  # awaits followed before a chain counts as endless


def code_of(function: object) -> CodeType | None:
    """Return a function's code; None for what is not written in Python."""
    code = getattr(function, "__code__", None)
    return code if isinstance(code, CodeType) else None


class WrapperCodes:
    """The code of our wrappers. No stack shows frames that run it."""

    def __init__(self) -> None:
        self.by_id: dict[int, CodeType] = {}  # kept alive, so that no id is used twice

    def add(self, function: object) -> None:
        """Add a function's code, if it is written in Python."""
        code = code_of(function)
        if code is not None:
            self.by_id[id(code)] = code


wrappers = WrapperCodes()


class Awaited(NamedTuple):
    """
    An awaitable of a chain and where it is suspended; no code if it has no frame.

    Of a frame of a greenlet the awaitable is None.
    """

    awaitable: object
    code: CodeType | None = None
    lasti: int = 0


Chain = Sequence[Awaited]
"""Awaitables, outermost first."""


def await_chain(awaitable: object) -> Chain:
    """
    Return what a suspended coroutine awaits, what that awaits, and so on, outermost first.

    Of a chain longer than `MAX_DEPTH` only the innermost `MAX_DEPTH` + 1. The
    future at the end is left out; () if there is nothing else. Proxies and
    Cython's coroutines, and so uvloop's, are followed, which may run their code, and
    so may reading a greenlet of a class of the application's.
    """
    return list(deque(_places(awaitable), MAX_DEPTH + 1))


def _places(outermost: object) -> Iterator[Awaited]:
    for awaitable in awaitables(outermost, runs_code=True):
        if is_generator(awaitable):
            place = generator_frame(awaitable)
        elif _is_cython_coroutine(awaitable):
            place = _cython_frame(awaitable)
        else:
            # None: it has not begun, or is about to run. A future is not part of the chain.
            if not (awaitable is None or awaitable is outermost or _is_future(awaitable)):
                yield Awaited(awaitable)
            return
        if place is None:
            continue
        if id(place[0]) not in wrappers.by_id:
            yield Awaited(awaitable, *place)
        if runs_greenlet(place[0]) and is_generator(awaitable):
            for inner in reversed(greenlet_frames(awaitable)):
                if id(inner[0]) not in wrappers.by_id:
                    yield Awaited(None, *inner)


def awaitables(awaitable: object, *, runs_code: bool = False) -> Iterator[object]:
    """
    Yield an awaitable, what it awaits, and so on: coroutines and generators, then what ends them.

    Iterators that only drive a coroutine or generator are skipped. No code of the
    awaitables runs, unless `runs_code`: then proxies are unwrapped and Cython's
    coroutines followed; else these end the chain.
    """
    for _ in range(_MAX_CHAIN):
        if runs_code:
            awaitable = unwrapped(awaitable)
        if is_generator(awaitable):
            yield awaitable
            awaitable = awaited(awaitable)
        elif (driven := _driven(awaitable, runs_code)) is not None:
            awaitable = driven
        else:
            yield awaitable
            if not (runs_code and _is_cython_coroutine(awaitable)):
                return
            awaitable = _awaited_by_cython(awaitable)


_DRIVERS = {
    # Iterators between an await and the coroutine or generator that they drive.
    # None of them tells which: the garbage collector is asked for what they refer to.
    "async_generator_asend",
    "async_generator_athrow",
    "anext_awaitable",
    "coroutine_wrapper",
}


def _is_driver(awaitable: object) -> bool:
    return type_info.name(type(awaitable)) in _DRIVERS


def _driven(awaitable: object, runs_code: bool) -> object | None:
    if not _is_driver(awaitable):
        return None
    for referent in gc.get_referents(awaitable):
        each = unwrapped(referent) if runs_code else referent
        if is_generator(each) or _is_driver(each) or runs_code and _is_cython_coroutine(each):
            return each
    return None


def _is_cython_coroutine(awaitable: object) -> bool:
    return hasattr(type(awaitable), "cr_await")  # as CPython's, which are told apart before


def _cython_frame(coroutine: Any) -> tuple[CodeType, int] | None:
    frame = coroutine.cr_frame  # made by Cython for this one coroutine
    return None if frame is None else (frame.f_code, frame.f_lasti)


def _awaited_by_cython(coroutine: Any) -> object:
    return None if coroutine.cr_running else coroutine.cr_await


def _is_future(awaitable: object) -> bool:
    kind = type(awaitable)
    return hasattr(kind, "_asyncio_future_blocking") or kind.__name__ == "FutureIter"
