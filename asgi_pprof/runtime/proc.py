"""
What /proc says about this process and its threads.

Source: Linux, proc(5); fs/proc/base.c, proc_pid_schedstat.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

_TASKS = Path("/proc/self/task")


def proc_status() -> dict[str, int]:
    """Return the numbers in /proc/self/status, sizes in bytes; {} where there is no such file."""
    try:
        text = Path("/proc/self/status").read_text(errors="replace")
    except OSError:
        return {}
    fields = re.findall(r"^(\w+):\s+(\d+)( kB)?$", text, re.MULTILINE)
    return {name: int(number) * (1024 if unit else 1) for name, number, unit in fields}


def native_thread_ids() -> list[int]:
    """Return the native ids of all threads of this process; [] where there is no /proc."""
    try:
        return [int(entry) for entry in os.listdir(_TASKS)]
    except OSError:
        return []


def stat_fields(path: str) -> list[str]:
    """Return the fields of a `stat` file that follow the name: the state comes first."""
    # The name in parentheses may hold anything, parentheses too.
    return Path(path).read_text(errors="replace").rpartition(")")[2].split()


_STATES = {"R": "running", "S": "sleeping", "D": "disk sleep", "T": "stopped", "t": "traced"}


def system_labels(thread_id: int) -> dict[str, str]:
    """Return a thread's native id and its state, if that is known, as labels."""
    labels = {"native_id": str(thread_id)}
    try:
        state = stat_fields(f"/proc/self/task/{thread_id}/stat")[0]
    except (OSError, IndexError):
        return labels
    return {**labels, "state": _STATES.get(state, state)}


def system_name(thread_id: int) -> str:
    """Return the system's name of a thread; its id if that is not known."""
    try:
        return Path(f"/proc/self/task/{thread_id}/comm").read_text(errors="replace").strip()
    except OSError:
        return str(thread_id)


class Usage(NamedTuple):
    """A thread's use of the CPU: nanoseconds on it and waiting for it, and number of runs."""

    cpu_ns: int
    waited_ns: int
    runs: int

    @staticmethod
    def cpu_between(before: bytes, now: bytes) -> int | None:
        """Return the difference of `cpu_ns` alone, which is faster."""
        if not before or not now:
            return None
        return int(now.partition(b" ")[0]) - int(before.partition(b" ")[0])

    @classmethod
    def since(cls, before: bytes, now: bytes) -> Usage | None:
        """Return the difference of two `LoopThread.usage`; None if either is empty."""
        pairs = zip(map(int, before.split()), map(int, now.split()), strict=False)
        return cls(*(after - since for since, after in pairs)) if before and now else None


class LoopThread:
    """
    Reads the CPU usage of one thread.

    It keeps a descriptor open until `close`. Reading takes 2 us and releases the GIL.

    Args:
        native_id: The system's id of the thread.
        directory: Where the system has the files of its threads.
    """

    def __init__(self, native_id: int, directory: str = "/proc/self/task") -> None:
        self._schedstat: int | None = None
        try:
            self._schedstat = os.open(f"{directory}/{native_id}/schedstat", os.O_RDONLY)
        except OSError:
            pass

    def usage(self) -> bytes:
        """Return the usage so far, for `Usage.since`; b"" if it is not known."""
        if self._schedstat is None:
            return b""
        try:
            return os.pread(self._schedstat, 256, 0)
        except OSError:
            return b""  # the thread has ended

    def close(self) -> None:
        """Close the descriptor."""
        schedstat, self._schedstat = self._schedstat, None
        if schedstat is not None:
            with suppress(OSError):  # the application may have closed all descriptors
                os.close(schedstat)
