"""
A service with five faults. docs/hanging.md finds each with one curl.

    uvicorn --app-dir docs/demo stuck:app
"""

from __future__ import annotations

import asyncio
import threading
import time
from dataclasses import dataclass, field

from fastapi import FastAPI

from asgi_pprof import PprofMiddleware

app = FastAPI()
app.add_middleware(PprofMiddleware)


@dataclass
class Account:
    balance: int = 100
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


accounts = [Account() for _ in range(10)]


@app.get("/transfer/{source}/{target}")
async def transfer(source: int, target: int) -> int:
    """Deadlocks if two transfers run at once, one each way: each waits for the other's lock."""
    async with accounts[source].lock:
        await asyncio.sleep(0.5)  # ask another service whether the amount is allowed
        async with accounts[target].lock:
            accounts[source].balance -= 1
            accounts[target].balance += 1
    return accounts[source].balance


listeners = set()


async def listen(events: asyncio.Queue[str]) -> None:
    while True:
        await events.get()


@app.get("/subscribe")
async def subscribe() -> int:
    """Starts a listener and forgets its queue, so that nothing can be put into it any more."""
    listeners.add(asyncio.create_task(listen(asyncio.Queue())))
    return len(listeners)


async def add_up(numbers: list[int], results: asyncio.Queue[int]) -> None:
    results.put(sum(numbers))  # type: ignore[unused-coroutine]  # the await is forgotten


@app.get("/report")
async def report() -> int:
    """Waits for a result that is never put into the queue."""
    results: asyncio.Queue[int] = asyncio.Queue()
    async with asyncio.TaskGroup() as group:
        group.create_task(add_up([1, 2, 3], results))
    return await results.get()


printer_has_paper = threading.Event()


@app.get("/print")
def print_label() -> str:
    """Keeps a thread of the pool until the printer has paper."""
    printer_has_paper.wait()
    return "printed"


@app.get("/invoice/{number}")
async def invoice(number: int) -> int:
    """Uses a blocking client, which keeps the event loop from all other requests."""
    time.sleep(0.3)  # noqa: ASYNC251
    return number
