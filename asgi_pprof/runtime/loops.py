"""
The event loops that run in this process, each with its thread and its running task.

How: the C core reads them from the states of the threads. Without it a loop is
found where a thread's frames hold it in a variable of a usual name.

What it costs: a microsecond. Without the C core 2 to 3 ms to read the frames of
50 threads.

What it misses: nothing with the C core; without it, loops under other names.

Source: CPython, Modules/_asynciomodule.c.
"""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any, NamedTuple, TypeAlias, cast

from asgi_pprof.native.core import native
from asgi_pprof.runtime.frames import frame_local, frame_objects

_Task: TypeAlias = "asyncio.Task[Any]"
_LOOP_NAMES = ("self", "loop", "runner", "_loop", "event_loop")


class RunningLoop(NamedTuple):
    """An event loop, the thread that runs it, and its running task; None between two tasks."""

    thread_ident: int
    loop: asyncio.AbstractEventLoop
    task: _Task | None


def running_loops() -> list[RunningLoop]:
    """Return the loop each thread runs now, the calling thread's included."""
    own = asyncio._get_running_loop()
    if native:
        rows = native.running_loops(own)
        if rows is None:  # not known; frame objects are only for where there is no C core
            rows = [] if own is None else [(threading.get_ident(), own, None)]
    else:
        with frame_objects(sys._getframe()) as frames:
            rows = [(*each, None) for each in _seen_in_frames(own, frames)]
    # The task of a row without one is known to asyncio, up to 3.13 from a dict of its module.
    return [RunningLoop(ident, loop, task or _current_task(loop)) for ident, loop, task in rows]


def _current_task(loop: asyncio.AbstractEventLoop) -> _Task | None:
    return asyncio.current_task(loop)


def _seen_in_frames(
    own: asyncio.AbstractEventLoop | None, frames: dict[int, FrameType]
) -> list[tuple[int, asyncio.AbstractEventLoop]]:
    """
    Return the threads and the loops they run, as their stacks show them.

    asyncio's loop is the `self` of its `run_forever`; any other (uvloop) is found
    where `asyncio.Runner` or the code that called it holds it. A thread may also hold
    loops that another runs: asyncio's know their thread, and of others a runner's
    loop counts before that of a variable.
    """
    calling = threading.get_ident()
    found: dict[int, tuple[int, asyncio.AbstractEventLoop]] = {}
    if own is not None:
        found[id(own)] = calling, own
    guesses: list[tuple[int, asyncio.AbstractEventLoop]] = []
    for ident, frame in frames.items():
        if ident != calling:
            for loop, is_certain in _loops_of(frame):
                if _is_run_by(loop, ident):
                    if is_certain:
                        found.setdefault(id(loop), (ident, loop))
                    guesses.append((ident, loop))
    for ident, loop in guesses:
        found.setdefault(id(loop), (ident, loop))
    return list(found.values())


def _is_run_by(loop: asyncio.AbstractEventLoop, ident: int) -> bool:
    try:
        return loop.is_running() and getattr(loop, "_thread_id", ident) == ident
    except Exception:  # another thread is just creating it
        return False


def _loops_of(frame: FrameType | None) -> Iterator[tuple[asyncio.AbstractEventLoop, bool]]:
    while frame is not None:
        for name in _LOOP_NAMES:
            value = frame_local(frame, name)
            # By type(): isinstance() asks the object itself, which may be a proxy.
            is_runner = issubclass(type(value), asyncio.Runner)
            if is_runner:
                value = getattr(value, "_loop", None)
            if issubclass(type(value), asyncio.AbstractEventLoop):
                yield cast(asyncio.AbstractEventLoop, value), is_runner
        frame = frame.f_back
