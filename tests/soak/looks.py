"""
The soak's slice `looks`: read other threads' stacks under what makes that dangerous.

All code that reads other threads' frames runs without a pause (thread, goroutine,
goroutineleak, block, mutex, stats, the stall monitor). Meanwhile frames are created
and destroyed, garbage is collected at every step, and callbacks and finalizers of
these collections let other threads run.
"""

from __future__ import annotations

import asyncio
import gc
import random
import threading
import time
import weakref
from collections.abc import Callable, Generator
from typing import Any

import greenlet

from asgi_pprof.collectors.contention.collector import Contention
from asgi_pprof.collectors.goroutine.collector import TaskCollector
from asgi_pprof.collectors.goroutine.leak_collector import LeakCollector
from asgi_pprof.collectors.stall.collector import StallCollector
from asgi_pprof.collectors.stats import Stats
from asgi_pprof.collectors.threads import ThreadCollector
from asgi_pprof.recorders import gc_pauses, memory_bytes, stall_watch
from asgi_pprof.runtime.frames import capture, current_frames
from tests.soak import generated, work
from tests.soak.checks import Checker

_tags = iter(range(10**12))
_contention = Contention()


async def profiles(checker: Checker) -> None:
    """Take every profile that reads other threads' frames, while this loop is monitored."""
    loop = asyncio.get_running_loop()
    stall_watch.set_threshold(5)
    stall_watch.attach(loop)
    gc_pauses.enable()
    waiting = [asyncio.create_task(_wait(depth)) for depth in (1, 10, 150)]
    generator = _stream()
    waiting.append(asyncio.create_task(anext(generator)))  # type: ignore[arg-type]
    try:
        with _contention.window("block"), _contention.window("mutex"):
            tasks = TaskCollector()
            for collector in (
                ThreadCollector(),
                tasks,
                LeakCollector(tasks),
                StallCollector(stall_watch),
            ):
                profile = (await collector.snapshot())()
                checker.check_stacks(profile.samples, "look")
                checker.count(looks=1)
            async for _ in tasks.goroutines():
                pass
            await Stats(stall_watch, gc_pauses, memory_bytes).text()
            time.sleep(0.006)  # noqa: ASYNC251 (a stall)
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        await generator.aclose()
        gc_pauses.disable()
        stall_watch.detach(loop)


async def _wait(depth: int) -> None:
    await (_wait(depth - 1) if depth else asyncio.sleep(60))


async def _stream() -> Any:
    await _wait(3)
    yield 1


def looks(checker: Checker) -> None:
    """Read the stacks of all threads for 0.2 s without a pause."""
    end = time.monotonic() + 0.2
    while time.monotonic() < end:
        stacks = current_frames()
        for stack in stacks.values():
            for code, _ in capture(stack):
                if type(code).__name__ != "code":
                    checker.fail(f"look: {code!r} is no code")
        stacks.clear()
        checker.count(looks=1)


def _deep(depth: int, then: Callable[[], object]) -> object:
    return _deep(depth - 1, then) if depth else then()


def stacks() -> None:
    """Run deep and shallow stacks of functions that are created and destroyed."""
    for _ in range(20):
        chain = generated.make_chain(next(_tags) % generated.TAGS)
        for depth in (0, 3, 12, 150):
            _deep(depth, lambda chain=chain: chain(random.randrange(20)))


class _LetsGo:
    """Garbage in a cycle, whose finalizer lets other threads run."""

    def __init__(self) -> None:
        self.me = self
        self.payload = [bytes(100) for _ in range(random.randrange(20))]

    def __del__(self) -> None:
        time.sleep(0)
        work.burn(5)


def _let_go(*_: object) -> None:
    time.sleep(0)


def collections() -> None:
    """Collect garbage at every step for a moment, with callbacks that sleep."""
    before = gc.get_threshold()
    gc.callbacks.append(_let_go)
    gc.set_threshold(random.choice((1, 5, 50)), *before[1:])
    try:
        for _ in range(20):
            kept = [weakref.ref(_LetsGo(), _let_go) for _ in range(5)]
            time.sleep(0.001)
        del kept
    finally:
        gc.set_threshold(*before)
        gc.callbacks.remove(_let_go)
    time.sleep(0.1)


SCRIPT = "def freed(): namespace.clear()"


def freed_code() -> None:
    """Free code objects by their own calls: a weakref callback sleeps while the frame exists."""
    for _ in range(20):
        namespace: dict[str, Any] = {}
        exec(SCRIPT, namespace)
        namespace["namespace"] = namespace
        watched = weakref.ref(namespace["freed"].__code__, _let_go)
        namespace.pop("freed")()
        del watched


def _closed_by_the_collector(depth: int) -> Generator[int]:
    try:
        yield from _closed_by_the_collector(depth - 1) if depth else (yield 1)
    finally:
        time.sleep(0)
        work.burn(3)


async def _never_ends(future: Any) -> None:
    try:
        await future
    finally:
        _let_go()


class _Forever:
    def __await__(self) -> Generator[None]:
        yield


def closed_generators() -> None:
    """Let the garbage collector close generators and coroutines."""
    for depth in (1, 5, 40):
        left: list[Any] = [_closed_by_the_collector(depth), _never_ends(_Forever())]
        next(left[0])
        left[1].send(None)
        left.append(left)
        del left
    gc.collect(0)


def variables() -> None:
    """Return from functions whose variables are cleared one by one, by finalizers that sleep."""

    def function(number: int) -> None:
        first = [number] * 50
        second = _LetsGo()
        second.me = None  # type: ignore[assignment]  # no cycle: it dies with its variable
        third = [first, number]
        del third

    for number in range(5):
        function(number)


def greenlets() -> None:
    """Switch between greenlets, and let unfinished ones be collected with their stacks."""

    def run(depth: int) -> None:
        for _ in range(3):
            _deep(depth, lambda: greenlet.getcurrent().parent.switch())
            work.burn(10)

    switched = [greenlet.greenlet(run) for _ in range(5)]
    for _ in range(3):
        for number, each in enumerate(switched):
            each.switch(number * 10)
    del switched


def short_threads() -> None:
    """Start threads that end at once."""
    started = [threading.Thread(target=work.burn, args=(number,)) for number in range(20)]
    for thread in started:
        thread.start()
    for thread in started:
        thread.join()


LOOKING: dict[str, Callable[[Checker], None]] = {
    "looks": looks,
    "profiles": lambda checker: asyncio.run(profiles(checker)),
}
THREADS: dict[str, Callable[[], None]] = {
    "stacks": stacks,
    "collections": collections,
    "freed_code": freed_code,
    "closed_generators": closed_generators,
    "variables": variables,
    "greenlets": greenlets,
    "short_threads": short_threads,
}
WITH = ["threads", "exec", "garbage", "loops", "interpreters", "own_gils", "coroutines"]
"""Work from `work.py` that runs in this slice too."""
