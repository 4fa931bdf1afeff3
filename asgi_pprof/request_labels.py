"""The labels of a request: its method, and the template of the route that serves it."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any, cast

from starlette.types import Scope

from asgi_pprof.labels import LabelSet, clip, unreadable
from asgi_pprof.native.core import LabelNode
from asgi_pprof.runtime.own_work import OwnLabels


class RequestLabels(LabelNode):
    """
    The label set of one request.

    The route is known only after routing, so it is looked up in the scope when a
    sample is read. `finish` releases the scope at the end of the request: a task
    that outlives the request keeps the template alive, not the request.
    """

    __slots__ = ("_headers", "_method", "_routing", "outer")

    def __init__(self, scope: Scope, around: LabelSet | None = None) -> None:
        is_websocket = scope.get("type") == "websocket"
        method: str = WEBSOCKET if is_websocket else scope.get("method", "")
        self._method = method if not method or method in _METHODS else "other"
        self._headers = scope.get("headers")
        self._routing: Scope = scope
        self.outer = self._without_other_requests(around) if around is not None else None

    def _without_other_requests(self, around: LabelSet) -> LabelSet | None:
        # A server may start a request in the context of an earlier one on the same
        # connection (uvicorn does, after a large body and when requests are
        # pipelined). The labels of the earlier one must not apply here, nor accumulate.
        link: LabelSet | None = around
        while link is not None:
            if isinstance(link, OwnLabels):
                return self._without_other_requests(link.around) if link.around else None
            if isinstance(link, RequestLabels) and link._headers is not self._headers:
                return link.outer
            link = link.outer
        return around

    def finish(self) -> None:
        """Release the scope, except for the keys that name the route."""
        scope = self._routing
        self._routing = {key: scope[key] for key in _ROUTING_KEYS if key in scope}
        if "path_params" in scope:
            self._routing["path_params"] = dict.fromkeys(scope["path_params"])  # without values
        self._headers = None

    def own(self) -> dict[str, str]:
        """Return the method, and the route if routing has found one."""
        pairs = {"method": self._method} if self._method else {}
        try:
            route = clip(route_template(self._routing))
        except Exception as error:  # of a route of the application's own class
            route = unreadable(error)
        if route:
            pairs["route"] = route
        return pairs


WEBSOCKET = "WEBSOCKET"
"""The method of a websocket."""

# A client may send any other, as long as it likes and as many different ones.
_METHODS = frozenset(
    ("GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH", "QUERY")
    + (WEBSOCKET,)
)
_ROUTING_KEYS = (
    *("route", "router", "fastapi", "app_root_path", "root_path", "endpoint", "path_template"),
)


def route_template(scope: Scope) -> str:
    """
    Return the path template of the route that serves this scope, "" if none is known.

    Never returns the raw path, so there are no more values than routes. Reads only
    what routers leave in the scope: `route`; FastAPI's effective route of an included
    router (since 0.120 the only place that has the router's prefix); for mounted apps,
    the templates of the mounts that led there; `endpoint`, if there is no `route`, as
    with starlette before 1.0; Litestar's `path_template`.
    """
    route = scope.get("route")
    if route is None:
        return _template_of_endpoint(scope) or _text(scope.get("path_template"))
    if getattr(route, "routes", None):
        return ""  # a mount, none of whose routes matched
    context = scope.get("fastapi", {}).get("effective_route_context")
    path = getattr(context, "path_format", None) or getattr(route, "path", None)
    return _mount_template(scope) + path or "/" if isinstance(path, str) else ""


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def _mount_template(scope: Scope) -> str:
    # starlette's Mount keeps the root path from before the first mount there.
    outer = scope.get("app_root_path")
    if outer is None:
        return ""
    mounted = scope.get("root_path", "")[len(outer) :]
    return _match_mounts(getattr(scope.get("router"), "routes", ()), mounted)


def _match_mounts(routes: Any, mounted: str) -> str:
    for mount in routes:
        regex, inner = getattr(mount, "path_regex", None), getattr(mount, "routes", None)
        if regex is None or not inner or not (match := regex.match(mounted + "/")):
            continue
        rest = match.groupdict().get("path", "").rstrip("/")
        return cast(str, mount.path) + (_match_mounts(inner, "/" + rest) if rest else "")
    return ""


# The templates of a router's routes by endpoint and names of parameters.
_Index = dict[tuple[int, frozenset[str]], str]
# By id of the router, which need not be hashable: a weak reference whose callback removes
# the entry, the ids of the router's routes, and the index.
_indices: dict[int, tuple[object, tuple[int, ...], _Index]] = {}


def _template_of_endpoint(scope: Scope) -> str:
    """Return the one route of the outermost router that has the scope's endpoint, "" if several."""
    endpoint, router = scope.get("endpoint"), scope.get("router")
    if endpoint is None or not (routes := getattr(router, "routes", None)):
        return ""
    number, state = id(router), tuple(map(id, routes))
    known = _indices.get(number)
    if known is None or known[1] != state:
        reference = weakref.ref(router, lambda _: _indices.pop(number, None))
        known = _indices[number] = reference, state, _index(routes)
    return known[2].get((id(endpoint), frozenset(scope.get("path_params", ()))), "")


def _index(routes: Any) -> _Index:
    index: _Index = {}
    for template, names, endpoint in _leaves(routes, "", frozenset()):
        key = id(endpoint), names
        index[key] = template if index.get(key, template) == template else ""
    return index


def _leaves(
    routes: Any, prefix: str, outer: frozenset[str]
) -> Iterator[tuple[str, frozenset[str], object]]:
    for route in routes:
        template = prefix + getattr(route, "path", "")
        names = outer.union(getattr(route, "param_convertors", ()))
        if (endpoint := getattr(route, "endpoint", None)) is not None:
            yield template or "/", names, endpoint
            continue
        names -= {"path"} - outer  # what is left of the path for a mounted application
        if inner := getattr(route, "routes", None):
            yield from _leaves(inner, template, names)
        else:
            yield template, names, getattr(route, "app", None)
