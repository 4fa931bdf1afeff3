"""
The ASGI application behind /debug/pprof/, which answers as Go's net/http/pprof does.

    /debug/pprof/               the index: all profiles, and figures of the process
    /debug/pprof/profile        CPU profile of the next `seconds` (30), `hz` samples a second (100)
    /debug/pprof/goroutine      all asyncio tasks; with `debug=2` one by one
    /debug/pprof/goroutineleak  tasks that nothing can wake any more; with `debug=2` all, marked
    /debug/pprof/heap           memory in use; `gc=1` runs a garbage collection first
    /debug/pprof/allocs         the same, showing all past allocations
    /debug/pprof/block          waits for locks, queues and threads
    /debug/pprof/mutex          releases of locks that others waited for
    /debug/pprof/stall          code that kept an event loop from running
    /debug/pprof/thread         all threads
    /debug/pprof/threadcreate   code that started threads
    /debug/pprof/NAME           a profile that the application keeps itself
    /debug/pprof/stats          figures of loops, pools, garbage collection and memory, as text
    /debug/pprof/cmdline        the command line
    /debug/pprof/symbol         names of functions, for addresses of debug=1 texts

Profiles are gzipped protobuf for `go tool pprof`; with `debug=1` they are text.
With `seconds=N` built-in ones cover the next N seconds instead of all the time
before. docs/endpoints.md has the whole contract.

Statuses, headers and error texts are Go's. Slow work (naming, encoding,
compressing) runs on a thread. All work for a client ends as soon as it disconnects.

Source: net/http/pprof/pprof.go.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import time
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, suppress
from dataclasses import dataclass, replace
from functools import partial

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from asgi_pprof.address_book import AddressBook
from asgi_pprof.collectors.cpu.collector import CpuCollector
from asgi_pprof.collectors.heap.sampler import DEFAULT_RATE
from asgi_pprof.collectors.stall.watch import DEFAULT_THRESHOLD_MS
from asgi_pprof.collectors.stats import Stats
from asgi_pprof.encoders.text import goroutine_text
from asgi_pprof.encoders.top import cpu_text
from asgi_pprof.errors import BadParameter, Cancelled, PprofError, ProfileUnavailable
from asgi_pprof.guard import Guard, allow_loopback
from asgi_pprof.merge import subtract
from asgi_pprof.params import Params
from asgi_pprof.paths import Target, locate
from asgi_pprof.profile import Goroutine, Profile
from asgi_pprof.recorders import HeapEngine, UsedRecorders, gc_pauses, memory_bytes, stall_watch
from asgi_pprof.registry import DESCRIPTIONS, NamedProfile, Registry
from asgi_pprof.responses import (
    DumpResponse,
    error_response,
    failure_response,
    fit_to_request,
    last_words,
    made_in_thread,
    profile_response,
    redirect_response,
    response,
    text_response,
    while_connected,
)
from asgi_pprof.runtime.own_work import own_request, own_work
from asgi_pprof.web import index_page

_LONGEST_WAIT_S = 3600.0  # not every loop takes timers of years

logger = logging.getLogger("asgi_pprof")


@dataclass(frozen=True, slots=True)
class _Endpoint:
    answer: Callable[[Request], Awaitable[Response]]
    methods: tuple[str, ...] = ("GET", "HEAD")


class PprofApp:
    """
    The profiles as an application of their own, to mount where you like.

        app.mount("/debug/pprof", PprofApp())

    By default only direct requests from this machine are answered.

    The other arguments are described at `PprofMiddleware`.

    Args:
        prefix: The part of the path before the names; "" when mounted.
        guard: Raises AccessDenied for requests that are not to be answered.

    Raises:
        ValueError: `heap` is unknown, or a rate or the threshold is negative.
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
        self._figures = Stats(
            stall_watch, gc_pauses, lambda: memory_bytes() + self._addresses.memory_bytes()
        )
        self._recorders = UsedRecorders(
            heap,
            memory_profile_rate,
            track_tasks,
            block_profile_rate,
            mutex_profile_fraction,
            wrap_lock_classes,
            stall_threshold_ms,
        )
        self._endpoints = {
            "": _Endpoint(self._index),
            "cmdline": _Endpoint(self._cmdline),
            "profile": _Endpoint(self._profile),
            "stats": _Endpoint(self._stats),
            "symbol": _Endpoint(self._symbol, ("GET", "HEAD", "POST")),
        }
        self.open()
        # An app that is dropped without a shutdown leaves nothing behind either.
        weakref.finalize(self, self._recorders.off).atexit = False

    @own_work
    def open(self) -> None:
        """
        Start all that records while the app lives: memory, starts of threads, garbage collections.

        On a running loop its tasks and stalls are recorded as well; else from its
        first request on.
        """
        self._recorders.on()

    @own_work
    def close(self) -> None:
        """Put back everything that `open` and the constructor started; requests still work."""
        self._recorders.off()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1008, "reason": ""})
        elif scope["type"] == "http":
            await self.answer(locate(scope, self._prefix), scope, receive, send)

    @own_work
    async def answer(
        self, target: Target | None, scope: Scope, receive: Receive, send: Send
    ) -> None:
        """
        Answer an HTTP request.

        Args:
            target: What it asks for, as `locate` found; None if that is nothing of ours.
        """
        with own_request(scope):
            await self._answer(target, scope, receive, send)

    async def _answer(
        self, target: Target | None, scope: Scope, receive: Receive, send: Send
    ) -> None:
        self._recorders.resume()
        request = Request({"method": "GET", "query_string": b"", "headers": [], **scope}, receive)
        try:
            self._guard(request.scope)
            reply = await self._route(target, request)
        except Cancelled as error:
            async with last_words():
                await error_response(str(error), error.status)(request.scope, receive, send)
            return
        except PprofError as error:
            reply = error_response(str(error), error.status)
        except Exception:
            _log_failure("to answer", request.scope.get("path"))
            reply = failure_response()
        fit_to_request(reply, request, send)
        await reply(request.scope, receive, send)

    async def _route(self, target: Target | None, request: Request) -> Response:
        name = target.name if target else ""
        endpoint = self._endpoints.get(name) or _Endpoint(partial(self._named, name))
        if request.method not in endpoint.methods:
            return text_response(
                "Method Not Allowed\n", 405, {"Allow": ", ".join(endpoint.methods)}
            )
        if target and target.redirect:
            return redirect_response(target.redirect)
        if request.method == "POST":
            return await endpoint.answer(request)  # which reads the body
        async with while_connected(request.receive):
            return await endpoint.answer(request)

    async def _index(self, request: Request) -> Response:
        try:
            stats = await self._figures.text()
        except Exception:  # of a foreign loop or task: the rest of the page is needed most then
            _log_failure("to read the figures of", "the index")
            stats = "failed: the reason is in the log\n"
        notes = {"profile": self._cpu.note()}
        rows = [
            (each.name, each.collector.count(), each.description, each.collector.note())
            for each in self._registry.profiles()
        ]
        rows += ((name, 0, text, notes.get(name, "")) for name, text in DESCRIPTIONS.items())
        return response(index_page(sorted(rows), stats), "text/html")

    async def _cmdline(self, request: Request) -> Response:
        arguments = map(os.fsencode, sys.orig_argv or sys.argv)
        return response(b"\0".join(arguments), "text/plain")

    async def _symbol(self, request: Request) -> Response:
        if request.method == "POST":
            return text_response(await self._addresses.answer(request.stream()))
        return text_response(await self._addresses.answer(_once(request.scope["query_string"])))

    async def _stats(self, request: Request) -> Response:
        return text_response(await self._figures.text())

    async def _profile(self, request: Request) -> Response:
        params = _params(request)
        seconds, hz = params.cpu_seconds, params.hz
        _check_loop("profile")
        make_profile = await self._cpu.collect(seconds, asyncio.Event(), hz)
        if params.debug != 0:
            return self._text_response("profile", cpu_text, make_profile)
        return await profile_response(make_profile, "profile")

    async def _named(self, name: str, request: Request) -> Response:
        served = self._registry.lookup(name)
        params = _params(request)
        if served.of_asyncio or params.delta:
            _check_loop(name)
        if params.delta:
            return await self._delta(served, params)
        if params.gc and served.collects_garbage:
            gc_pauses.collect()
        if params.debug >= 2 and served.dump is not None:
            return _dump_response(name, _dump(served.dump()))
        make_profile = await served.collector.snapshot()
        if params.debug == 0:
            return await profile_response(lambda: served.estimate(make_profile()), name)
        return self._text_response(name, partial(served.text, name), make_profile)

    async def _delta(self, served: NamedProfile, params: Params) -> Response:
        seconds = params.delta_seconds
        if served.custom:
            raise BadParameter('"seconds" parameter is not supported for this profile type')
        if params.debug not in (0, 1):
            raise BadParameter("seconds and debug params are incompatible")
        snapshots, times_ns = [], []
        with served.collector.window():
            # From one line, so that the task and the thread that do this are in no difference.
            for wait_s in (0, seconds):
                await _wait(wait_s)
                snapshots.append(await served.collector.snapshot())
                times_ns.append(time.monotonic_ns())

        def make_delta() -> Profile:
            # In this order: the totals of the first are part of what the second is measured by.
            first, second = (served.estimate(snapshot()) for snapshot in snapshots)
            return replace(subtract(second, first), duration_ns=times_ns[1] - times_ns[0])

        if params.debug == 1:
            return self._text_response(served.name, partial(served.text, served.name), make_delta)
        return await profile_response(make_delta, f"{served.name}-delta")

    def _text_response(
        self,
        name: str,
        text: Callable[[Profile], Iterator[str]],
        make_profile: Callable[[], Profile],
    ) -> Response:
        def texts() -> Iterator[str]:
            profile = make_profile()
            self._addresses.remember(profile)
            yield from text(profile)

        return _dump_response(name, made_in_thread(texts()))


def _dump_response(name: str, texts: AsyncGenerator[str, None]) -> Response:
    return DumpResponse(texts, partial(_log_failure, "to answer with", name))


async def _dump(dump: AsyncGenerator[Goroutine, None]) -> AsyncGenerator[str, None]:
    separator = ""
    async with aclosing(dump) as tasks:
        async for task in tasks:
            yield separator + goroutine_text(task)
            separator = "\n"


def _params(request: Request) -> Params:
    return Params(request.scope["query_string"])


def _log_failure(what: str, path: object) -> None:
    with suppress(Exception):  # of a handler of the application's
        logger.exception("asgi_pprof failed %s %s", what, ascii(path))


def _check_loop(name: str) -> None:
    if asyncio._get_running_loop() is None:
        raise ProfileUnavailable(
            f"{name} needs asyncio, and this server runs another library's loop"
        )


async def _wait(seconds: int) -> None:
    end = time.monotonic() + seconds  # uvloop's own clock may stop a millisecond short
    while (left := end - time.monotonic()) > 0:  # noqa: ASYNC110 (nothing else ends it)
        await asyncio.sleep(min(left, _LONGEST_WAIT_S))


async def _once(chunk: bytes) -> AsyncIterator[bytes]:
    yield chunk
