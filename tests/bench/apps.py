"""
The service whose CPU time per request is measured: one application in several dresses.

Each process can put on any of them, one at a time. Two processes of the same
program differ by some per cent for as long as they live (where their memory
happens to lie), so dresses are compared by changing them, not by processes.
"""

from __future__ import annotations

import gc
import time

from fastapi import FastAPI
from starlette.types import ASGIApp, Receive, Scope, Send

from asgi_pprof import PprofMiddleware
from asgi_pprof.collectors.heap.sampler import DEFAULT_RATE

service = FastAPI()


@service.get("/items/{item_id}")
async def show_item(item_id: int, detail: bool = False) -> dict[str, object]:
    return {"id": item_id, "name": f"item {item_id}", "detail": detail, "tags": ["a", "b"]}


@service.get("/dress/{name}")
async def dress(name: str) -> None:
    """Change into "bare", "without_heap" or "default"."""
    app.inner = service
    gc.collect()  # a middleware that is dropped puts everything back
    if name == "without_heap":
        app.inner = PprofMiddleware(service, memory_profile_rate=0)
    elif name == "default":
        app.inner = PprofMiddleware(service, memory_profile_rate=DEFAULT_RATE)


@service.get("/cpu")
async def cpu_time_ns() -> int:
    # Of all threads; getrusage and ps know it to 10 ms only.
    return time.process_time_ns()


class Wardrobe:
    inner: ASGIApp = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.inner(scope, receive, send)


app = Wardrobe()
