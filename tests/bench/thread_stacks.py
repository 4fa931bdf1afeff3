"""Measures what reading the stacks of many threads costs, in C and by frame objects."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

from asgi_pprof.native.core import native
from asgi_pprof.runtime import frames
from asgi_pprof.runtime.iterations import ITERATION_VARIABLES

THREADS = 40
DEPTH = 30  # frames of each besides those of `threading`; a FastAPI request has as many
_READS = 50  # timed together


class Cost(NamedTuple):
    """Microseconds by frame objects and in C; 0 without the C core."""

    what: str
    python_us: float
    native_us: float


def measure(rounds: int) -> list[Cost]:
    """Read the stacks by turns in both ways, and return the medians."""
    end = threading.Event()

    def wait(depth: int) -> None:
        if depth:
            wait(depth - 1)
        else:
            end.wait()

    threads = [threading.Thread(target=wait, args=(DEPTH,)) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    try:
        one = (threads[0].ident or 0,)
        return [
            _compare(f"all {THREADS} threads, {DEPTH} frames each, as objects", rounds, _stacks),
            _compare(f"all {THREADS} threads, read only", rounds, lambda read: read()),
            _compare(
                f"one of {THREADS} threads with its loop's variables",
                rounds,
                lambda read: read(one, locals_of=ITERATION_VARIABLES),
            ),
            _compare(
                f"one of {THREADS} threads, two frames", rounds, lambda read: read(one, depth=2)
            ),
        ]
    finally:
        end.set()
        for thread in threads:
            thread.join()


def _stacks(read: frames.CurrentFrames) -> object:
    return [frames.capture(stack) for stack in read().values()]


def _compare(what: str, rounds: int, use: Callable[[frames.CurrentFrames], object]) -> Cost:
    readers = [frames._read_frame_objects, *([native.current_frames] if native else [])]
    times: list[list[float]] = [[] for _ in readers]
    for _ in range(rounds):
        for reader, seconds in zip(readers, times, strict=True):
            start = time.perf_counter()
            for _ in range(_READS):
                use(reader)
            seconds.append((time.perf_counter() - start) / _READS)
    medians = [1e6 * statistics.median(each) for each in times]
    return Cost(what, medians[0], medians[1] if native else 0)
