"""
thread: where every OS thread is now.

What is measured: one sample a thread with its current stack (`runtime.frames`):
the GIL is held while all are read, so the stacks belong to one moment. Labels
tell its name, the system's id for it, whether it is a daemon, what the system
says it does (right after), and the event loop and the task it runs. Threads that
Python does not know (a C library's) have one pseudo-frame with the system's name
for them.

What it costs: nothing until somebody asks.

What it misses: what a thread does in C, and who had the GIL: whoever looks has
it. Threads of other interpreters are not looked at; without the C core no thread
is, once there may be any.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from asgi_pprof.merge import sum_samples
from asgi_pprof.profile import Label, Profile, Sample, count_profile, pseudo_location
from asgi_pprof.runtime.frames import CurrentFrames, RawStack, current_frames, why_not
from asgi_pprof.runtime.loops import RunningLoop, running_loops
from asgi_pprof.runtime.proc import native_thread_ids, system_labels, system_name
from asgi_pprof.stacks import UNKNOWN, Symbols


class ThreadCollector:
    """
    The stack of every OS thread.

    Args:
        current_frames: Test seam for `frames.current_frames`.
    """

    def __init__(self, current_frames: CurrentFrames = current_frames) -> None:
        self._current_frames = current_frames

    def count(self) -> int:
        """Return the number of OS threads."""
        return len(native_thread_ids()) or threading.active_count()

    def note(self) -> str:
        """Return nothing: it is always on."""
        return ""

    def window(self) -> AbstractContextManager[None]:
        """Return a manager that does nothing."""
        return nullcontext()

    async def snapshot(self) -> Callable[[], Profile]:
        """Give thread/count, labelled with what is known of the thread."""
        threads = {thread.ident: thread for thread in threading.enumerate()}
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
        # Threads that run Python but are unknown to `threading` are in both
        # views, and nothing says which is which: leave out as many.
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


def _labels(thread: threading.Thread | None, running: RunningLoop | None) -> tuple[Label, ...]:
    labels: dict[str, str] = {}
    if thread is not None:
        labels["daemon"] = str(thread.daemon).lower()
        if thread.name:
            labels["thread"] = thread.name
        if thread.native_id is not None:
            labels |= system_labels(thread.native_id)
    if running is not None:
        kind = type(running.loop)
        labels["loop"] = f"{kind.__module__}.{kind.__qualname__}"
        if running.task is not None:
            labels["task"] = running.task.get_name() or "?"
    return tuple(sorted(labels.items()))
