"""
The cost of the middleware's own code for each request, in nanoseconds.

The middleware is called without a server, around an application that does nothing;
the time of the same application without the middleware is subtracted.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable

from asgi_pprof import PprofMiddleware, labels
from asgi_pprof.collectors.cpu.collector import CpuCollector
from asgi_pprof.encoders.protobuf import encode
from asgi_pprof.params import DEFAULT_HZ
from tests.bench.overhead import SampleCost, sample_cost
from tests.decode import decode

CALLS = 20_000

Call = Callable[[], Awaitable[None]]


def measure_costs(rounds: int) -> list[tuple[str, float, float]]:
    """Return name, median and minimum in nanoseconds for each part of a request's path."""
    return asyncio.run(_measure(rounds))


def measure_sample(depth: int, seconds: float) -> SampleCost:
    """Return the cost of a CPU sample of a stack with that many calls, and a few of its own."""

    async def profile_ourselves() -> SampleCost:
        collecting = asyncio.create_task(
            CpuCollector().collect(seconds, asyncio.Event(), DEFAULT_HZ)
        )
        while not collecting.done():
            _descend(depth)
            await asyncio.sleep(0)
        return sample_cost(decode(encode((await collecting)())))

    return asyncio.run(profile_ourselves())


def _descend(depth: int) -> int:
    return _descend(depth - 1) if depth else sum(number * number for number in range(5000))


async def _measure(rounds: int) -> list[tuple[str, float, float]]:
    middleware = PprofMiddleware(_nothing)
    http, websocket = _scope("http"), _scope("websocket")
    calls: dict[str, tuple[Call, Call]] = {
        "request to another path": (
            lambda: middleware(http, _receive, _send),
            lambda: _nothing(http, _receive, _send),
        ),
        "websocket": (
            lambda: middleware(websocket, _receive, _send),
            lambda: _nothing(websocket, _receive, _send),
        ),
        '`with labels(tenant="acme")`': (_labelled, _unlabelled),
        "coroutine decorated with `@labels(...)`": (_decorated, _unlabelled),
    }
    costs = []
    for name, (with_it, without) in calls.items():
        differences = [await _time(with_it) - await _time(without) for _ in range(rounds)]
        costs.append((name, statistics.median(differences), min(differences)))
    # The application's shutdown restores everything.
    await middleware({"type": "lifespan"}, _receive, _send)
    return costs


async def _time(call: Call) -> float:
    start = time.thread_time_ns()
    for _ in range(CALLS):
        await call()
    return (time.thread_time_ns() - start) / CALLS


async def _nothing(scope: object, receive: object, send: object) -> None:
    pass


async def _receive() -> dict[str, object]:
    return {}


async def _send(message: object) -> None:
    pass


async def _labelled() -> None:
    with labels(tenant="acme"):
        pass


@labels(tenant="acme")
async def _decorated() -> None:
    pass


async def _unlabelled() -> None:
    pass


def _scope(kind: str) -> dict[str, object]:
    return {
        "type": kind,
        "method": "GET",
        "path": "/items/42",
        "raw_path": b"/items/42",
        "root_path": "",
        "query_string": b"",
        "headers": [(b"host", b"127.0.0.1")],
        "client": ("127.0.0.1", 50000),
    }
