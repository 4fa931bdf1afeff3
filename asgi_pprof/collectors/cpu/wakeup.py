"""
Keeps a flood of signals away from an event loop's wakeup descriptor.

CPython writes a byte to `signal.set_wakeup_fd`'s descriptor for every signal.
asyncio's is a socket pair that holds a few hundred such bytes: a loop that is
blocked while SIGPROF comes at 100 Hz would fill it within 3 s, then CPython
complains on stderr and, worse, the byte of a later SIGTERM is lost. So while
sampling, a pipe of ours (65,536 bytes: 11 minutes) takes its place, and what
is not ours to drop is handed on.

Only needed when somebody has set a descriptor: `loop.add_signal_handler`
under asyncio, always under uvloop; never uvicorn's own signal handling.

Source: CPython, Modules/signalmodule.c, trip_signal; unix(7), skb accounting.
"""

from __future__ import annotations

import asyncio
import os
import signal

_NONE = -1


class SignalWakeup:
    """The swap of descriptors; main thread only, on the running loop."""

    def __init__(self, ignore: int) -> None:
        self._ignore = ignore
        self._replaced = _NONE
        self._pipe: tuple[int, int] | None = None

    def install(self) -> None:
        """
        Take the place of the wakeup descriptor, if there is one.

        Raises:
            OSError: No descriptor is left.
            ValueError: Not the main thread of the main interpreter.
        """
        reader, writer = os.pipe()  # first: what can fail must change nothing
        os.set_blocking(reader, False)
        os.set_blocking(writer, False)
        try:
            self._replaced = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        except ValueError:
            os.close(reader)
            os.close(writer)
            raise
        self._loop = asyncio.get_running_loop()
        self._pipe = reader, writer
        if self._replaced == _NONE:
            self.restore()
        else:
            self._loop.add_reader(reader, self.forward)

    def restore(self) -> None:
        """Put the descriptor back, unless somebody has set another one since."""
        if self._pipe is None:
            return
        reader, writer = self._pipe
        # asyncio asks for the warning, uvloop does not; the flag cannot be read.
        warns = isinstance(self._loop, asyncio.BaseEventLoop)
        current = signal.set_wakeup_fd(self._replaced, warn_on_full_buffer=warns)
        if current != writer:
            signal.set_wakeup_fd(current)
        self._loop.remove_reader(reader)
        self.forward()
        os.close(reader)
        os.close(writer)
        self._pipe = None

    def forward(self) -> None:
        """Hand on what has been received, without the bytes that are ours to drop."""
        assert self._pipe is not None
        try:
            received = os.read(self._pipe[0], 65536)
            others = bytes(number for number in received if number != self._ignore)
            if others and self._replaced != _NONE:
                os.write(self._replaced, others)
        except BlockingIOError:
            pass  # nothing to read, or a full buffer, which wakes the loop as well
        except OSError:
            pass  # the replaced descriptor was closed: its loop is gone
