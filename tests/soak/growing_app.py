"""A service that names everything anew in each request, and keeps a constant amount of memory."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import itertools
import logging
import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from asgi_pprof import PprofMiddleware, labels

_KEPT = 2000
"""Blocks of 4 KiB that are alive at a time."""
_FUNCTION = """\
def {name}():
    total = 0
    for number in range(300):
        total += number
    return [total, bytearray(4096)]
"""

_kept: deque[object] = deque((bytearray(4096) for _ in range(_KEPT)), maxlen=_KEPT)
_numbers = itertools.count()
_pool = ThreadPoolExecutor(1)


async def label(request: Request) -> Response:
    """Work under label values that are never used again."""
    word = request.path_params["word"]
    with labels(user=word, **{word: str(next(_numbers))}):
        _keep()
        await asyncio.sleep(0)
    return PlainTextResponse(word)


async def start_tasks(request: Request) -> Response:
    """Run tasks with names that are never used again."""
    word = request.path_params["word"]
    await asyncio.gather(
        *(asyncio.create_task(asyncio.sleep(0.001), name=f"{word} {next(_numbers)}") for _ in "ab")
    )
    return PlainTextResponse(word)


async def start_thread(request: Request) -> Response:
    """Run a thread with a name that is never used again, in a thread of a pool."""
    word = request.path_params["word"]

    def run() -> None:
        thread = threading.Thread(target=_keep, name=f"{word} {next(_numbers)}")
        thread.start()
        thread.join()

    in_context = functools.partial(contextvars.copy_context().run, run)
    await asyncio.get_running_loop().run_in_executor(_pool, in_context)
    return PlainTextResponse("")


async def run_code(request: Request) -> Response:
    """Run a function that is compiled for this request only."""
    name = f"{request.path_params['word']}_{next(_numbers)}"
    namespace: dict[str, object] = {}
    exec(compile(_FUNCTION.format(name=name), f"<{name}>", "exec"), namespace)
    _kept.append(namespace[name]())  # type: ignore[operator]
    return PlainTextResponse("")


async def use_memory(request: Request) -> Response:
    """Allocate small and large blocks at depths that vary, and keep one block."""
    depth = next(_numbers) % 50

    def allocate(left: int) -> list[object]:
        return allocate(left - 1) if left else [bytearray(100_000), [str(i) for i in range(500)]]

    allocate(depth)
    _keep()
    return PlainTextResponse("")


async def wait(request: Request) -> Response:
    """Wait for a lock that another task holds."""
    lock = asyncio.Lock()

    async def hold() -> None:
        async with lock:
            await asyncio.sleep(0.002)

    holder = asyncio.create_task(hold())
    await asyncio.sleep(0)
    async with lock:
        await holder
    return PlainTextResponse("")


async def nothing(request: Request) -> Response:
    """Answer."""
    return PlainTextResponse("")


def _keep() -> None:
    _kept.append(bytearray(4096))


# A warning for each method that is none fills the pipe in which the tests keep the log.
logging.getLogger("uvicorn.error").setLevel(logging.ERROR)

_METHODS = ["GET", "POST", "PUT", "DELETE"]
bare = Starlette(
    routes=[
        Route("/labels/{word}", label, methods=_METHODS),
        Route("/tasks/{word}", start_tasks, methods=_METHODS),
        Route("/threads/{word}", start_thread, methods=_METHODS),
        Route("/code/{word}", run_code, methods=_METHODS),
        Route("/memory/{word}", use_memory, methods=_METHODS),
        Route("/nothing/{word}", nothing, methods=_METHODS),
        Route("/wait/{word}", wait, methods=_METHODS),
    ]
)
# A low rate, at which the tables of the heap sampler fill: by 100,000 requests nearly.
app = PprofMiddleware(bare, memory_profile_rate=16 * 1024)
