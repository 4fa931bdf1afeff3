"""
A service that measures its own CPU time, to compare a profile with.

Each request calls each of some functions several times. The true CPU time of a
function is known in two ways: by the thread's CPU clock, read before and after the
calls, and as the number of calls times the cost of one, measured while nothing else
runs. The second way puts no clock in the profile's way, but misses what threads cost
one another (caches, handing over the GIL).
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import threading
import time
from collections.abc import Callable

from fastapi import FastAPI
from pydantic import BaseModel

from asgi_pprof import PprofMiddleware

app = FastAPI()
app.add_middleware(PprofMiddleware)

TEXTS = [f"{7919 * number % 1000:03} text" for number in range(500)]
DOCUMENT = {f"key {number}": [number, str(number), number / 7] for number in range(60)}
# Hashing releases the GIL. With blocks of 128 KiB it runs for 0.1 ms between two waits for
# the GIL. Such runs are sampled too seldom: they end before the kernel's tick starts again.
BLOCK = bytes(range(256)) * 1792
LOG = " ".join(f"10.0.{number}.7 - GET /items/{number} {number * 37}" for number in range(100))
LINE = re.compile(r"(\d+)\.(\d+)\.(\d+)\.(\d+) - (GET|POST) (/[a-z]+)/(\d+)")


class Item(BaseModel):
    name: str
    price: float
    tags: list[str]


class Order(BaseModel):
    number: int
    items: list[Item]


ORDER = {
    "number": 7,
    "items": [{"name": text, "price": 1.5, "tags": ["a", "b"]} for text in TEXTS[:50]],
}


def loop_a() -> int:
    total = 0
    for number in range(12_000):
        total += number * number
    return total


def loop_b() -> int:
    longest = 0
    for text in TEXTS * 4:
        if text.startswith("9") and len(text) > longest:
            longest = len(text)
    return longest


def recursion(depth: int = 14) -> int:
    return 1 if depth < 2 else recursion(depth - 1) + recursion(depth - 2)


def json_round_trip() -> object:
    return [json.loads(json.dumps(DOCUMENT)) for _ in range(3)]


def hashing() -> str:
    return hashlib.sha256(BLOCK).hexdigest()


def regex() -> int:
    return len(LINE.findall(LOG))


def sorting_by_key() -> list[str]:
    return sorted(TEXTS, key=lambda text: text[::-1])


def pydantic() -> str:
    return Order.model_validate(ORDER).model_dump_json()


# The calls in a request: each function takes about the same part of its time.
CALLS: dict[Callable[[], object], int] = {
    loop_a: 1,
    loop_b: 3,
    recursion: 9,
    json_round_trip: 1,
    hashing: 2,
    regex: 7,
    sorting_by_key: 6,
    pydantic: 7,
}


class Truth:
    """Calls and CPU nanoseconds by function name."""

    def __init__(self) -> None:
        self.calls = dict.fromkeys((function.__name__ for function in CALLS), 0)
        self.cpu_ns = dict(self.calls)

    def work(self) -> None:
        """
        Do a request's work, in random order.

        In a fixed order, each function would start at the same distance from where
        threads hand over the GIL (5 ms) and so, with several threads, from the kernel's
        ticks (4 ms), which are when CPU timers expire. Shares of a `def` endpoint were
        then up to 3 points wrong. Requests of a real service differ.
        """
        for function, number in random.sample(list(CALLS.items()), len(CALLS)):
            start = time.thread_time_ns()
            for _ in range(number):
                function()
            self.cpu_ns[function.__name__] += time.thread_time_ns() - start
            self.calls[function.__name__] += number

    def add(self, other: Truth) -> None:
        for name in self.calls:
            self.calls[name] += other.calls[name]
            self.cpu_ns[name] += other.cpu_ns[name]

    def costs(self) -> dict[str, float]:
        """Return the CPU nanoseconds of one call, by function name."""
        return {name: self.cpu_ns[name] / calls for name, calls in self.calls.items()}


on_the_loop = Truth()
in_threads = Truth()
_in_threads_lock = threading.Lock()
_burning = threading.Event()
_burner_ns = 0


@app.get("/loop")
async def work_on_the_loop() -> str:
    on_the_loop.work()
    return "done"


@app.get("/thread")
def work_in_a_thread() -> str:
    mine = Truth()
    mine.work()
    with _in_threads_lock:
        in_threads.add(mine)
    return "done"


@app.get("/truth")
async def truth() -> dict[str, object]:
    return {
        "loop": {"calls": on_the_loop.calls, "cpu_ns": on_the_loop.cpu_ns},
        "thread": {"calls": in_threads.calls, "cpu_ns": in_threads.cpu_ns},
        "loop_thread_ns": time.thread_time_ns(),
        "burner_ns": _burner_ns,
        "process_ns": time.process_time_ns(),
    }


@app.get("/calibrate")
async def calibrate(seconds: float) -> dict[str, float]:
    """Return the cost of a call while nothing else runs, with the calls of a request."""
    quiet, end = Truth(), time.monotonic() + seconds
    while time.monotonic() < end:
        quiet.work()
    return quiet.costs()


@app.get("/burn/{state}")
async def burn(state: bool) -> None:
    """Burn CPU on a thread beside the loop, or stop it."""
    if state:
        _burning.set()
        threading.Thread(target=_burn, name="burner", daemon=True).start()
    else:
        _burning.clear()


def _burn() -> None:
    global _burner_ns
    while _burning.is_set():
        loop_a()
        _burner_ns = time.thread_time_ns()
