"""
When an event loop's current iteration began, read from another thread.

An iteration begins when the loop has its events and ends when it waits for the
next ones. asyncio's loop keeps the moment in a variable of `_run_once`, which is
unset while the loop waits. libuv keeps it in its loop structure, in milliseconds
(a later moment if a callback has set a timer or asked for the time). There the
loop waits if its thread is in no callback, which the frames show.

The calling thread must hold the GIL: the answers are true until it releases it.

Source: CPython, Lib/asyncio/base_events.py, _run_once; libuv, uv__update_time;
uvloop/loop.pyx, libuv_get_loop_t_ptr.
"""

from __future__ import annotations

import asyncio
import selectors
import sys
from types import CodeType
from typing import Protocol

from asgi_pprof.runtime.frames import LocalsOf, ThreadStack
from asgi_pprof.runtime.libraries import ctypes


class IterationClock(Protocol):
    """Reads when a loop's current iteration began, by `time.monotonic_ns`."""

    @property
    def is_reliable(self) -> bool:
        """Whether it can be read from outside; if not, only a probe shows that the loop runs."""
        ...

    def start_ns(self, loop: asyncio.AbstractEventLoop, stack: ThreadStack) -> int:
        """
        Return when the current iteration began, 0 if the loop is in none.

        Args:
            loop: The loop, alive and running.
            stack: The stack of its thread, with `ITERATION_VARIABLES`.
        """
        ...

    def is_waiting(self, stack: ThreadStack) -> bool:
        """
        Tell whether a loop of this kind is certain to wait for events; fast.

        Args:
            stack: At least the two innermost frames of its thread.
        """
        ...

    def calibrate(self, stack: ThreadStack) -> bool:
        """
        Learn from inside a callback, on the loop's thread, how callbacks are called.

        Args:
            stack: The callback's, its own frame innermost, with `ITERATION_VARIABLES`.

        Returns:
            False if earlier answers may have been wrong.
        """
        ...


def iteration_clock(loop: asyncio.AbstractEventLoop) -> IterationClock:
    """Return the clock for a loop of this kind; call it on the loop's thread. It keeps no loop."""
    if isinstance(loop, asyncio.BaseEventLoop):
        return _AsyncioClock()
    time_ms = _libuv_time(loop)
    return _NoClock() if time_ms is None else _UvloopClock(time_ms)


_RUN_ONCE = asyncio.BaseEventLoop._run_once.__code__  # type: ignore[attr-defined]
_SELECT = selectors.DefaultSelector.select.__code__

ITERATION_VARIABLES: LocalsOf = ((_RUN_ONCE, "self", "end_time"),)
"""The local variables to read along with the stack of a loop's thread."""


class _AsyncioClock:
    """For asyncio's own loops, and those derived from them that keep its `_run_once`."""

    is_reliable = False  # until a callback was seen above `_run_once`

    def start_ns(self, loop: asyncio.AbstractEventLoop, stack: ThreadStack) -> int:
        if stack.local("self") is not loop:
            return 0
        start_s = stack.local("end_time")
        return int(start_s * 1e9) if type(start_s) is float else 0

    def is_waiting(self, stack: ThreadStack) -> bool:
        return stack.code(0) is _SELECT and stack.code(1) is _RUN_ONCE

    def calibrate(self, stack: ThreadStack) -> bool:
        self.is_reliable = stack.found >= 0
        return True


class _UvloopClock:
    """For uvloop's loops, which run in C, below the frames of their callbacks."""

    def __init__(self, time_ms: ctypes.c_uint64) -> None:
        self._time_ms = time_ms  # in the loop's memory: read only while the loop is alive
        self._runner: CodeType | None = None  # what runs the loop; its frame is below all callbacks

    @property
    def is_reliable(self) -> bool:
        return self._runner is not None

    def start_ns(self, loop: asyncio.AbstractEventLoop, stack: ThreadStack) -> int:
        if self._runner is None or stack.code(0) is self._runner:
            return 0
        return self._time_ms.value * 1_000_000

    def is_waiting(self, stack: ThreadStack) -> bool:
        return stack.code(0) is self._runner

    def calibrate(self, stack: ThreadStack) -> bool:
        before, self._runner = self._runner, stack.code(1)
        return self._runner is before


class _NoClock:
    """For any other loop."""

    is_reliable = False

    def start_ns(self, loop: asyncio.AbstractEventLoop, stack: ThreadStack) -> int:
        return 0

    def is_waiting(self, stack: ThreadStack) -> bool:
        return False

    def calibrate(self, stack: ThreadStack) -> bool:
        return True


def _libuv_time(loop: asyncio.AbstractEventLoop) -> ctypes.c_uint64 | None:
    """
    Return the `time` field of uvloop's uv_loop_t, in place; None for other loops.

    Its offset is found by its value: loop.time() sets the field.
    """
    module = sys.modules.get("uvloop.loop")
    if module is None or not isinstance(loop, module.Loop) or sys.platform != "linux":
        return None  # elsewhere libuv's clock need not be that of time.monotonic
    try:
        pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
            ("PyCapsule_GetPointer", ctypes.pythonapi)
        )
        address = pointer(module.libuv_get_loop_t_ptr(loop), None)
    except (AttributeError, TypeError, ValueError):
        return None
    words = (ctypes.c_uint64 * _UV_LOOP_WORDS).from_address(address)
    now_ms = round(loop.time() * 1000)
    found = [index for index, word in enumerate(words) if word == now_ms]
    if len(found) != 1:
        return None
    return ctypes.c_uint64.from_address(address + 8 * found[0])


_UV_LOOP_WORDS = 72  # of 106; `time` is number 68 in libuv 1.48
