"""
Responses with Go's statuses and headers.

Source: net/http/pprof/pprof.go; net/http, Error and Redirect.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Send

from asgi_pprof.encoders.protobuf import encode
from asgi_pprof.offload import run_in_thread
from asgi_pprof.profile import Profile

_BUFFERED = 2048  # net/http: a longer body is sent in chunks, without its length
_COMPRESSORS = re.compile(r"gzip|brotli|zstd|compress", re.IGNORECASE)


def response(
    body: str | bytes,
    media_type: str,
    status: int = 200,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """Return a response that browsers do not reinterpret as another type."""
    if isinstance(body, str):
        body = body.encode("utf-8", "backslashreplace")  # names may hold lone surrogates
    fields = {"X-Content-Type-Options": "nosniff", **(headers or {})}
    return Response(body, status, fields, media_type)


def text_response(
    text: str, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """Return a text/plain response."""
    return response(text, "text/plain", status, headers)


def error_response(message: str, status: int) -> Response:
    """Return an error whose message `go tool pprof` prints."""
    # It prints the body only with this header, and only of text/plain.
    return text_response(f"{message}\n", status, {"X-Go-Pprof": "1"})


def redirect_response(location: str) -> Response:
    """Return Go's temporary redirect."""
    href = location.replace("&", "&amp;").replace('"', "&#34;").replace("<", "&lt;")
    body = f'<a href="{href}">Temporary Redirect</a>.\n\n'
    return Response(body, 307, {"Location": location}, "text/html")


async def profile_response(make_profile: Callable[[], Profile], name: str) -> Response:
    """Make a profile and encode it, both on a thread; return it as a file of that name."""
    body = await run_in_thread(lambda: encode(make_profile()))
    # Header values are latin-1 here and bytes on the wire; a name goes out as UTF-8, as it is.
    filename = name.encode("utf-8", "backslashreplace").decode("latin-1")
    headers = {"Content-Disposition": f'attachment; filename="{filename}"'}
    return response(body, "application/octet-stream", headers=headers)


def fit_to_request(response: Response, request: Request, send: Send) -> None:
    """Adjust a response's headers and body to the request, as net/http does."""
    if len(response.body) >= _BUFFERED and request.scope.get("http_version") != "1.0":
        del response.headers["content-length"]
    if response.media_type == "application/octet-stream" and _is_compressed_outside(request, send):
        # Profiles are gzip already. Compressing middlewares respect this header
        # alone; on its own it would not be sent.
        response.headers["content-encoding"] = "identity"
    if request.method == "HEAD":
        response.body = b""


def _is_compressed_outside(request: Request, send: Send) -> bool:
    """Return whether a middleware around us would compress the response once more."""
    if "accept-encoding" not in request.headers:
        return False
    names = [type(getattr(send, "__self__", None)).__name__]
    for each in getattr(request.scope.get("app"), "user_middleware", ()):  # outermost first
        name = getattr(each.cls, "__name__", "")
        if name == "PprofMiddleware":
            break
        names.append(name)
    return any(map(_COMPRESSORS.search, names))
