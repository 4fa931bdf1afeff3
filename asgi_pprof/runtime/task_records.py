"""
What is recorded of a task beyond what it knows itself, as an attribute of the task.

So it needs no table and goes when the task goes. Numbers are small, stable and
never used again.

Source: runtime/proc.go, newproc1 (goid, gopc, parentGoid).
"""

from __future__ import annotations

import contextlib
import itertools
import weakref
from types import CodeType
from typing import Any, cast

from asgi_pprof.runtime.tasks import Task, waits_for

ATTRIBUTE = "_asgi_pprof_record"

_ids = itertools.count(1)


class TaskRecord:
    """
    What is recorded of a task.

    Args:
        creator: The number of the task that created it; 0 for none, or if it is not known.
        code: The function that created it, with `lasti`, the place in it; None if not known.
        after_ns: A moment before it was created, by the clock of `update`; 0 if not known.
    """

    __slots__ = (
        "before_ns",
        "code",
        "creator",
        "id",
        "lasti",
        "leaked",
        "seen_ns",
        "since_ns",
        "waited",
    )

    def __init__(
        self,
        creator: int = 0,
        code: CodeType | None = None,
        lasti: int = 0,
        after_ns: int = 0,
    ) -> None:
        self.id = next(_ids)
        self.creator = creator
        self.code = code
        self.lasti = lasti
        self.leaked = False
        self.waited: weakref.ref[Any] | None = None
        self.since_ns = 0
        self.before_ns = 0
        self.seen_ns = after_ns

    def update(self, waits_for: object, now_ns: int) -> int:
        """
        Record what the task waits for now, None if it can run.

        Returns:
            For how many nanoseconds it is known to wait for this; 0 for None.
        """
        seen_ns, self.seen_ns = self.seen_ns, now_ns
        if waits_for is None:
            self.waited = None
            return 0
        if self.waited is None or self.waited() is not waits_for:
            self.since_ns, self.before_ns = now_ns, seen_ns
            try:
                self.waited = weakref.ref(waits_for)
            except TypeError:
                # Such an object cannot be told from the next at its address.
                self.waited, self.before_ns = None, 0
        return now_ns - self.since_ns

    def at_most(self, now_ns: int) -> int | None:
        """Return the nanoseconds since it was last seen not to wait for this, None if never."""
        return now_ns - self.before_ns if self.before_ns else None


class TaskRecords:
    """The records of all tasks of the process; those of tasks that take no attributes are here."""

    def __init__(self) -> None:
        # Of classes with slots, which are not asyncio's.
        self._others: weakref.WeakKeyDictionary[Any, TaskRecord] = weakref.WeakKeyDictionary()

    def of(self, task: Task) -> TaskRecord:
        """Return the record of a task, a new one if it has none."""
        record = None
        with contextlib.suppress(Exception):  # of a class of the application's
            record = getattr(task, ATTRIBUTE, None) or self._others.get(task)
        if record is None:
            record = TaskRecord()
            self.set(task, record)
        return cast(TaskRecord, record)

    def set(self, task: Task, record: TaskRecord) -> None:
        """Make this the record of a task."""
        try:
            task._asgi_pprof_record = record  # type: ignore[attr-defined]
        except Exception:
            with contextlib.suppress(Exception):  # not even a weak reference: a new one each time
                self._others[task] = record


task_records = TaskRecords()
record_of = task_records.of


def update_wait(task: Task, now_ns: int) -> tuple[int, int | None]:
    """
    Record what a task waits for now.

    Returns:
        For how many nanoseconds it is known to wait for this, and how many it may be at
        most, None if that is not known. 0 and None for a task that cannot be read.
    """
    try:
        record = record_of(task)
        return record.update(waits_for(task), now_ns), record.at_most(now_ns)
    except Exception:  # of a class of the application's
        return 0, None
