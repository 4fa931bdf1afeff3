"""The labels of a task: those of its context, and its name."""

from __future__ import annotations

import gc
import re
from contextvars import Context
from typing import Any, cast

from asgi_pprof.labels import clip, current, resolve, unreadable
from asgi_pprof.runtime.tasks import Task

_DEFAULT_NAME = re.compile(r"Task-\d+")


def task_name(task: Task) -> str:
    """Return a task's name, clipped as a label is; "?" for none."""
    try:
        return clip(str(task.get_name())) or "?"
    except Exception as error:  # of a class of the application's
        return unreadable(error)


def is_default_name(name: str) -> bool:
    """Return whether this is the name of a task that was given none."""
    return _DEFAULT_NAME.fullmatch(name) is not None


def task_labels(task: Task) -> dict[str, str]:
    """Return the labels of a task's context, and its name as `task`."""
    return {**dict(resolve(context_labels(task))), "task": task_name(task)}


def fold_default_name(labels: dict[str, str]) -> None:
    """Remove the number from a default name, so that equal tasks have equal labels."""
    if is_default_name(labels["task"]):
        labels["task"] = "Task"


def context_labels(task: Task) -> Any:
    """Return the label set of a task's context; None if it has none."""
    context = task.get_context() if hasattr(task, "get_context") else _context_311(task)
    return context.get(current) if context is not None else None


def _context_311(task: Task) -> Context | None:
    # Task.get_context came with 3.12. A C task shows its context only to the garbage
    # collector, before the contexts of its callbacks (_asynciomodule.c,
    # TaskObj_traverse); a Python task keeps it in an attribute.
    context = getattr(task, "_context", None)
    if context is None:
        referents = gc.get_referents(task)
        context = next((each for each in referents if isinstance(each, Context)), None)
    return cast("Context | None", context)
