"""
Which event loops run, and which tasks they have: all of the process, not one's own.

What is measured: the loop each thread runs now with its running task, and every
task that is registered with asyncio, of any loop and class.

How: up to CPython 3.13 asyncio registers all tasks in two sets of its module.
Later ones link them in lists of the interpreter that only the C core can read;
tasks of other classes are in sets of the C module's own. What a thread runs is
in its state, for the C core as well.

What it costs: 3 to 5 ms for 100,000 tasks, copied at once, and 1 to 3 ms up to
3.13; a microsecond for what threads run. Without the C core 9 to 21 ms on 3.14
and later, and 2 to 3 ms to look through the frames of 50 threads.

What it misses: nothing with the C core, and no tasks up to 3.13. Without it a
loop is found where a thread's frames hold it under a usual name; on 3.14 and
later the tasks of loops that were never found so are missed.

Source: CPython, Modules/_asynciomodule.c, Lib/asyncio/tasks.py.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import weakref
from collections.abc import Iterator
from types import FrameType
from typing import Any, NamedTuple, TypeAlias, cast

from asgi_pprof.native.core import native
from asgi_pprof.runtime.frames import frame_local, frame_objects

_asyncio: Any
try:
    import _asyncio
except ImportError:  # asyncio in Python alone
    _asyncio = None

_Task: TypeAlias = "asyncio.Task[Any]"
_Entry: TypeAlias = "_Task | weakref.ref[_Task]"
_LOOP_NAMES = ("self", "loop", "runner", "_loop", "event_loop")


class RunningLoop(NamedTuple):
    """An event loop that a thread runs, and which of its tasks; None between two tasks."""

    thread_ident: int
    loop: asyncio.AbstractEventLoop
    task: _Task | None


def running_loops() -> list[RunningLoop]:
    """Return the loop each thread runs now, the calling thread's included."""
    own = asyncio._get_running_loop()
    if native:
        rows = native.running_loops(own)
        if rows is None:  # it cannot be told; frame objects are for where there is no C core
            rows = [] if own is None else [(threading.get_ident(), own, None)]
    else:
        with frame_objects(sys._getframe()) as frames:
            rows = [(*each, None) for each in _seen_in_frames(own, frames)]
    # What a row does not say asyncio does, up to 3.13 from a dict of its module.
    return [RunningLoop(ident, loop, task or _current_task(loop)) for ident, loop, task in rows]


def _current_task(loop: asyncio.AbstractEventLoop) -> _Task | None:
    return asyncio.current_task(loop)


def _seen_in_frames(
    own: asyncio.AbstractEventLoop | None, frames: dict[int, FrameType]
) -> list[tuple[int, asyncio.AbstractEventLoop]]:
    """
    Return the threads and the loops they run, as their stacks show them.

    asyncio's loop is the `self` of its `run_forever`; any other (uvloop) is found
    where `asyncio.Runner` or the code that called it holds it. Threads may hold
    loops that others run: asyncio's tell who runs them, and of others a runner's
    word counts before that of a variable.
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
    except Exception:  # another thread is just making it
        return False


def _loops_of(frame: FrameType | None) -> Iterator[tuple[asyncio.AbstractEventLoop, bool]]:
    while frame is not None:
        for name in _LOOP_NAMES:
            value = frame_local(frame, name)
            # By type(): isinstance asks the object, which may be a proxy.
            is_runner = issubclass(type(value), asyncio.Runner)
            if is_runner:
                value = getattr(value, "_loop", None)
            if issubclass(type(value), asyncio.AbstractEventLoop):
                yield cast(asyncio.AbstractEventLoop, value), is_runner
        frame = frame.f_back
