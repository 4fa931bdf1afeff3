"""
Decides whether a request is for us, and for which profile.

Paths are matched as by Go's ServeMux. They are decoded first, but an encoded slash is
not a separator. A path that is not clean (`//`, `.`, `..`) is redirected to the clean
one, if that is ours. A trailing slash belongs to the name.

Source: net/http, ServeMux and cleanPath; starlette, get_route_path.
"""

from __future__ import annotations

import posixpath
import re
from dataclasses import dataclass
from urllib.parse import quote, unquote

from starlette.types import Scope

# Represents %2F in a decoded path; unquote never returns a lone surrogate.
_ENCODED_SLASH = "\ud800"


@dataclass(frozen=True, slots=True)
class Target:
    """
    The profile that a request is for.

    Args:
        name: The profile's name, "" for the index.
        redirect: The location to send the client to, "" to answer the request.
    """

    name: str
    redirect: str = ""


def locate(scope: Scope, prefix: str) -> Target | None:
    """
    Return the profile that an HTTP request is for, None if it is not for us.

    Args:
        scope: Its path may or may not start with its `root_path`: servers,
            proxies and mounts differ.
        prefix: The path of the index below the root path, such as "/debug/pprof";
            "" for an app that is itself mounted.
    """
    path = _path_below_root(scope)
    clean = _clean(path)
    if clean != prefix and not clean.startswith(f"{prefix}/"):
        return None
    rest = clean[len(prefix) :]
    name = rest[1:].replace(_ENCODED_SLASH, "/")
    if not rest or clean != path:
        return Target(name, redirect=_location(scope, clean if rest else f"{clean}/"))
    return Target(name)


def _path_below_root(scope: Scope) -> str:
    path, root = _matching_path(scope), _root_path(scope)
    # Behind a proxy that strips its prefix, the root path of a mount is the prefix
    # and the mount's path; the request's path has only the latter.
    outermost = scope.get("app_root_path")
    mount = root.removeprefix(outermost.rstrip("/")) if isinstance(outermost, str) else ""
    # Servers decode root paths completely, slashes too.
    flat = path.replace(_ENCODED_SLASH, "/")
    for above in (root, mount):
        if above and (flat == above or flat.startswith(f"{above}/")):
            return path[len(above) :]
    return path


def _root_path(scope: Scope) -> str:
    return (scope.get("root_path") or "").rstrip("/")


def _matching_path(scope: Scope) -> str:
    """Return the decoded path, with `_ENCODED_SLASH` for each encoded slash."""
    path: str = scope["path"]
    raw_path = scope.get("raw_path")
    raw = raw_path.partition(b"?")[0].decode("latin-1") if isinstance(raw_path, bytes) else ""
    if "%2f" not in raw.lower() or unquote(raw) != path:
        return path  # nothing encoded, or a middleware has rewritten the path
    pieces = re.split("%2f", raw, flags=re.IGNORECASE)
    return _ENCODED_SLASH.join(map(unquote, pieces))


def _clean(path: str) -> str:
    """Return the path without empty and dot segments, as Go's cleanPath."""
    if not path:
        return ""
    clean = posixpath.normpath("/" + path.lstrip("/"))
    return clean + "/" if path.endswith("/") and clean != "/" else clean


def _location(scope: Scope, path: str) -> str:
    query = scope.get("query_string", b"").decode("latin-1")
    root = _root_path(scope)
    # A leading "//" would name another host.
    location = "/" + "%2F".join(map(quote, f"{root}{path}".split(_ENCODED_SLASH))).lstrip("/")
    return f"{location}?{query}" if query else location
