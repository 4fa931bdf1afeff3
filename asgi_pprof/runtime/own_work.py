"""
Which work is the profiler's own, and which waits are for it.

Three things show it. The code: all that runs below a marked function is our own work; a
function is marked if the profiler is called there and does not call the application
from there. (Our middleware and our wrappers do call it, so they are not marked.) The
context: in a request for a profile, in the tasks that are made there and on our threads,
the labels have `OWN_WORK`. The scope: a middleware around ours may wait in another task
for our answer, and has the scope of the request in a variable.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, TypeVar

from asgi_pprof.labels import LabelSet, current
from asgi_pprof.native.core import LabelNode
from asgi_pprof.runtime.frames import frame_local, no_collections

OWN_WORK = ("asgi_pprof", "own work")
"""The label of samples and tasks of the profiler's own."""

_RECENT_NS = 1_000_000_000

_Function = TypeVar("_Function", bound=Callable[..., Any])

own_codes: dict[int, CodeType] = {}
"""The code of marked functions by id; kept alive, so that no id is used twice."""


def own_work(function: _Function) -> _Function:
    """Mark a function: what it does, and what it calls, is the profiler's own work."""
    code: CodeType = function.__code__
    own_codes[id(code)] = code
    return function


def is_own(codes: Iterable[CodeType]) -> bool:
    """Return whether a stack with these codes is of the profiler's own work."""
    return any(id(code) in own_codes for code in codes)


class OwnLabels(LabelNode):
    """
    The label set of the profiler's own work. It hides those around it.

    Args:
        around: The set that was current before.
    """

    __slots__ = ("around", "outer")

    def __init__(self, around: LabelSet | None = None) -> None:
        self.around = around
        self.outer: LabelSet | None = None

    def own(self) -> dict[str, str]:
        """Return the one label."""
        key, value = OWN_WORK
        return {key: value}


def is_own_context() -> bool:
    """Return whether the calling code runs in the context of the profiler's own work."""
    return is_own_label_set(current.get())


def is_own_label_set(label_set: LabelSet | None) -> bool:
    """Return whether a label set is that of the profiler's own work, or made inside it."""
    while label_set is not None:
        if isinstance(label_set, OwnLabels):
            return True
        label_set = label_set.outer
    return False


class _OwnRequests:
    def __init__(self) -> None:
        self.under_way = 0
        self.ended_ns = 0


_own_requests = _OwnRequests()


@contextmanager
def own_request(request: MutableMapping[str, Any]) -> Iterator[None]:
    """Answer a request for a profile inside; its scope is marked."""
    key, value = OWN_WORK
    request[key] = value
    token = current.set(OwnLabels(current.get()))
    _own_requests.under_way += 1
    try:
        yield
    finally:
        _own_requests.under_way -= 1
        _own_requests.ended_ns = time.monotonic_ns()
        with suppress(ValueError):  # the loop ends and closes the request in another context
            current.reset(token)


def begin_own_thread() -> None:
    """Name the calling thread in the system, and label all that it does."""
    current.set(OwnLabels())
    with suppress(OSError):  # where there is no such file, the thread has no name
        path = f"/proc/self/task/{threading.get_native_id()}/comm"
        Path(path).write_bytes(b"asgi_pprof")  # as the C core names its threads


def awaits_own_request(frame: FrameType | None) -> bool:
    """
    Return whether a frame of the calling thread, or one below it, serves a request for a profile.

    The innermost frame with an argument `scope` tells. It takes some microseconds while
    there is such a request, and next to nothing otherwise.
    """
    if not are_own_requests_recent():
        return False
    while frame is not None:
        if has_scope(frame.f_code):
            with no_collections():
                return is_own_scope(frame_local(frame, "scope"))
        frame = frame.f_back
    return False


def are_own_requests_recent() -> bool:
    """Return whether a request for a profile is answered now, or was within the last second."""
    if _own_requests.under_way:
        return True
    return time.monotonic_ns() - _own_requests.ended_ns < _RECENT_NS


def has_scope(code: CodeType) -> bool:
    """Return whether a function has an argument `scope`, as ASGI applications do."""
    return "scope" in code.co_varnames[: code.co_argcount]


def is_own_scope(value: object) -> bool:
    """Return whether a value is the scope of a request for a profile."""
    return type(value) is dict and OWN_WORK[0] in value
