"""
What is noted of a task beyond what it knows itself, as an attribute of the task.

So it costs no table and goes when the task goes. Numbers are small, stable and
never used again.

Source: runtime/proc.go, newproc1 (goid, gopc, parentGoid).
"""

from __future__ import annotations

import contextlib
import itertools
import weakref
from types import CodeType
from typing import Any, cast

from asgi_pprof.runtime.tasks import Task

ATTRIBUTE = "_asgi_pprof_note"

_ids = itertools.count(1)


class Note:
    """
    What is known of a task beyond what it knows itself.

    Args:
        creator: The number of the task that made it, 0 if none did or it is not known.
        code: Which function made it, with `lasti`, the place in it; None if not known.
    """

    __slots__ = ("code", "creator", "id", "lasti", "leaked", "since_ns", "waited")

    def __init__(self, creator: int = 0, code: CodeType | None = None, lasti: int = 0) -> None:
        self.id = next(_ids)
        self.creator = creator
        self.code = code
        self.lasti = lasti
        self.leaked = False
        self.waited: weakref.ref[Any] | None = None
        self.since_ns = 0

    def look(self, waits_for: object, now_ns: int) -> int:
        """Return for how many nanoseconds the task is known to wait for this, 0 for None."""
        if waits_for is None:
            self.waited = None
            return 0
        if self.waited is None or self.waited() is not waits_for:
            self.since_ns = now_ns
            try:
                self.waited = weakref.ref(waits_for)
            except TypeError:
                self.waited = None  # such an object cannot be told from the next at its address
        return now_ns - self.since_ns


# Tasks that take no attributes: classes with slots, which are not asyncio's.
_others: weakref.WeakKeyDictionary[Any, Note] = weakref.WeakKeyDictionary()


def note_of(task: Task) -> Note:
    """Return the note of a task, a new one if it has none."""
    note = getattr(task, ATTRIBUTE, None)
    if note is None:
        with contextlib.suppress(TypeError):
            note = _others.get(task)
    if note is None:
        note = Note()
        keep_note(task, note)
    return cast(Note, note)


def keep_note(task: Task, note: Note) -> None:
    try:
        task._asgi_pprof_note = note  # type: ignore[attr-defined]
    except AttributeError:
        with contextlib.suppress(TypeError):  # not even a weak reference: it gets a new one
            _others[task] = note
