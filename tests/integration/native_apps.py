"""A service whose endpoints use CPU and keep memory in all places that labels must reach."""

from __future__ import annotations

import asyncio
import contextvars
import threading
import time

from fastapi import FastAPI

from asgi_pprof import PprofMiddleware, labels
from tests.state import process_state

FREQUENT = 4096
"""Bytes from one sample to the next."""

kept: list[object] = []
lasting: list[asyncio.Task[None]] = []


def burn(seconds: float = 0.02) -> None:
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        sum(range(500))


def keep_blocks() -> None:
    kept.extend(bytes(10_000) for _ in range(50))


def work(seconds: float = 0.02) -> None:
    burn(seconds)
    keep_blocks()


# Each route has its own function, so that a stack shows the route without any labels.


def work_in_coroutine() -> None:
    work()


def work_in_def() -> None:
    work()


def work_in_task() -> None:
    work()


def work_in_to_thread() -> None:
    work()


def work_in_copied_context() -> None:
    work(0.2)  # new threads are found within 50 ms


def work_in_task_that_lasts() -> None:
    work()


def work_with_own_labels() -> None:
    work()


app = FastAPI()


@app.get("/in-coroutine/{number}")
async def in_coroutine(number: int) -> None:
    work_in_coroutine()


@app.get("/in-def/{number}")
def in_def(number: int) -> None:
    work_in_def()


@app.get("/in-task/{number}")
async def in_task(number: int) -> None:
    async def child() -> None:
        work_in_task()

    await asyncio.create_task(child())


@app.get("/in-to-thread/{number}")
async def in_to_thread(number: int) -> None:
    await asyncio.to_thread(work_in_to_thread)


@app.get("/in-copied-context/{number}")
async def in_copied_context(number: int) -> None:
    run = contextvars.copy_context().run
    thread = threading.Thread(target=run, args=(work_in_copied_context,))
    thread.start()
    await asyncio.to_thread(thread.join)


@app.get("/with-own-labels/{number}")
async def with_own_labels(number: int) -> None:
    with labels(tenant=f"tenant-{number % 3}"):
        work_with_own_labels()


@app.get("/in-task-that-lasts/{number}")
async def in_task_that_lasts(number: int) -> None:
    async def child() -> None:
        await asyncio.sleep(0.01)
        work_in_task_that_lasts()

    lasting.append(asyncio.create_task(child()))
    del lasting[:-100]


@app.get("/rest")
async def rest() -> None:
    """Wait for tasks that have outlived their requests."""
    await asyncio.gather(*lasting)


@app.get("/forget")
async def forget() -> None:
    kept.clear()


@app.get("/state")
async def state() -> dict[str, object]:
    return process_state()


def __getattr__(name: str) -> PprofMiddleware:
    # Created on demand, because the first middleware of a process sets the rate.
    rates = {"frequent": FREQUENT, "every_block": 1, "never": 0}
    if name in rates:
        return PprofMiddleware(app, memory_profile_rate=rates[name])
    raise AttributeError(name)
