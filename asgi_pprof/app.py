"""
The ASGI application behind /debug/pprof/: one method per endpoint.

Every status, header and error text is Go's, where Go has the thing. What is
slow (encoding, compressing, text) runs on a thread; what waits (profiles of
some seconds) ends as soon as the client has gone.

Source: net/http/pprof/pprof.go.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import sys
import time
import weakref
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from asgi_pprof.address_book import AddressBook
from asgi_pprof.collectors.cpu.collector import CpuCollector
from asgi_pprof.collectors.goroutine.collector import Rank
from asgi_pprof.collectors.heap.memstats import mem_stats_text, read_mem_stats
from asgi_pprof.collectors.heap.sampler import DEFAULT_RATE, heap_sampler
from asgi_pprof.collectors.stall.stalls import DEFAULT_THRESHOLD_MS
from asgi_pprof.collectors.stats import stats_text
from asgi_pprof.encoders.protobuf import encode
from asgi_pprof.encoders.text import (
    contention_text,
    count_text,
    goroutine_text,
    heap_text,
)
from asgi_pprof.errors import BadParameter, ClientGone, PprofError
from asgi_pprof.guard import Guard, allow_loopback
from asgi_pprof.merge import subtract
from asgi_pprof.offload import run_in_thread
from asgi_pprof.params import Params
from asgi_pprof.paths import locate
from asgi_pprof.profile import Goroutine, Profile
from asgi_pprof.registry import SPECIAL, NamedProfile, Registry
from asgi_pprof.runtime.gc_pauses import gc_pauses
from asgi_pprof.switches import HeapEngine, Switches
from asgi_pprof.web import index_page

_BUFFERED = 2048  # net/http: a longer body is sent in chunks, without its length
_LONGEST_WAIT_S = 3600.0  # timers of years are not every loop's strength
_COMPRESSORS = re.compile(r"gzip|brotli|zstd|compress", re.IGNORECASE)

logger = logging.getLogger("asgi_pprof")


class PprofApp:
    """
    The profiles as an application of their own, to mount where you like.

        app.mount("/debug/pprof", PprofApp())

    By default only direct requests from this machine are answered.

    Args:
        heap: "tracemalloc" to trace every allocation from now on (slow: see
            docs/profiles.md), None to sample them.
        memory_profile_rate: Mean bytes from one sample to the next, as Go's
            MemProfileRate; 1 takes every allocation, 0 none.
        track_tasks: Whether to note who makes tasks, through the loop's task
            factory, and since when they wait.
        block_profile_rate: Record waits for locks, queues and threads, on average
            one for every so many nanoseconds of waiting, as Go's
            SetBlockProfileRate; 0 leaves that to `set_block_profile_rate`.
        mutex_profile_fraction: Record one in so many releases of locks that
            others waited for, as Go's SetMutexProfileFraction; 0 leaves that
            to `set_mutex_profile_fraction`.
        wrap_lock_classes: Whether to replace `threading.Lock` and `RLock`, while a
            rate is set, by classes that record the waits for them too: see
            docs/profiles.md for what they change.
        stall_threshold_ms: Record what held an event loop for at least so many
            milliseconds, while it was held; 0 to watch no loop.
        prefix: What comes before the names in the path; "" when mounted.
        guard: Who may come in.
    """

    def __init__(
        self,
        *,
        heap: HeapEngine | None = None,
        memory_profile_rate: int = DEFAULT_RATE,
        track_tasks: bool = True,
        block_profile_rate: int = 0,
        mutex_profile_fraction: int = 0,
        wrap_lock_classes: bool = False,
        stall_threshold_ms: float = DEFAULT_THRESHOLD_MS,
        prefix: str = "",
        guard: Guard = allow_loopback,
    ) -> None:
        self._prefix = prefix
        self._guard = guard
        self._registry = Registry()
        self._cpu = CpuCollector()
        self._addresses = AddressBook()
        self._switches = Switches(
            heap,
            memory_profile_rate,
            track_tasks,
            block_profile_rate,
            mutex_profile_fraction,
            wrap_lock_classes,
            stall_threshold_ms,
        )
        self.open()
        # An app that is dropped without a shutdown must leave nothing behind either.
        weakref.finalize(self, self._switches.off).atexit = False

    def open(self) -> None:
        """
        Switch on what records all the time: memory, threads' starts, garbage collections.

        Called on a running loop, its tasks as well; else with its first request.
        """
        self._switches.on()

    def close(self) -> None:
        """Put back everything that `open` and the constructor switched on; requests still work."""
        self._switches.off()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1008, "reason": ""})
        elif scope["type"] == "http":
            self._switches.attach()
            scope = {"method": "GET", "query_string": b"", "headers": [], **scope}
            response = await self._respond(Request(scope, receive), send)
            await response(scope, receive, send)

    async def _respond(self, request: Request, send: Send) -> Response:
        try:
            self._guard(request.scope)
            response = await self._route(request)
        except PprofError as error:
            response = _error_response(str(error), error.status)
        except Exception:
            logger.exception("asgi_pprof failed to answer %s", request.url.path)
            response = _error_response("failed to collect profile", 500)
        if len(response.body) >= _BUFFERED and request.scope.get("http_version") != "1.0":
            del response.headers["content-length"]
        if response.media_type == "application/octet-stream" and _compressed_outside(request, send):
            # Profiles are gzip already. The one header that compressing
            # middlewares respect; on its own it would not be sent.
            response.headers["content-encoding"] = "identity"
        if request.method == "HEAD":
            response.body = b""
        return response

    async def _route(self, request: Request) -> Response:
        target = locate(request.scope, self._prefix)
        name = target.name if target else ""
        if request.method not in ("GET", "HEAD") and not (
            request.method == "POST" and name == "symbol"
        ):
            allowed = "GET, HEAD, POST" if name == "symbol" else "GET, HEAD"
            return _text_response("Method Not Allowed\n", 405, {"Allow": allowed})
        if target and target.redirect:
            return _redirect(target.redirect)
        endpoint = {
            "": self._index,
            "cmdline": self._cmdline,
            "profile": self._profile,
            "stats": self._stats,
            "symbol": self._symbol,
        }.get(name, partial(self._named, name))
        return await endpoint(request)

    async def _index(self, request: Request) -> Response:
        try:
            stats = await stats_text()
        except Exception:  # of a foreign loop or task: the rest of the page is needed most then
            logger.exception("asgi_pprof failed to read the figures of the index")
            stats = "failed: the reason is in the log\n"
        rows = [
            *(
                (
                    profile.name,
                    profile.collector.count(),
                    profile.description,
                    profile.collector.note(),
                )
                for profile in self._registry.profiles()
            ),
            *(
                (name, 0, description, self._cpu.note() if name == "profile" else "")
                for name, description in SPECIAL.items()
            ),
        ]
        return _response(index_page(sorted(rows), stats), "text/html")

    async def _cmdline(self, request: Request) -> Response:
        arguments = map(os.fsencode, sys.orig_argv or sys.argv)
        return _response(b"\0".join(arguments), "text/plain")

    async def _symbol(self, request: Request) -> Response:
        if request.method == "POST":
            return _text_response(await self._addresses.answer(request.stream()))
        return _text_response(await self._addresses.answer(_once(request.scope["query_string"])))

    async def _stats(self, request: Request) -> Response:
        return _text_response(await stats_text())

    async def _profile(self, request: Request) -> Response:
        params = _params(request)
        seconds, hz = params.cpu_seconds, params.hz
        async with _watched(request) as gone:
            profile = await self._cpu.collect(seconds, gone, hz)
            if gone.is_set():
                raise ClientGone
        return await _binary_response(lambda: profile, "profile")

    async def _named(self, name: str, request: Request) -> Response:
        served = self._registry.lookup(name)
        params = _params(request)
        if params.delta:
            return await self._delta(served, params, request)
        if params.gc and name == "heap":
            gc_pauses.collect()
        if params.debug >= 2 and name in ("goroutine", "goroutineleak"):
            tasks = self._registry.leaks if name == "goroutineleak" else self._registry.tasks
            return _text_response(await _goroutine_dump(tasks.goroutines()))
        make_profile = await served.collector.snapshot()
        if params.debug == 0:
            return await _binary_response(lambda: served.estimate(make_profile()), name)
        return _text_response(await run_in_thread(lambda: self._text(served, make_profile())))

    async def _delta(self, served: NamedProfile, params: Params, request: Request) -> Response:
        seconds = params.delta_seconds
        if served.custom:
            raise BadParameter('"seconds" parameter is not supported for this profile type')
        if params.debug != 0:
            raise BadParameter("seconds and debug params are incompatible")
        with served.collector.window():
            before = await served.collector.snapshot()
            started_ns = time.monotonic_ns()
            async with _watched(request) as gone:
                await _wait(gone, seconds)
            after = await served.collector.snapshot()
            duration_ns = time.monotonic_ns() - started_ns

        def make_delta() -> Profile:
            # In this order: the first one's totals are part of what the second is measured by.
            first = served.estimate(before())
            second = served.estimate(after())
            return replace(subtract(second, first), duration_ns=duration_ns)

        return await _binary_response(make_delta, f"{served.name}-delta")

    def _text(self, served: NamedProfile, profile: Profile) -> str:
        self._addresses.remember(profile)
        if served.text == "heap":
            live_bytes = sum(sample.values[3] for sample in served.estimate(profile).samples)
            stats = read_mem_stats(live_bytes, heap_sampler.counters())
            return heap_text(profile, mem_stats_text(stats))
        if served.text == "contention":
            return contention_text(served.name, profile)
        return count_text(served.name, profile)


async def _goroutine_dump(tasks: AsyncIterator[tuple[Rank, Goroutine]]) -> str:
    # Text at once: 100,000 kept tasks would mean long collections of garbage.
    texts = [(rank, goroutine_text(task)) async for rank, task in tasks]
    return await run_in_thread(lambda: "\n".join(text for _, text in sorted(texts)))


def _params(request: Request) -> Params:
    return Params(request.scope["query_string"])


@asynccontextmanager
async def _watched(request: Request) -> AsyncIterator[asyncio.Event]:
    """Give an event that is set when the client leaves."""
    gone = asyncio.Event()

    async def watch() -> None:
        message = await request.receive()
        while message["type"] == "http.request" and message.get("more_body", False):
            message = await request.receive()
        # Behind the body comes the disconnect; a middleware that replays the
        # body for ever says nothing, and must not be asked for ever.
        if message["type"] != "http.disconnect":
            message = await request.receive()
        if message["type"] == "http.disconnect":
            gone.set()

    task = asyncio.create_task(watch(), name="asgi_pprof client watch")
    try:
        yield gone
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _wait(gone: asyncio.Event, seconds: int) -> None:
    """
    Wait that long.

    Raises:
        ClientGone: The client left first.
    """
    end = time.monotonic() + seconds  # uvloop's own clock may stop a millisecond short
    while not gone.is_set() and (left := end - time.monotonic()) > 0:
        try:
            await asyncio.wait_for(gone.wait(), min(left, _LONGEST_WAIT_S))
        except TimeoutError:
            continue
    if gone.is_set():
        raise ClientGone


async def _once(chunk: bytes) -> AsyncIterator[bytes]:
    yield chunk


def _response(
    body: str | bytes,
    media_type: str,
    status: int = 200,
    headers: Mapping[str, str] | None = None,
) -> Response:
    if isinstance(body, str):
        body = body.encode("utf-8", "backslashreplace")  # names may hold lone surrogates
    fields = {"X-Content-Type-Options": "nosniff", **(headers or {})}
    return Response(body, status, fields, media_type)


def _text_response(
    text: str, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    return _response(text, "text/plain", status, headers)


async def _binary_response(make_profile: Callable[[], Profile], name: str) -> Response:
    body = await run_in_thread(lambda: encode(make_profile()))
    # Header values are latin-1 here and bytes on the wire; a name goes out as UTF-8, as it is.
    filename = name.encode("utf-8", "backslashreplace").decode("latin-1")
    headers = {"Content-Disposition": f'attachment; filename="{filename}"'}
    return _response(body, "application/octet-stream", headers=headers)


def _error_response(message: str, status: int) -> Response:
    # pprof shows our words only with this header, and only from text/plain.
    return _text_response(f"{message}\n", status, {"X-Go-Pprof": "1"})


def _redirect(location: str) -> Response:
    href = location.replace("&", "&amp;").replace('"', "&#34;").replace("<", "&lt;")
    body = f'<a href="{href}">Temporary Redirect</a>.\n\n'
    return Response(body, 307, {"Location": location}, "text/html")


def _compressed_outside(request: Request, send: Send) -> bool:
    """Tell whether a middleware around us would compress the response once more."""
    if "accept-encoding" not in request.headers:
        return False
    names = [type(getattr(send, "__self__", None)).__name__]
    for each in getattr(request.scope.get("app"), "user_middleware", ()):  # outermost first
        name = getattr(each.cls, "__name__", "")
        if name == "PprofMiddleware":
            break
        names.append(name)
    return any(map(_COMPRESSORS.search, names))
