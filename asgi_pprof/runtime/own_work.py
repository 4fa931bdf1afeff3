"""
Which work is the profiler's own: all that runs below a function that is marked as such.

A function is marked if the profiler is called there and does not call the application
from there, as the answer to a request for a profile does. Our middleware and our
wrappers do call it, so they are not marked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import CodeType
from typing import Any, TypeVar

from asgi_pprof.profile import Label

OWN_WORK: Label = ("asgi_pprof", "own work")
"""The label of samples that the profiler has caused."""

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
