"""A service for tests, whose functions are named after what they do."""

from __future__ import annotations

import asyncio
import hashlib
import sys
import time

from fastapi import APIRouter, FastAPI
from fastapi.responses import JSONResponse

from asgi_pprof import PprofMiddleware, Profile, labels
from tests.state import process_state

app = FastAPI()
app.add_middleware(PprofMiddleware)
connections = Profile("example.com/conns")
connections.add("first")
connections.add("second")


def burn_cpu_a(seconds: float) -> int:
    end, total = time.thread_time() + seconds, 0
    while time.thread_time() < end:
        for number in range(2000):
            total += number * number
    return total


def burn_cpu_b(seconds: float) -> bytes:
    end, digest = time.thread_time() + seconds, b""
    while time.thread_time() < end:
        digest = hashlib.sha256(digest * 300).digest()
    return digest


@app.get("/burn/{share}")
async def burn_on_the_loop(share: int) -> int:
    burn_cpu_a(0.004 * share / 100)
    burn_cpu_b(0.004 * (100 - share) / 100)
    return share


@app.get("/thread/{kind}")
def burn_in_a_thread(kind: str) -> str:
    burn_cpu_a(0.005)
    return kind


@app.get("/tenant/{name}")
async def burn_for_a_tenant(name: str) -> str:
    with labels(tenant=name):
        burn_cpu_a(0.004)
    return name


@app.get("/recurse/{depth}")
async def start_recursion(depth: int) -> int:
    sys.setrecursionlimit(depth + 1000)

    def recurse(left: int) -> int:
        return recurse(left - 1) + 1 if left else len(burn_cpu_b(0.02))

    return recurse(depth)


kept: list[bytearray] = []


def keep_ten_megabytes() -> None:
    for _ in range(10):
        kept.append(bytearray(1024 * 1024))


@app.get("/keep")
async def keep() -> int:
    keep_ten_megabytes()
    return len(kept)


@app.get("/forget")
async def forget() -> int:
    kept.clear()
    return 0


released = asyncio.Event()


@app.get("/wait/{number}")
async def wait_for_release(number: int) -> None:
    with labels(tenant=f"waiting-{number}"):
        await released.wait()


@app.get("/release")
async def release() -> None:
    released.set()
    released.clear()


contended = asyncio.Lock()


@app.get("/queue")
async def queue_on_a_lock() -> None:
    async with contended:
        await asyncio.sleep(0.002)


@app.get("/quick")
async def quick() -> str:
    return "quick"


items = APIRouter(prefix="/items")


@items.get("/{item_id}")
async def item(item_id: int) -> int:
    burn_cpu_a(0.004)
    return item_id


app.include_router(items, prefix="/v1")


@app.get("/state")
async def state() -> JSONResponse:
    return JSONResponse({**process_state(), "tasks": len(asyncio.all_tasks())})
