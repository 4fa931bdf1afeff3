"""
The work that the samplers must survive: each function runs in a thread of its own.

A function does one short round, and is called again until the time is over.
It leaves no memory, threads or children behind.
"""

from __future__ import annotations

import _thread
import asyncio
import contextlib
import gc
import importlib
import json
import random
import subprocess
import sys
import threading
import time
import tracemalloc
import weakref
from collections import deque
from collections.abc import AsyncGenerator, Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import anyio
import anyio.to_thread
import uvloop

from asgi_pprof.labels import labels
from tests.soak import generated

_some_of_it: deque[object] = deque(maxlen=500)  # keeps objects alive for a while


def burn(rounds: int = 300) -> int:
    """Use CPU, and allocate."""
    total = 0
    for number in range(rounds):
        total += len(str(number) * 3)
    _some_of_it.append([str(total)] * random.randrange(1, 200))
    return total


def work_of_nobody() -> int:
    return burn()


# --- threads ------------------------------------------------------------------


def threads() -> None:
    """Start and end threads: plain ones, with small stacks, without `threading`, in pools."""
    before = threading.stack_size(random.choice((0, 512 * 1024)))
    started = [threading.Thread(target=burn, args=(number * 50,)) for number in range(6)]
    for thread in started:
        thread.start()
    threading.stack_size(before)
    done = threading.Semaphore(0)

    def unknown_to_threading() -> None:
        burn(random.randrange(400))
        done.release()

    for _ in range(3):
        _thread.start_new_thread(unknown_to_threading, ())
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(burn, [100, 200, 300, 400]))
    for _ in range(3):
        done.acquire()
    for thread in started:
        thread.join()


# --- code that is created and destroyed -----------------------------------------

_tags = iter(range(10**12))


def exec() -> None:
    """Compile, run and destroy code, so that new code gets the same addresses."""
    for _ in range(20):
        function = generated.make_chain(next(_tags) % generated.TAGS)
        kept = [function(random.randrange(30)) for _ in range(3)]
        if random.random() < 0.1:
            _some_of_it.append((function, kept))
        del function


# --- frames that end by an exception or at the recursion limit -------------------


class Odd(Exception):
    """Raised through many frames."""


def _raise_at(depth: int) -> None:
    try:
        if depth == 0:
            raise Odd(str(random.random()))
        _raise_at(depth - 1)
    finally:
        _some_of_it.append(depth)


def exceptions() -> None:
    """Raise exceptions through many frames, chain and group them, and keep their tracebacks."""
    for depth in (1, 20, 150):
        try:
            _raise_at(depth)
        except Odd as error:
            _some_of_it.append(error)
            with contextlib.suppress(ExceptionGroup):
                raise ExceptionGroup("several", [error, ValueError(depth)]) from error
        with contextlib.ExitStack() as stack:
            for number in range(depth):
                stack.callback(burn, number % 7)


def _recurse(depth: int) -> int:
    return _recurse(depth + 1) + 1


def _recurse_through_c(depth: int) -> list[int]:
    return sorted([depth], key=lambda each: len(_recurse_through_c(each + 1)))


class Endless:
    def __repr__(self) -> str:
        return f"<{[self, Endless()]!r}>"


def recursion() -> None:
    """Hit the recursion limit, from Python and through C."""
    for dive in (
        lambda: _recurse(0),
        lambda: _recurse_through_c(0),
        lambda: repr(Endless()),
        lambda: json.dumps(_nested(5000)),
    ):
        with contextlib.suppress(RecursionError):
            dive()


def _nested(depth: int) -> list[object]:
    value: list[object] = []
    for _ in range(depth):
        value = [value]
    return value


# --- generators --------------------------------------------------------------------


def _count_down(depth: int) -> Generator[int]:
    try:
        yield depth
        if depth:
            yield from _count_down(depth - 1)
        burn(20)
    finally:
        _some_of_it.append(depth)


def generators() -> None:
    """Exhaust generators, close them unfinished, throw into them, and let them be collected."""
    for depth in (3, 30, 90):
        sum(_count_down(depth))
        left = _count_down(depth)
        next(left)
        left.close()
        thrown = _count_down(depth)
        next(thrown)
        with contextlib.suppress(Odd):
            thrown.throw(Odd())
        in_a_circle: list[Any] = [_count_down(depth)]
        next(in_a_circle[0])
        in_a_circle.append(in_a_circle)


# --- coroutines, on several kinds of loop ---------------------------------------------


async def _ticks(number: int) -> AsyncGenerator[int]:
    try:
        for each in range(number):
            await asyncio.sleep(0)
            yield each
            burn(30)
    finally:
        await asyncio.sleep(0)


async def _deep(depth: int) -> int:
    if depth:
        return await _deep(depth - 1) + 1
    await asyncio.sleep(0.001)
    return burn(50)


async def coroutines() -> None:
    """Run tasks, nested awaits, async generators that are left unfinished, and cancellations."""
    async with asyncio.TaskGroup() as group:
        for depth in (1, 5, 40):
            group.create_task(_deep(depth))
        cancelled = group.create_task(_deep(60))
        await asyncio.sleep(0)
        cancelled.cancel()
    async with contextlib.aclosing(_ticks(5)) as ticks:
        async for each in ticks:
            if each == 3:
                break
    async for _ in _ticks(4):
        pass
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(0.002):
            await asyncio.gather(*(_deep(depth) for depth in range(5)))
    await asyncio.to_thread(burn, 100)


def loops() -> None:
    """Run uvloop and anyio in this thread, with worker threads of their own."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        for _ in range(5):
            runner.run(coroutines())
    anyio.run(_anyio_threads)


async def _anyio_threads() -> None:
    async with anyio.create_task_group() as group:
        for number in range(6):
            group.start_soon(anyio.to_thread.run_sync, burn, number * 60)


# --- labels -----------------------------------------------------------------------------


def work_tenant_0() -> int:
    return burn()


def work_tenant_1() -> int:
    return sum(_work_for(1))


def work_tenant_2() -> int:
    return len([burn(40) for _ in range(4)])


def work_tenant_3() -> int:
    return len(json.dumps({str(number): [number] for number in range(200)}))


def _work_for(tenant: int) -> Iterator[int]:
    for _ in range(5):
        yield burn(30) + tenant


_TENANTS: tuple[Callable[[], int], ...] = (
    work_tenant_0,
    work_tenant_1,
    work_tenant_2,
    work_tenant_3,
)


def _tenant_thread(tenant: int) -> None:
    with labels(tenant=tenant, by="thread"):
        for _ in range(3):
            _TENANTS[tenant]()
            time.sleep(0)
    work_of_nobody()


def tenants() -> None:
    """Run one thread for each tenant, all at once, and unlabelled work before and after."""
    work_of_nobody()
    started = [threading.Thread(target=_tenant_thread, args=(each,)) for each in range(4)]
    for thread in started:
        thread.start()
    for thread in started:
        thread.join()


async def _serve(tenant: int) -> None:
    work_of_nobody()
    with labels({"soak.extra": tenant}), labels(tenant=tenant, by="task"):
        for _ in range(3):
            _TENANTS[tenant]()
            await asyncio.sleep(0)
        await asyncio.to_thread(_TENANTS[tenant])
        await asyncio.create_task(_serve_more(tenant))
        with labels(tenant=(tenant + 1) % 4):
            _TENANTS[(tenant + 1) % 4]()
        _TENANTS[tenant]()
    work_of_nobody()


async def _serve_more(tenant: int) -> None:
    _TENANTS[tenant]()
    await asyncio.sleep(0)
    _TENANTS[tenant]()


async def tenant_tasks() -> None:
    """Run twelve tasks in turn on one thread, each for one of four tenants."""
    await asyncio.gather(*(_serve(number % 4) for number in range(12)))


# --- garbage, debuggers, tracemalloc, programs ------------------------------------------------


class Cyclic:
    """A cycle whose finalizer runs Python code."""

    def __init__(self) -> None:
        self.itself = self
        self.payload = [burn(5)]

    def __del__(self) -> None:
        burn(10)


def garbage() -> None:
    """Collect cycles that have finalizers and weak references, and grow a bytearray."""
    watched = [weakref.ref(Cyclic(), lambda _: burn(3)) for _ in range(30)]
    gc.collect(random.randrange(3))
    del watched
    big = bytearray(random.randrange(1, 2_000_000))
    for _ in range(50):
        big += b"x" * 1000
    del big


def tracing() -> None:
    """Set and remove debuggers' hooks, which change bytecode in place from 3.12 on."""
    sys.setprofile(lambda *event: None)
    burn(200)
    sys.setprofile(None)
    sys.settrace(lambda *event: None)
    burn(50)
    sys.settrace(None)
    if monitoring := getattr(sys, "monitoring", None):
        events = monitoring.events
        monitoring.use_tool_id(4, "soak")
        try:
            monitoring.register_callback(4, events.PY_START, lambda *event: None)
            monitoring.register_callback(4, events.LINE, lambda *event: None)
            monitoring.set_events(4, events.PY_START | events.LINE)
            burn(50)
        finally:
            monitoring.set_events(4, 0)
            monitoring.free_tool_id(4)
    time.sleep(0.05)


def tracemallocs() -> None:
    """Start tracemalloc on top of the heap sampler's hooks, and stop it."""
    with alone_with_interpreters:
        tracemalloc.start(3)
        burn()
        tracemalloc.take_snapshot()
        tracemalloc.stop()
    time.sleep(0.5)


def commands() -> None:
    """Start a program (vfork and exec)."""
    subprocess.run([sys.executable, "-S", "-c", "pass"], check=True, timeout=60)
    time.sleep(0.2)


# --- sub-interpreters ------------------------------------------------------------------------

SCRIPT = """\
import json, threading
def sub_a(n):
    return sub_b(n) + 1
def sub_b(n):
    return len(json.dumps(sub_c(n)))
def sub_c(n):
    return [[str(each)] * 3 for each in range(n)]
def sub_thread():
    for each in range(20):
        sub_a(each)
thread = threading.Thread(target=sub_thread)
thread.start()
for each in range(40):
    sub_a(each)
thread.join()
"""


# CPython 3.11 itself, without our samplers, hangs if a sub-interpreter lives during a fork or
# while tracemalloc is on. A forked child destroys the sub-interpreter and waits for locks that
# no thread will release (interpreter_clear). tracemalloc waits for the GIL that its own thread
# holds (tracemalloc_raw_alloc, PyGILState_Ensure). So this lock keeps them apart.
alone_with_interpreters = threading.Lock()


def _interpreter(isolated: bool) -> None:
    new = sys.version_info >= (3, 13)
    module = importlib.import_module("_interpreters" if new else "_xxsubinterpreters")
    with alone_with_interpreters:
        if new:
            number = module.create("isolated" if isolated else "legacy")
        else:
            number = module.create(isolated=isolated)
        try:
            if failure := module.run_string(number, SCRIPT):
                raise RuntimeError(f"the script failed: {failure}")
        finally:
            module.destroy(number)


def interpreters() -> None:
    """Run a script in a new sub-interpreter that shares this interpreter's GIL."""
    _interpreter(isolated=False)


def own_gils() -> None:
    """Run a script in a sub-interpreter with its own GIL (from 3.12 on), so in parallel."""
    if sys.version_info >= (3, 12):
        _interpreter(isolated=True)
    time.sleep(0.05)


THREADS: dict[str, Callable[[], None]] = {
    "threads": threads,
    "exec": exec,
    "exceptions": exceptions,
    "recursion": recursion,
    "generators": generators,
    "loops": loops,
    "tenants": tenants,
    "garbage": garbage,
    "tracing": tracing,
    "tracemalloc": tracemallocs,
    "commands": commands,
    "interpreters": interpreters,
    "own_gils": own_gils,
}
TASKS = {"coroutines": coroutines, "tasks": tenant_tasks}
