"""The service whose CPU time per request is measured, bare and with the middleware."""

from __future__ import annotations

import time

from fastapi import FastAPI

from asgi_pprof import PprofMiddleware


def build() -> FastAPI:
    service = FastAPI()

    @service.get("/items/{item_id}")
    async def show_item(item_id: int, detail: bool = False) -> dict[str, object]:
        return {"id": item_id, "name": f"item {item_id}", "detail": detail, "tags": ["a", "b"]}

    @service.get("/cpu")
    async def cpu_time_ns() -> int:
        # Of all threads; getrusage and ps know it to 10 ms only.
        return time.process_time_ns()

    return service


bare = build()
profiled = build()
profiled.add_middleware(PprofMiddleware)
