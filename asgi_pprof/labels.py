"""
Sample labels, carried in a contextvar and so inherited by child tasks, by
`asyncio.to_thread` and by anyio's worker threads (every `def` endpoint).

A label set is a link to the set around it plus its own pairs; nothing is
merged or looked up until a sample is read out. That keeps the cost in the
application's path at an object and two contextvar calls.

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
    """
    What the contextvar holds: labels that can be asked for later, from any thread.

    With the C core each has a number of its own, which is never used again.
    """

    outer: LabelSet | None

    @property
    def number(self) -> int: ...

    def own(self) -> dict[str, str]:
        """Return its labels, without those of the sets around it."""


current: ContextVar[LabelSet | None] = ContextVar("asgi_pprof_labels", default=None)


def resolve(label_set: LabelSet | None) -> Pairs:
    """Return the labels of a set, sorted by key; () for none."""
    pairs: dict[str, str] = {}
    while label_set is not None:
        pairs = {**label_set.own(), **pairs}
        label_set = label_set.outer
    return tuple(sorted(pairs.items()))


class labels:
    """
    Label everything that runs inside: samples and tasks carry key and value.

    A context manager, and a decorator for plain and `async` functions. Inner
    labels add to the outer ones and win over those of the same key. Child
    tasks and worker threads started inside inherit them.

        with labels(tenant="acme"):
            await handle()

    Args:
        mapping: Labels whose keys are no Python names, such as "http.route".
        pairs: Labels by keyword. Values are turned into strings.

    Raises:
        ValueError: A key or a value is empty (scrapers refuse such labels).

    Source: runtime/pprof, Do and Labels.
    """

    def __init__(self, mapping: Mapping[str, object] | None = None, /, **pairs: object) -> None:
        self._own = {key: str(value) for key, value in {**(mapping or {}), **pairs}.items()}
        for key, value in self._own.items():
            if not key or not value:
                raise ValueError(f"labels need a non-empty key and value, got {key!r}: {value!r}")

    def __enter__(self) -> None:
        current.set(_OwnLabels(self._own, current.get()))

    def __exit__(self, *exc_info: object) -> None:
        # Not by token: tasks that share this manager would have to share them.
        inner = current.get()
        if isinstance(inner, _OwnLabels):
            current.set(inner.outer)

    def __call__(self, function: _Callable) -> _Callable:
        if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
            # A generator runs in its caller's context, one piece at a time.
            raise TypeError(f"labels cannot decorate the generator {function.__qualname__}")
        # Each call enters a manager of its own: calls overlap in tasks and threads.
        if inspect.iscoroutinefunction(function):

            @functools.wraps(function)
            async def call_async(*args: Any, **kwargs: Any) -> Any:
                with labels(self._own):
                    return await function(*args, **kwargs)

            return cast(_Callable, call_async)

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            with labels(self._own):
                return function(*args, **kwargs)

        return cast(_Callable, call)


class _OwnLabels(LabelNode):
    __slots__ = ("_own", "outer")

    def __init__(self, own: dict[str, str], outer: LabelSet | None) -> None:
        self._own = own
        self.outer = outer

    def own(self) -> dict[str, str]:
        return self._own
