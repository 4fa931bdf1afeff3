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

from starlette.types import Scope

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


class RequestLabels(LabelNode):
    """
    The labels of one request: its method and the template of its route.

    The template is known only after routing, so it is looked up in the scope
    when a sample is read out. `finish` lets go of the scope when the request
    is over: a task that outlives it keeps the template, not the request.
    """

    __slots__ = ("_headers", "_method", "_routing", "outer")

    def __init__(self, scope: Scope, around: LabelSet | None = None) -> None:
        self._method: str = scope.get("method", "")
        self._headers = scope.get("headers")
        self._routing: Scope = scope
        self.outer = self._without_other_requests(around) if around is not None else None

    def _without_other_requests(self, around: LabelSet) -> LabelSet | None:
        # A server may start a request in the context of an earlier one on the
        # same connection (uvicorn does, after a large body and when requests
        # are pipelined): that one's labels are not ours, and must not pile up.
        link: LabelSet | None = around
        while link is not None:
            if isinstance(link, RequestLabels) and link._headers is not self._headers:
                return link.outer
            link = link.outer
        return around

    def finish(self) -> None:
        """Keep of the scope only what names the route."""
        scope = self._routing
        self._routing = {key: scope[key] for key in _ROUTING_KEYS if key in scope}
        self._headers = None

    def own(self) -> dict[str, str]:
        """Return the method, and the route where routing has found one."""
        pairs = {"method": self._method} if self._method else {}
        if route := route_template(self._routing):
            pairs["route"] = route
        return pairs


_ROUTING_KEYS = ("route", "router", "fastapi", "app_root_path", "root_path")


def route_template(scope: Scope) -> str:
    """
    Return the path template of the route that serves this scope, "" if none does (yet).

    Never the raw path, so that there are as many values as routes. What the
    router left in the scope is all that is used: `route`, FastAPI's effective
    route of an included router (0.120 and later keep the router's prefix only
    there), and for mounted apps the templates of the mounts on the way.
    """
    route = scope.get("route")
    if getattr(route, "routes", None):
        return ""  # a mount whose own routes did not match
    context = scope.get("fastapi", {}).get("effective_route_context")
    path = getattr(context, "path_format", None) or getattr(route, "path", None)
    if not isinstance(path, str):
        return ""
    return _mount_template(scope) + path or "/"


def _mount_template(scope: Scope) -> str:
    # Set by starlette's Mount: the root path before the first mount.
    outer = scope.get("app_root_path")
    if outer is None:
        return ""
    mounted = scope.get("root_path", "")[len(outer) :]
    return _match_mounts(getattr(scope.get("router"), "routes", ()), mounted)


def _match_mounts(routes: Any, mounted: str) -> str:
    for mount in routes:
        regex, routes_below = (
            getattr(mount, "path_regex", None),
            getattr(mount, "routes", None),
        )
        if regex is None or not routes_below or not (match := regex.match(mounted + "/")):
            continue
        rest = match.groupdict().get("path", "").rstrip("/")
        return cast(str, mount.path) + (_match_mounts(routes_below, "/" + rest) if rest else "")
    return ""
