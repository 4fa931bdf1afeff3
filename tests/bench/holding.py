"""A service that holds 2 GiB of small and large objects and measures gaps of its loop."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

from fastapi import FastAPI, Response

from asgi_pprof import PprofMiddleware

app = FastAPI()
app.add_middleware(PprofMiddleware)

TICK_S = 0.001
_MIB = 1 << 20

_kept: list[object] = []
_gaps: list[tuple[float, float]] = []
_tickers: set[asyncio.Task[None]] = set()


def records() -> object:
    return [
        {"id": n, "name": f"name {n}", "tags": ["a", str(n)], "price": n / 7} for n in range(40)
    ]


def rows() -> object:
    return [(n, n * 0.5, "x" * (n % 90)) for n in range(200)]


def documents() -> object:
    return "x" * 20_000 + str(time.time_ns())


def buffers() -> object:
    return bytearray(300_000)


KINDS: tuple[Callable[[], object], ...] = (records, rows, documents, buffers)


def _at_depth(depth: int, make: Callable[[], object]) -> object:
    # Each depth has a stack of its own.
    return _at_depth(depth - 1, make) if depth else make()


@app.get("/hold/{mib}")
def hold(mib: int) -> int:
    """Allocate that many MiB, a quarter for each kind, and return the resident bytes."""
    for kind in KINDS:
        end, depth = _resident() + mib * _MIB // len(KINDS), 0
        while _resident() < end:
            depth = (depth + 1) % 40
            _kept.extend(_at_depth(depth, kind) for _ in range(20))
    # Otherwise the garbage collector's pauses over these objects would hide all others.
    gc.freeze()
    return _resident()


@app.get("/tick/{state}")
async def tick(state: bool) -> None:
    """Start or stop measuring gaps."""
    if state:
        _tickers.add(asyncio.create_task(_watch()))
    else:
        for ticker in _tickers:
            ticker.cancel()
        _tickers.clear()


@app.get("/gaps")
async def gaps() -> Response:
    """Return and drop the pairs (gap, time in it that the thread waited for a CPU), in ms."""
    found = json.dumps(_gaps)
    _gaps.clear()
    return Response(found)


async def _watch() -> None:
    statistics = os.open("/proc/thread-self/schedstat", os.O_RDONLY)
    try:
        waited = 0
        while True:
            start = time.perf_counter()
            await asyncio.sleep(TICK_S)
            gap = time.perf_counter() - start - TICK_S
            # Reading releases the GIL, and is not part of a gap.
            before, waited = waited, int(os.pread(statistics, 100, 0).split()[1])
            _gaps.append((gap * 1e3, (waited - before) / 1e6))
    finally:
        os.close(statistics)


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
