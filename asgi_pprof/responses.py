"""
Responses with Go's statuses and headers.

Source: net/http/pprof/pprof.go; net/http, Error and Redirect.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping
from contextlib import aclosing, asynccontextmanager, suppress
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from asgi_pprof.encoders.protobuf import encode
from asgi_pprof.errors import Cancelled, PprofError
from asgi_pprof.offload import run_in_thread
from asgi_pprof.profile import Profile
from asgi_pprof.runtime.own_work import own_work
from asgi_pprof.runtime.tasks import hidden

_PIECE = 32_768  # letters of a dump that are sent at a time
_BUFFERED = 2048  # net/http: a longer body is sent in chunks, without its length
_LAST_S = 1.0  # for the error of a cancelled request: its client may not read
_COMPRESSORS = re.compile(r"gzip|brotli|zstd|compress", re.IGNORECASE)


def response(
    body: str | bytes,
    media_type: str,
    status: int = 200,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """Return a response that browsers do not reinterpret as another type."""
    if isinstance(body, str):
        body = _utf8(body)
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


def failure_response() -> Response:
    """Return the response to a request for which there is an error of ours in the log."""
    return error_response("failed to collect profile", 500)


def redirect_response(location: str) -> Response:
    """Return Go's temporary redirect."""
    href = location.replace("&", "&amp;").replace('"', "&#34;").replace("<", "&lt;")
    body = f'<a href="{href}">Temporary Redirect</a>.\n\n'
    return Response(body, 307, {"Location": location}, "text/html")


class DumpResponse(Response):
    """
    A response whose text is sent while it is made.

    Args:
        pieces: The text. If it fails before the first are sent, the response is an
            error, later its last line says so.
        on_failure: Called in an `except` block, to log.
    """

    media_type = "text/plain"

    def __init__(self, pieces: AsyncGenerator[str, None], on_failure: Callable[[], None]) -> None:
        super().__init__(headers={"X-Content-Type-Options": "nosniff"})
        del self.headers["content-length"]
        self._pieces = pieces
        self._on_failure = on_failure
        self._is_started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response, or an error; all work ends when the client leaves."""
        try:
            async with while_connected(receive), aclosing(self._bodies()) as bodies:
                await self._send(bodies, scope["method"] == "HEAD", send)
        except Cancelled as error:
            async with last_words():
                await self._fail(error, scope, receive, send)
        except PprofError as error:
            await self._fail(error, scope, receive, send)
        except Exception:
            self._on_failure()
            await self._fail(None, scope, receive, send)

    async def _send(self, bodies: AsyncGenerator[bytes, None], is_head: bool, send: Send) -> None:
        first = await anext(bodies)
        if len(first) < _BUFFERED:  # then it is all there is
            self.headers["content-length"] = str(len(first))
        self._is_started = True
        start = {"status": self.status_code, "headers": self.raw_headers}
        await send({"type": "http.response.start", **start})
        await send(_body(b"" if is_head else first))
        async for body in bodies:
            if is_head:
                break
            await send(_body(body))
        await send(_body(b"", more=False))

    async def _fail(
        self, error: PprofError | None, scope: Scope, receive: Receive, send: Send
    ) -> None:
        if self._is_started:
            reason = "and the reason is in the log" if error is None else str(error)
            text = f"\nfailed: the rest is missing, {reason}\n"
            await send(_body(_utf8(text), more=False))
        else:
            response = error_response(str(error), error.status) if error else failure_response()
            await response(scope, receive, send)

    async def _bodies(self) -> AsyncGenerator[bytes, None]:
        texts: list[str] = []
        size = 0
        async with aclosing(self._pieces) as pieces:
            async for text in pieces:
                texts.append(text)
                size += len(text)
                if size >= _PIECE:
                    yield _utf8("".join(texts))
                    texts, size = [], 0
        yield _utf8("".join(texts))


async def made_in_thread(texts: Iterator[str]) -> AsyncGenerator[str, None]:
    """Yield the texts in pieces, each of them made on a thread."""

    def piece() -> str:
        made: list[str] = []
        size = 0
        for text in texts:
            made.append(text)
            size += len(text)
            if size >= _PIECE:
                break
        return "".join(made)

    while text := await run_in_thread(piece):
        yield text


def _body(body: bytes, more: bool = True) -> dict[str, Any]:
    return {"type": "http.response.body", "body": body, "more_body": more}


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "backslashreplace")  # names may hold lone surrogates


@asynccontextmanager
async def while_connected(receive: Receive) -> AsyncIterator[None]:
    """
    Cancel what runs inside when the client leaves; on asyncio only.

    Raises:
        Cancelled: It has left, or the server has cancelled the request.
    """
    this = asyncio.current_task() if asyncio._get_running_loop() else None
    if this is None:
        yield
        return
    gone = False

    @own_work
    async def watch() -> None:
        nonlocal gone
        message = await receive()
        while message["type"] == "http.request" and message.get("more_body", False):
            message = await receive()
        # Behind the body comes the disconnect; a middleware that replays the
        # body for ever says nothing, and must not be asked for ever.
        if message["type"] != "http.disconnect":
            message = await receive()
        if message["type"] == "http.disconnect":
            gone = True
            this.cancel()

    task = asyncio.create_task(watch(), name="asgi_pprof client watch")
    try:
        with hidden(task):
            try:
                yield
            finally:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
    except asyncio.CancelledError:
        if gone:
            this.uncancel()
        raise Cancelled from None


@asynccontextmanager
async def last_words() -> AsyncIterator[None]:
    """
    Let the error of a cancelled request be sent, for a second at most.

    A server that ends cancels its requests. It takes the exception for a failure, and
    logs it, so a cancelled request is answered as in Go. It must end all the same.
    """
    with suppress(TimeoutError):
        async with asyncio.timeout(_LAST_S):
            yield


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
