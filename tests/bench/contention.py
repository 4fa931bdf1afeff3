"""
CPU time per request while block is recorded, as a ratio to the bare application.

The method is that of overhead.py: two servers are measured in short turns, and
swap roles in each round. Each round measures all rates, so that their ratios
come from one run. There is no middleware: this is what recording alone costs.
"off" is measured on a server that has recorded before.
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Awaitable
from statistics import geometric_mean

from fastapi import FastAPI

from asgi_pprof.recorders import set_block_profile_rate, set_mutex_profile_fraction
from tests.bench.load import Client, connect, times
from tests.bench.overhead import Pair
from tests.bench.report import progress
from tests.servers import ServerProcess, serve_process

APP = "tests.bench.contention:app"
WARM_UP = 2000
TURN = 50  # requests
TURNS = 20  # in half a round, of each server

PATHS = {
    "`async` endpoint": "/items/42?detail=true",
    "`def` endpoint, in anyio's threads": "/threaded/42?detail=true",
    "`async` endpoint that queues on a lock": "/locked/42?detail=true",
}

RATES = {
    "off": (0, 0),
    "block 10 us": (10_000, 0),
    "block 1 us": (1000, 0),
    "block 10 us, mutex 1 in 10": (10_000, 10),
}
"""Nanoseconds and fraction by their name in the table."""

app = FastAPI()
_lock = asyncio.Lock()


@app.get("/items/{item_id}")
async def show_item(item_id: int, detail: bool = False) -> dict[str, object]:
    return {"id": item_id, "name": f"item {item_id}", "detail": detail, "tags": ["a", "b"]}


@app.get("/threaded/{item_id}")
def show_threaded_item(item_id: int, detail: bool = False) -> dict[str, object]:
    return {"id": item_id, "name": f"item {item_id}", "detail": detail, "tags": ["a", "b"]}


@app.get("/locked/{item_id}")
async def show_locked_item(item_id: int, detail: bool = False) -> dict[str, object]:
    async with _lock:
        await asyncio.sleep(0)
    return {"id": item_id, "name": f"item {item_id}", "detail": detail, "tags": ["a", "b"]}


@app.get("/rates/{rate_ns}/{fraction}")
async def set_rates(rate_ns: int, fraction: int) -> None:
    set_block_profile_rate(rate_ns)
    set_mutex_profile_fraction(fraction)
    gc.collect()


@app.get("/cpu")
async def cpu_time_ns() -> int:
    # The CPU time of all threads; getrusage and ps have a resolution of only 10 ms.
    return time.process_time_ns()


def compare(path: str, rounds: int, loop: str) -> dict[str, list[Pair]]:
    """Return CPU time per request bare and at each rate, a pair for each round."""
    return asyncio.run(_compare(path, rounds, loop))


async def _compare(path: str, rounds: int, loop: str) -> dict[str, list[Pair]]:
    pairs: dict[str, list[Pair]] = {name: [] for name in RATES}
    with serve_process(APP, loop) as one, serve_process(APP, loop) as other:
        async with connect(one.port) as client, connect(other.port) as other_client:
            servers = {one: client, other: other_client}
            for each in servers.values():
                await each.visit(path, times(WARM_UP))
            for number in range(rounds):
                for name, (rate_ns, fraction) in RATES.items():
                    halves = []
                    for bare, recording in ((one, other), (other, one)):
                        bare.visit("/rates/0/0")
                        recording.visit(f"/rates/{rate_ns}/{fraction}")
                        halves.append(await _take_turns(bare, recording, servers, path))
                    pairs[name].append(Pair(*map(geometric_mean, zip(*halves, strict=True))))
                latest = ", ".join(f"{name} {each[-1].ratio:.3f}" for name, each in pairs.items())
                progress(f"round {number + 1} of {rounds}: {latest}")
    return pairs


async def _take_turns(
    bare: ServerProcess, recording: ServerProcess, servers: dict[ServerProcess, Client], path: str
) -> tuple[float, float]:
    def visit(server: ServerProcess) -> Awaitable[int]:
        return servers[server].visit(path, times(TURN))

    for server in (bare, recording):
        await visit(server)
    before = [_cpu_us(server) for server in (bare, recording)]
    for turn in range(TURNS):
        for server in (bare, recording) if turn % 2 else (recording, bare):
            await visit(server)
    after = [_cpu_us(server) for server in (bare, recording)]
    without, with_it = ((b - a) / TURNS / TURN for a, b in zip(before, after, strict=True))
    return without, with_it


def _cpu_us(server: ServerProcess) -> float:
    return int(server.visit("/cpu").body) / 1000
