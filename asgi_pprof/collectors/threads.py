"""
thread: the current stack of every OS thread.

What is measured: one sample per thread, with its stack at the same moment as all
others. Labels give the thread's name, its native id, whether it is a daemon, its
state in the kernel (read just after the stacks), and the event loop and task it
runs. A thread that runs no Python code (a C library's) has one pseudo-frame, with
its name in the kernel.

How: `runtime.frames` reads all stacks while it holds the GIL.

What it costs: nothing until a profile is requested.

What it misses: C frames, and which thread had the GIL, because the reader has it.
Threads of other interpreters are not read. Without the C core no stack is read once
other interpreters may exist.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable

from asgi_pprof.collectors import AlwaysOn
from asgi_pprof.merge import sum_samples
from asgi_pprof.profile import Label, Profile, Sample, count_profile, pseudo_location
from asgi_pprof.runtime.frames import CurrentFrames, RawStack, current_frames, why_not
from asgi_pprof.runtime.loops import RunningLoop, running_loops
from asgi_pprof.runtime.proc import native_thread_ids, system_labels, system_name
from asgi_pprof.runtime.task_labels import task_name
from asgi_pprof.runtime.threads import KnownThread, known_threads
from asgi_pprof.stacks import UNKNOWN, Symbols


class ThreadCollector(AlwaysOn):
    """
    Takes the stack of every OS thread.

    Args:
        current_frames: Test seam for `frames.current_frames`.
    """

    def __init__(self, current_frames: CurrentFrames = current_frames) -> None:
        self._current_frames = current_frames

    def count(self) -> int:
        """Return the number of OS threads."""
        return len(native_thread_ids()) or threading.active_count()

    async def snapshot(self) -> Callable[[], Profile]:
        """Take thread/count by stack, labelled with the properties of the thread."""
        threads = known_threads()
        loops = {running.thread_ident: running for running in running_loops()}
        stacks: list[tuple[RawStack, tuple[Label, ...]]] = []
        listed, unlisted = set(), 0
        for ident, stack in self._current_frames().items():
            thread = threads.get(ident)
            if thread is not None:
                listed.add(thread.native_id)
            unlisted += thread is None
            stacks.append((stack.places(), _labels(thread, loops.get(ident))))
        native = [thread_id for thread_id in native_thread_ids() if thread_id not in listed]
        # A thread that runs Python but is unknown to `threading` has a stack and a
        # native id, which nothing connects: leave out as many ids as such stacks.
        others = [
            Sample(
                (pseudo_location(f"native thread {system_name(thread_id)}"),),
                (1,),
                tuple(sorted(system_labels(thread_id).items())),
            )
            for thread_id in native[unlisted:]
        ]
        return functools.partial(_thread_profile, stacks, others, time.time_ns(), why_not())


def _thread_profile(
    stacks: list[tuple[RawStack, tuple[Label, ...]]], others: list[Sample], time_ns: int, note: str
) -> Profile:
    symbols = Symbols()
    samples = [Sample(symbols.stack(raw) or (UNKNOWN,), (1,), labels) for raw, labels in stacks]
    summed = sum_samples(samples + others)
    return count_profile("thread", summed, time_ns, (note,) if note else ())


def _labels(thread: KnownThread | None, running: RunningLoop | None) -> tuple[Label, ...]:
    labels: dict[str, str] = {}
    if thread is not None:
        labels["daemon"] = thread.daemon
        if thread.name:
            labels["thread"] = thread.name
        if thread.native_id is not None:
            labels |= system_labels(thread.native_id)
    if running is not None:
        kind = type(running.loop)
        labels["loop"] = f"{kind.__module__}.{kind.__qualname__}"
        if running.task is not None:
            labels["task"] = task_name(running.task)
    return tuple(sorted(labels.items()))
