"""
Measures what monitoring for stalls costs an idle service.

The loop of one uvicorn process is monitored and not monitored by turns.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from statistics import median

from fastapi import FastAPI

from asgi_pprof.recorders import stall_watch
from tests.bench.report import progress
from tests.servers import ServerProcess, serve_process

HEADINGS = ("% of a CPU, idle uvicorn", "not monitored", "monitored", "paired difference")

app = FastAPI()


@app.get("/watch/{on}")
async def watch(on: bool) -> None:
    """Start or stop monitoring this loop."""
    loop = asyncio.get_running_loop()
    (stall_watch.attach if on else stall_watch.detach)(loop)


@app.get("/cpu")
async def cpu_time_ns() -> int:
    return time.process_time_ns()


@dataclass(frozen=True, slots=True)
class Share:
    """CPU time of the idle process in per cent of one CPU, a number for each measurement."""

    without: list[float]
    with_it: list[float]

    def row(self, name: str) -> tuple[str, ...]:
        """Return the medians without, with, and of the differences of pairs."""
        pairs = zip(self.with_it, self.without, strict=True)
        more = median(monitored - bare for monitored, bare in pairs)
        return name, *(f"{each:.3f}" for each in (median(self.without), median(self.with_it), more))


def rows(rounds: int, seconds: float) -> list[tuple[str, ...]]:
    """Return a row for each kind of loop, under `HEADINGS`."""
    return [measure(rounds, seconds, loop).row(loop) for loop in ("asyncio", "uvloop")]


def measure(rounds: int, seconds: float, loop: str) -> Share:
    """Return the shares of an idle uvicorn, by turns without and with the monitor."""
    share = Share([], [])
    with serve_process("tests.bench.stalls:app", loop) as server:
        for _ in range(rounds):
            share.without.append(_idle(server, seconds))
            server.visit("/watch/true")
            share.with_it.append(_idle(server, seconds))
            server.visit("/watch/false")
            progress(f"{loop}: {share.without[-1]:.3f} % without, {share.with_it[-1]:.3f} % with")
    return share


def _idle(server: ServerProcess, seconds: float) -> float:
    time.sleep(0.5)  # until the previous request is over
    before = int(server.visit("/cpu").body)
    time.sleep(seconds)
    used_ns = int(server.visit("/cpu").body) - before
    return used_ns / (seconds * 1e9) * 100
