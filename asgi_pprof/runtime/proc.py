"""
What the system tells of this process and its threads, where it has /proc.

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
    """Return the single numbers of /proc/self/status, sizes in bytes; {} where there is none."""
    try:
        text = Path("/proc/self/status").read_text(errors="replace")
    except OSError:
        return {}
    fields = re.findall(r"^(\w+):\s+(\d+)( kB)?$", text, re.MULTILINE)
    return {name: int(number) * (1024 if unit else 1) for name, number, unit in fields}


def native_thread_ids() -> list[int]:
    """Return the ids of all threads the system knows in this process; [] where it does not tell."""
    try:
        return [int(entry) for entry in os.listdir(_TASKS)]
    except OSError:
        return []


_STATES = {"R": "running", "S": "sleeping", "D": "disk sleep", "T": "stopped", "t": "traced"}


def system_labels(thread_id: int) -> dict[str, str]:
    labels = {"native_id": str(thread_id)}
    try:
        # The name in parentheses may hold anything, parentheses too.
        status = Path(f"/proc/self/task/{thread_id}/stat").read_text(errors="replace")
        state = status.rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return labels
    return {**labels, "state": _STATES.get(state, state)}


def system_name(thread_id: int) -> str:
    try:
        return Path(f"/proc/self/task/{thread_id}/comm").read_text(errors="replace").strip()
    except OSError:
        return str(thread_id)


class Usage(NamedTuple):
    """What a thread has had of a CPU: nanoseconds on it, waiting for it, and how often."""

    cpu_ns: int
    waited_ns: int
    runs: int

    @staticmethod
    def cpu_between(before: bytes, now: bytes) -> int | None:
        """Return the difference in nanoseconds of CPU alone; quick."""
        if not before or not now:
            return None
        return int(now.partition(b" ")[0]) - int(before.partition(b" ")[0])

    @classmethod
    def since(cls, before: bytes, now: bytes) -> Usage | None:
        """Return the difference of what `LoopThread.usage` gave, None if that knew nothing."""
        pairs = zip(map(int, before.split()), map(int, now.split()), strict=False)
        return cls(*(after - since for since, after in pairs)) if before and now else None


class LoopThread:
    """
    One thread, by the system's id for it; knows nothing where the system tells nothing.

    `close` it: it keeps a descriptor open. Reading takes 2 us and lets the GIL go.

    Args:
        native_id: The id.
        directory: Where the system tells of its threads.
    """

    def __init__(self, native_id: int, directory: str = "/proc/self/task") -> None:
        self._schedstat: int | None = None
        try:
            self._schedstat = os.open(f"{directory}/{native_id}/schedstat", os.O_RDONLY)
        except OSError:
            pass

    def usage(self) -> bytes:
        """Return what it has used so far, for `Usage.since`; b"" if that is not known."""
        if self._schedstat is None:
            return b""
        try:
            return os.pread(self._schedstat, 256, 0)
        except OSError:
            return b""  # the thread has ended

    def close(self) -> None:
        """Let go of the descriptor."""
        schedstat, self._schedstat = self._schedstat, None
        if schedstat is not None:
            with suppress(OSError):  # somebody has closed all there were
                os.close(schedstat)
