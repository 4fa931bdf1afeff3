"""The profiler's own waits, and those for its answers, are in neither profile."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import socket

import anyio
import pytest
from fastapi import FastAPI
from starlette.middleware.base import BaseHTTPMiddleware

from asgi_pprof import PprofMiddleware
from asgi_pprof.labels import current
from asgi_pprof.native.core import native
from asgi_pprof.request_labels import RequestLabels
from asgi_pprof.runtime.frames import _ENDED_GENERATORS_CRASH
from asgi_pprof.runtime.own_work import OwnLabels, is_own_context, own_request, own_work
from tests.collectors.contention.recorded import is_in, names, recording
from tests.loops import run
from tests.servers import ask, serve

WINDOWS = ("goroutine", "heap", "block", "mutex", "stall", *(["profile"] if native else []))


async def wait_for_event() -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(0.3):
            await asyncio.Event().wait()


def service(tasks_per_request: bool) -> FastAPI:
    """Return an app whose requests, ours included, may run in tasks of a middleware around us."""
    app = FastAPI()
    app.add_middleware(PprofMiddleware)
    if tasks_per_request:

        async def forward(request, call_next):
            return await call_next(request)

        app.add_middleware(BaseHTTPMiddleware, dispatch=forward)
    app.get("/wait")(wait_for_event)
    return app


@pytest.mark.server
@pytest.mark.parametrize("tasks_per_request", [False, True])
def test_windows_of_a_service_where_nobody_waits_are_no_waits(tasks_per_request, loop_name):
    """The service's own waits through the same middleware are seen."""
    with serve(service(tasks_per_request), loop_name) as port, recording() as seen:
        for profile in WINDOWS:
            assert ask(port, f"/debug/pprof/{profile}?seconds=1").status == 200
        own = [names(sample) for sample in seen.samples("block") if sample.values[1] > 0.2e9]
        releases = [names(sample) for sample in seen.samples("mutex")]
        ask(port, "/wait")
        count, delay_ns = seen.of("block", "wait_for_event")
        waits = [each for each in seen.samples("block") if is_in("call_next", each)]
    if not _ENDED_GENERATORS_CRASH:  # else the scope of a middleware's wait must not be read
        assert own == []
    assert releases == []
    assert count == 1
    assert delay_ns > 0.2e9
    assert (max((each.values[1] for each in waits), default=0) > 0.2e9) == tasks_per_request


def test_work_below_a_marked_function_waits_unseen():
    """That holds without a request too."""

    @own_work
    async def own() -> None:
        await wait_for_event()

    async def main() -> None:
        await own()
        await wait_for_event()

    with recording() as seen:
        run(main())
        assert seen.of("block", "wait_for_event")[0] == 1


def test_tasks_of_a_request_of_ours_wait_unseen():
    """Their context shows it; after the request the context is as before."""

    async def main() -> None:
        with own_request({}):
            await asyncio.create_task(wait_for_event())
        assert not is_own_context()
        await asyncio.create_task(wait_for_event())

    with recording() as seen:
        run(main())
        assert seen.of("block", "wait_for_event")[0] == 1


def test_an_application_that_is_called_in_our_context_is_not_ours():
    """A server may start its request in the context of an earlier one on the connection."""

    def start() -> tuple[bool, object]:
        around = RequestLabels({"method": "PUT", "headers": []})
        current.set(OwnLabels(around))
        own = is_own_context()
        scope = {"method": "GET", "headers": []}
        current.set(RequestLabels(scope, current.get()))
        return own and not is_own_context(), current.get().outer

    assert contextvars.copy_context().run(start) == (True, None)


def test_a_wait_of_anyio_for_the_network_is_no_contention():
    """Its sockets wait for bytes by way of an event."""

    async def main() -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            async with await anyio.connect_tcp(*server.getsockname()) as stream:
                with anyio.move_on_after(0.1):
                    await stream.receive()
                with anyio.move_on_after(0.1):
                    await stream.send(bytes(50_000_000))
        address = {"local_host": "127.0.0.1", "local_port": 0}
        async with await anyio.create_udp_socket(**address) as udp:
            with anyio.move_on_after(0.1):
                await udp.receive()
        await wait_for_event()

    with recording() as seen:
        run(main())
        long = [names(sample) for sample in seen.samples("block") if sample.values[1] > 0.05e9]
    assert [stack[1] for stack in long] == [f"{__name__.rpartition('.')[2]}.wait_for_event"]
