"""Services that use signals, timers or tracemalloc themselves, or two middlewares."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
import tracemalloc

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Mount, Route

from asgi_pprof import PprofApp, PprofMiddleware
from tests.state import process_state

received: list[int] = []
kept: list[bytearray] = []


async def state(request: Request) -> JSONResponse:
    return JSONResponse(process_state())


async def block(request: Request) -> JSONResponse:
    end = time.thread_time() + int(request.path_params["seconds"])
    while time.thread_time() < end:
        pass
    return JSONResponse(None)


async def send_usr1(request: Request) -> JSONResponse:
    os.kill(os.getpid(), signal.SIGUSR1)
    return JSONResponse(None)


async def count_usr1(request: Request) -> JSONResponse:
    return JSONResponse(len(received))


def keep_a_megabyte() -> None:
    kept.append(bytearray(2**20))


async def keep(request: Request) -> JSONResponse:
    keep_a_megabyte()
    return JSONResponse(None)


async def forget(request: Request) -> JSONResponse:
    kept.clear()
    return JSONResponse(None)


async def fork(request: Request) -> JSONResponse:
    """Take a profile in a forked child, and return its status."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            sampling = process_state()["sampling"]
            status = _profile_in_a_new_loop()
            os.write(writer, f"sampling {sampling}, profile {status}".encode())
        finally:
            os._exit(0)
    os.close(writer)
    await asyncio.to_thread(os.waitpid, child, 0)
    with os.fdopen(reader) as answer:
        return JSONResponse(answer.read())


def _profile_in_a_new_loop() -> int:
    messages: list[dict] = []
    scope = {
        "type": "http",
        "method": "GET",
        "path": "/profile",
        "query_string": b"seconds=1",
        "headers": [],
        "client": ("127.0.0.1", 1),
    }

    async def receive():
        await asyncio.sleep(60)

    async def send(message):
        messages.append(message)

    def run() -> None:
        asyncio.events._set_running_loop(None)  # otherwise the parent's loop counts as running
        asyncio.run(PprofApp()(scope, receive, send))

    run()
    return messages[0]["status"]


ROUTES = [
    Route("/state", state),
    Route("/block/{seconds}", block),
    Route("/usr1", send_usr1),
    Route("/usr1-count", count_usr1),
    Route("/keep", keep),
    Route("/forget", forget),
    Route("/fork", fork),
]


@contextlib.asynccontextmanager
async def _counting_usr1(app):
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, received.append, 1)
    yield
    asyncio.get_running_loop().remove_signal_handler(signal.SIGUSR1)


@contextlib.asynccontextmanager
async def _handling_sigprof(app):
    signal.signal(signal.SIGPROF, lambda *arguments: None)
    yield


@contextlib.asynccontextmanager
async def _timing(app):
    signal.signal(signal.SIGPROF, signal.SIG_IGN)
    signal.setitimer(signal.ITIMER_PROF, 1000)
    yield


@contextlib.asynccontextmanager
async def _tracing(app):
    tracemalloc.start()
    yield
    assert tracemalloc.is_tracing()
    tracemalloc.stop()


with_signal_handler = PprofMiddleware(Starlette(routes=ROUTES, lifespan=_counting_usr1))
with_own_handler = PprofMiddleware(Starlette(routes=ROUTES, lifespan=_handling_sigprof))
with_own_timer = PprofMiddleware(Starlette(routes=ROUTES, lifespan=_timing))
tracing_by_itself = PprofMiddleware(Starlette(routes=ROUTES, lifespan=_tracing))
forking = PprofMiddleware(Starlette(routes=ROUTES))

_inner = Starlette(routes=ROUTES)
_inner.add_middleware(PprofMiddleware)
two_of_everything = PprofMiddleware(
    PprofMiddleware(Starlette(routes=[*ROUTES, Mount("/inner", _inner)])), prefix="/other"
)


def __getattr__(name: str) -> PprofMiddleware:
    # Created on demand, because it starts tracing.
    if name == "always_tracing":
        return PprofMiddleware(Starlette(routes=ROUTES), heap="tracemalloc")
    raise AttributeError(name)
