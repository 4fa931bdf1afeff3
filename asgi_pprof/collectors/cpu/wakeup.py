"""
Keeps a flood of signals away from an event loop's wakeup descriptor.

CPython writes a byte to the descriptor of `signal.set_wakeup_fd` for every
signal. asyncio's is a socket pair that holds a few hundred such bytes. SIGPROF at
100 Hz would fill it within 3 s of a blocked loop; then CPython complains on
stderr and, worse, the byte of a later SIGTERM is lost. So a pipe of ours (65,536
bytes: 11 minutes) replaces the descriptor during sampling, and bytes of other
signals are forwarded.

This is only needed if a descriptor is set: by `loop.add_signal_handler` under
asyncio, always under uvloop; uvicorn's own signal handling sets none.

Source: CPython, Modules/signalmodule.c, trip_signal; unix(7), skb accounting.
"""

from __future__ import annotations

import asyncio
import os
import signal

_NONE = -1


class SignalWakeup:
    """Replaces the wakeup descriptor; main thread only, on the running loop."""

    def __init__(self, ignore: int) -> None:
        self._ignore = ignore
        self._replaced = _NONE
        self._pipe: tuple[int, int] | None = None

    def install(self) -> None:
        """
        Replace the wakeup descriptor, if there is one.

        Raises:
            OSError: The process has no descriptors left.
            ValueError: Not the main thread of the main interpreter.
        """
        reader, writer = os.pipe()  # first, so that a failure changes nothing
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
        """Put the descriptor back, unless another one has been set since."""
        if self._pipe is None:
            return
        reader, writer = self._pipe
        # asyncio sets the flag, uvloop does not; it cannot be read.
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
        """Forward the bytes that have been received, except those of the ignored signal."""
        assert self._pipe is not None
        try:
            received = os.read(self._pipe[0], 65536)
            others = bytes(number for number in received if number != self._ignore)
            if others and self._replaced != _NONE:
                os.write(self._replaced, others)
        except BlockingIOError:
            pass  # nothing to read, or a full buffer, which also wakes the loop
        except OSError:
            pass  # the replaced descriptor has been closed with its loop
