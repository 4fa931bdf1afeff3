"""
Sample labels, in a contextvar: child tasks, `asyncio.to_thread` and anyio's worker
threads (every `def` endpoint) inherit them.

A label set is a link to the set around it and pairs of its own. Sets are merged only
when a sample is read, so setting labels costs the application an object and two
contextvar calls.

Source: runtime/pprof, Do and Labels.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import Any, Protocol, TypeVar, cast

from asgi_pprof.native.core import LabelNode

Pairs = tuple[tuple[str, str], ...]

_Callable = TypeVar("_Callable", bound=Callable[..., Any])


class LabelSet(Protocol):
    """A value of the contextvar; any thread may read its labels later."""

    outer: LabelSet | None

    @property
    def number(self) -> int:
        """Return the number by which the C core knows the set; it is never reused."""

    def own(self) -> dict[str, str]:
        """Return the labels of this set, without those of the sets around it."""


current: ContextVar[LabelSet | None] = ContextVar("asgi_pprof_labels", default=None)


MAX_LETTERS = 256
"""The length at which keys and values are cut."""


def clip(text: str) -> str:
    """Return a label's key or value with at most `MAX_LETTERS` letters; a cut one says so."""
    if len(text) <= MAX_LETTERS:
        return text
    return f"{text[:MAX_LETTERS]}... ({len(text)} letters)"


def unreadable(error: Exception) -> str:
    """Return what stands for a value of an object whose class raises this error instead."""
    return f"unreadable: {type(error).__name__}"


def resolve(label_set: LabelSet | None) -> Pairs:
    """Return the labels of a set and of those around it, sorted by key; () for None."""
    pairs: dict[str, str] = {}
    while label_set is not None:
        pairs = {**label_set.own(), **pairs}
        label_set = label_set.outer
    return tuple(sorted(pairs.items()))


class labels:
    """
    Label all samples and tasks of the code that runs inside.

    A context manager, and a decorator for plain and `async` functions. Inner
    labels are added to the outer ones, and replace those with the same key.
    Child tasks and worker threads started inside inherit them.

        with labels(tenant="acme"):
            await handle()

    Args:
        mapping: Labels whose keys are not Python names, such as "http.route".
        pairs: Labels by keyword. Values are converted to strings. A key or a value of
            more than 256 letters is cut.

    Raises:
        ValueError: A key or a value is empty (scrapers refuse such labels).
    """

    def __init__(self, mapping: Mapping[str, object] | None = None, /, **pairs: object) -> None:
        self._own = {
            clip(key): clip(str(value)) for key, value in {**(mapping or {}), **pairs}.items()
        }
        for key, value in self._own.items():
            if not key or not value:
                raise ValueError(f"labels need a non-empty key and value, got {key!r}: {value!r}")

    def __enter__(self) -> None:
        current.set(_OwnLabels(self._own, current.get()))

    def __exit__(self, *exc_info: object) -> None:
        # Not by the token of `set`: tasks and threads may share this manager.
        inner = current.get()
        if isinstance(inner, _OwnLabels):
            current.set(inner.outer)

    def __call__(self, function: _Callable) -> _Callable:
        if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
            # A generator runs in the context of each caller of `next`.
            raise TypeError(f"labels cannot decorate the generator {function.__qualname__}")
        if inspect.iscoroutinefunction(function):

            @functools.wraps(function)
            async def call_async(*args: Any, **kwargs: Any) -> Any:
                with self:
                    return await function(*args, **kwargs)

            return cast(_Callable, call_async)

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            with self:
                return function(*args, **kwargs)

        return cast(_Callable, call)


class _OwnLabels(LabelNode):
    __slots__ = ("_own", "outer")

    def __init__(self, own: dict[str, str], outer: LabelSet | None) -> None:
        self._own = own
        self.outer = outer

    def own(self) -> dict[str, str]:
        return self._own
