"""
A service that exhausts its connection pool. docs/hanging.md finds it with one curl.

    pip install 'sqlalchemy[asyncio]' aiosqlite
    uvicorn --app-dir docs/demo orders:app
"""

from __future__ import annotations

import asyncio

from fastapi import FastAPI
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.pool import AsyncAdaptedQueuePool

from asgi_pprof import PprofMiddleware

app = FastAPI()
app.add_middleware(PprofMiddleware)

engine = create_async_engine(
    "sqlite+aiosqlite://",
    poolclass=AsyncAdaptedQueuePool,
    pool_size=5,
    max_overflow=0,
    pool_timeout=600,
)
payment = asyncio.Event()


@app.get("/order/{number}")
async def order(number: int) -> int:
    """Keeps its connection until the payment arrives."""
    async with AsyncSession(engine) as session:
        await session.execute(text("SELECT 1"))
        await payment.wait()
    return number
