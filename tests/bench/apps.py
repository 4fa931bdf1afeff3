"""
The service whose CPU time per request is measured, in several variants.

Each process can switch to any variant. Two processes of the same program differ by
some per cent as long as they live (by the layout of their memory), so variants are
compared within the same processes.
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


@service.get("/variant/{name}")
async def variant(name: str) -> None:
    """Switch to "bare", "without_heap" or "default"."""
    app.inner = service
    gc.collect()  # a middleware that is collected restores everything
    if name == "without_heap":
        app.inner = PprofMiddleware(service, memory_profile_rate=0)
    elif name == "default":
        app.inner = PprofMiddleware(service, memory_profile_rate=DEFAULT_RATE)


@service.get("/cpu")
async def cpu_time_ns() -> int:
    # The CPU time of all threads; getrusage and ps have a resolution of only 10 ms.
    return time.process_time_ns()


class Variants:
    inner: ASGIApp = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.inner(scope, receive, send)


app = Variants()
