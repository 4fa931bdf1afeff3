"""
What can be known of an event loop from outside: in which turn it is, and what its thread has had.

A loop is in a turn from when it has its events until it waits for the next.
asyncio's keeps the moment in a variable of `_run_once`, which is not there while
it waits. libuv keeps it in its structure, to the millisecond (and later if a
callback has set a timer or asked for the time); there the loop waits if its
thread is in no callback, which the frames tell.

To be asked by a thread that has the GIL: what they say holds until it lets go.

Source: CPython, Lib/asyncio/base_events.py, _run_once; libuv, uv__update_time;
uvloop/loop.pyx, libuv_get_loop_t_ptr; Linux, fs/proc/base.c, proc_pid_schedstat.
"""

from __future__ import annotations

import asyncio
import selectors
import sys
from types import CodeType
from typing import TYPE_CHECKING, Protocol

from asgi_pprof.runtime.frames import LocalsOf, ThreadStack

if TYPE_CHECKING:
    import ctypes


class TurnClock(Protocol):
    """Tells since when a loop is in a turn, by `time.monotonic_ns`."""

    @property
    def tells(self) -> bool:
        """Whether it can tell; if not, only the loop itself can give a sign."""
        ...

    def turn_ns(self, loop: asyncio.AbstractEventLoop, stack: ThreadStack) -> int:
        """
        Return when the loop's turn began, 0 if it is in none.

        Args:
            loop: The loop, alive and running.
            stack: What its thread is at, with `TURN_VARIABLES`.
        """
        ...

    def is_waiting(self, stack: ThreadStack) -> bool:
        """
        Tell whether it is certain that a loop of this kind waits there for events; quick.

        Args:
            stack: At least the two innermost frames.
        """
        ...

    def learn(self, stack: ThreadStack) -> bool:
        """
        Take notice of where a callback is called, on the loop's thread.

        Args:
            stack: With the callback innermost, and `TURN_VARIABLES`.

        Returns:
            False if what was told so far may have been wrong.
        """
        ...


def turn_clock(loop: asyncio.AbstractEventLoop) -> TurnClock:
    """Return what tells of this loop's turns; to be called on its thread. Keeps nothing alive."""
    if isinstance(loop, asyncio.BaseEventLoop):
        return _AsyncioTurns()
    noted = _libuv_time(loop)
    return _NoTurns() if noted is None else _UvloopTurns(noted)


_RUN_ONCE = asyncio.BaseEventLoop._run_once.__code__  # type: ignore[attr-defined]
_SELECT = selectors.DefaultSelector.select.__code__

TURN_VARIABLES: LocalsOf = ((_RUN_ONCE, "self", "end_time"),)
"""What is to be read of a loop's thread besides its stack."""


class _AsyncioTurns:
    """Loops of asyncio's own, and those derived from them that turn as they do."""

    tells = False  # until the loop has shown itself

    def turn_ns(self, loop: asyncio.AbstractEventLoop, stack: ThreadStack) -> int:
        if stack.local("self") is not loop:
            return 0
        noted = stack.local("end_time")
        return int(noted * 1e9) if type(noted) is float else 0

    def is_waiting(self, stack: ThreadStack) -> bool:
        return stack.code(0) is _SELECT and stack.code(1) is _RUN_ONCE

    def learn(self, stack: ThreadStack) -> bool:
        self.tells = stack.found >= 0
        return True


class _UvloopTurns:
    """uvloop's: in C, below the frames of its callbacks."""

    def __init__(self, noted: ctypes.c_uint64) -> None:
        self._noted = noted  # in the loop's memory: read only while the loop is alive
        self._below: CodeType | None = None  # what runs the loop; its frame is below all callbacks

    @property
    def tells(self) -> bool:
        return self._below is not None

    def turn_ns(self, loop: asyncio.AbstractEventLoop, stack: ThreadStack) -> int:
        if self._below is None or stack.code(0) is self._below:
            return 0
        return self._noted.value * 1_000_000

    def is_waiting(self, stack: ThreadStack) -> bool:
        return stack.code(0) is self._below

    def learn(self, stack: ThreadStack) -> bool:
        before, self._below = self._below, stack.code(1)
        return self._below is before


class _NoTurns:
    """Any other loop."""

    tells = False

    def turn_ns(self, loop: asyncio.AbstractEventLoop, stack: ThreadStack) -> int:
        return 0

    def is_waiting(self, stack: ThreadStack) -> bool:
        return False

    def learn(self, stack: ThreadStack) -> bool:
        return True


def _libuv_time(loop: asyncio.AbstractEventLoop) -> ctypes.c_uint64 | None:
    """
    Return the `time` of uvloop's uv_loop_t itself, None for other loops.

    Where it is in the structure is found by its value: loop.time() sets it.
    """
    module = sys.modules.get("uvloop.loop")
    if module is None or not isinstance(loop, module.Loop) or sys.platform != "linux":
        return None  # elsewhere libuv's clock need not be that of time.monotonic
    try:
        import ctypes  # here: a build without it must still be able to import this package

        pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
            ("PyCapsule_GetPointer", ctypes.pythonapi)
        )
        address = pointer(module.libuv_get_loop_t_ptr(loop), None)
    except (ImportError, AttributeError, TypeError, ValueError):
        return None
    words = (ctypes.c_uint64 * _UV_LOOP_WORDS).from_address(address)
    now_ms = round(loop.time() * 1000)
    found = [at for at, word in enumerate(words) if word == now_ms]
    if len(found) != 1:
        return None
    return ctypes.c_uint64.from_address(address + 8 * found[0])


_UV_LOOP_WORDS = 72  # of 106; `time` is number 68 in libuv 1.48
