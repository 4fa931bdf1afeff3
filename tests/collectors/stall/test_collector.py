"""The stall profile shows the code that blocked a loop, and for how long."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import re
import threading
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
from fastapi import FastAPI

from asgi_pprof.collectors.stall.collector import StallCollector
from asgi_pprof.collectors.stall.watch import StallWatch
from asgi_pprof.encoders.protobuf import encode
from asgi_pprof.labels import labels
from asgi_pprof.middleware import PprofMiddleware
from asgi_pprof.runtime.own_work import own_request, own_work
from tests.collectors.stall.watched import (
    HOLD_S,
    SHORT_MS,
    all_stalls,
    cpu_ns,
    hold_by_parsing,
    hold_by_sleeping,
    idle,
    long_document,
    of,
    run,
    stalls_of,
    taken,
    waited_for_cpu_ns,
)
from tests.gotool import flat, go_pprof
from tests.servers import serve_process, until

CLOSE_NS = 20_000_000


# A service whose endpoints block its loop, and measure how long by their own clock.

app = FastAPI()
served = StallWatch()
served.set_threshold(SHORT_MS)
_texts: dict[str, str] = {}


def hold_by_matching(text: str) -> int:
    start = time.perf_counter_ns()
    re.match(
        r"(a+)+$",
        text,
    )  # the call is on several lines; profiles have the first
    return time.perf_counter_ns() - start


def hold_by_computing() -> int:
    start = time.perf_counter_ns()
    while time.perf_counter_ns() - start < HOLD_S * 1e9:
        sum(range(100))
    return time.perf_counter_ns() - start


def hold_briefly(seconds: float = HOLD_S) -> None:
    time.sleep(seconds)


def hold_for_long(seconds: float = 4 * HOLD_S) -> None:
    time.sleep(seconds)


@contextlib.asynccontextmanager
async def hold_at_startup(app: FastAPI) -> AsyncIterator[None]:
    hold_briefly()
    hold_for_long()
    yield


starting = FastAPI(lifespan=hold_at_startup)
starting.add_middleware(PprofMiddleware)


collecting = FastAPI()
collecting.add_middleware(PprofMiddleware, stall_threshold_ms=SHORT_MS)
_kept: list[object] = []


@collecting.get("/keep")
def keep() -> None:
    """Keep objects whose garbage collection takes longer than the threshold."""
    took_ns = 0
    while took_ns < 3 * SHORT_MS * 1e6:
        _kept.append([[number] for number in range(200_000)])
        start_ns = time.perf_counter_ns()
        gc.collect()
        took_ns = time.perf_counter_ns() - start_ns


@collecting.get("/hold")
async def hold_beside() -> None:
    hold_by_sleeping()


@app.get("/watch/{on}")
async def watch(on: bool) -> None:
    if on:
        served.attach(asyncio.get_running_loop())
        await idle(served)
    else:
        served.detach(asyncio.get_running_loop())


@app.get("/prepare")
def prepare() -> None:
    long_document()
    text = "a" * 16 + "b"
    while cpu_ns(hold_by_matching, text) < HOLD_S * 1e9:
        text = "a" + text
    _texts["matching"] = text


@app.get("/hold/{how}")
async def hold(how: str) -> tuple[int, int]:
    """Block the loop. Return how long, and how long threads have waited for a CPU meanwhile."""
    waited_ns = waited_for_cpu_ns()
    return hold_by(how), waited_for_cpu_ns() - waited_ns


def hold_by(how: str) -> int:
    with labels(tenant="acme"):
        if how == "sleeping":
            return hold_by_sleeping()
        if how == "parsing":
            return hold_by_parsing(long_document())
        if how == "matching":
            return hold_by_matching(_texts["matching"])
        return hold_by_computing()


@app.get("/stalls")
async def stalls() -> list[dict[str, object]]:
    return await all_stalls(served)


@dataclass
class Held:
    """What an endpoint has measured, and what was added to the profile."""

    said_ns: int
    waited_ns: int
    count: int
    delay_ns: int
    stalls: list[dict[str, Any]]


def hold_once(server, how: str) -> Held:
    def so_far():
        found = of(json.loads(server.visit("/stalls").body), f"hold_by_{how}")
        count = sum(each["count"] for each in found)
        return found, count, sum(each["delay_ns"] for each in found)

    _, count, delay_ns = so_far()
    said_ns, waited_ns = json.loads(server.visit(f"/hold/{how}").body)
    with contextlib.suppress(AssertionError):
        until(lambda: so_far()[1] > count, seconds=5)  # until the watch thread has counted it
    found, count_after, delay_after_ns = so_far()
    return Held(said_ns, waited_ns, count_after - count, delay_after_ns - delay_ns, found)


@pytest.mark.server
@pytest.mark.timing
def test_blocking_endpoints_are_found_with_line_duration_and_labels(loop_name):
    """A sleep, a parse, a slow pattern and plain code are timed to 20 ms of the handler's clock."""
    with serve_process("tests.collectors.stall.test_collector:app", loop_name) as server:
        server.visit("/prepare")
        server.visit("/watch/true")
        for how in ("sleeping", "parsing", "matching", "computing"):
            function = globals()[f"hold_by_{how}"]
            errors = []
            while not errors or abs(errors[-1]) > CLOSE_NS:
                # A busy machine can take the CPU away between two readings of a clock, and keep
                # the watch thread from its scan, but it does not always do so.
                assert len(errors) < 12, f"{how}: {errors} ns beside the handler's clock"
                held = hold_once(server, how)
                assert held.count == 1 or (held.count == 0 and held.waited_ns > CLOSE_NS), held
                errors.append(held.delay_ns - held.said_ns)
            for stall in held.stalls:
                assert stall["labels"] == {"tenant": "acme", "task": "Task"}
                line = stall["lines"][function.__name__] - function.__code__.co_firstlineno
                assert line in ((2,) if how != "computing" else (2, 3)), how
        server.visit("/watch/false")


def test_a_callback_that_blocks_is_found(loop_name):
    """It has the callback's stack, and no task."""

    async def blocked(watch):
        await idle(watch)
        said = []
        loop = asyncio.get_running_loop()
        loop.call_soon(lambda: said.append(hold_by_sleeping()))
        return said, await stalls_of(watch, "hold_by_sleeping")

    said, (stall,) = run(blocked, loop_name)
    assert stall["count"] == 1
    assert stall["labels"] == {}
    assert said[0] / 2 < stall["delay_ns"]


def shares_of(found, *functions):
    """Return which part of the nanoseconds each function has."""
    total_ns = sum(each["delay_ns"] for each in found)
    return [sum(each["delay_ns"] for each in of(found, name)) / total_ns for name in functions]


@pytest.mark.timing
def test_a_stall_is_divided_among_all_that_ran_in_it(loop_name):
    """It has one count, at the stack that took most of it."""

    async def block():
        hold_briefly()
        hold_for_long()

    async def blocked(watch):
        await idle(watch)
        await block()
        await stalls_of(watch, "hold_for_long")
        return await all_stalls(watch)

    found = run(blocked, loop_name)
    briefly, for_long = shares_of(found, "hold_briefly", "hold_for_long")
    assert 0.1 < briefly < 0.35
    assert 0.65 < for_long < 0.9
    assert [each["count"] for each in of(found, "hold_for_long")] == [1]
    assert {each["count"] for each in of(found, "hold_briefly")} == {0}


@pytest.mark.timing
def test_a_long_callback_after_many_short_ones_is_named(loop_name):
    """They run in one iteration, whose first look falls on a short one."""

    async def blocked(watch):
        await idle(watch)
        loop = asyncio.get_running_loop()
        for _ in range(100):
            loop.call_soon(hold_briefly, 0.008)
        loop.call_soon(hold_for_long, 0.8)
        await asyncio.sleep(0)
        async with asyncio.timeout(20):
            while not of(found := await all_stalls(watch), "hold_for_long"):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        return found

    short, long = shares_of(run(blocked, loop_name), "hold_briefly", "hold_for_long")
    assert 0.35 < long < 0.65
    assert 0.35 < short < 0.65


@pytest.mark.server
@pytest.mark.timing
def test_a_stall_at_startup_has_the_lines_that_ran(loop_name):
    """The loop is watched from the moment at which the lifespan reaches the middleware."""
    with serve_process("tests.collectors.stall.test_collector:starting", loop_name) as server:
        text = server.visit("/debug/pprof/stall?debug=1").text
    delays_ns = {
        name: sum(
            int(delay_ns)
            for delay_ns, stack in re.findall(r"^(\d+) \d+ @.*\n((?:#.*\n)+)", text, re.M)
            if f".{name}+" in stack
        )
        for name in ("hold_briefly", "hold_for_long")
    }
    assert 0.1 < delays_ns["hold_briefly"] / delays_ns["hold_for_long"] < 0.5


def stalls_in(text: str):
    """Return count, nanoseconds, labels and functions of each sample in a debug=1 text."""
    pattern = r"^(\d+) (\d+) @.*\n(?:# labels: (.*)\n)?((?:#.*\n)+)"
    for delay_ns, count, found, stack in re.findall(pattern, text, re.M):
        yield int(count), int(delay_ns), json.loads(found or "{}"), stack


@pytest.mark.server
def test_stalls_that_we_cause_are_labelled_and_not_counted(loop_name):
    """A collection that a request asks for holds the loop, and the application does not."""
    with serve_process("tests.collectors.stall.test_collector:collecting", loop_name) as server:
        server.visit("/keep")
        server.visit("/hold")
        for _ in range(3):
            server.visit("/debug/pprof/heap?gc=1")
        found = list(stalls_in(server.visit("/debug/pprof/stall?debug=1").text))
        stats = server.visit("/debug/pprof/stats").text
    own = [each for each in found if "asgi_pprof" in each[2]]
    assert any("GcPauses.collect" in stack for _, _, _, stack in own)
    others = [each for each in found if "asgi_pprof" not in each[2]]
    assert any(".hold_by_sleeping+" in stack for _, _, _, stack in others)
    assert not any("asgi_pprof.app." in stack for _, _, _, stack in others)
    counted = re.findall(r"^loop_stalls_total\S* (\d+)$", stats, re.M)
    assert [int(each) for each in counted] == [sum(count for count, *_ in others)]


def test_stalls_below_our_code_and_in_our_tasks_are_labelled():
    """The application's own are not."""

    @own_work
    def hold_own() -> None:
        hold_by_sleeping()

    async def hold_in_task() -> None:
        hold_by_sleeping()

    async def blocked(watch):
        await idle(watch)
        hold_own()
        await stalls_of(watch, "hold_own")
        with own_request({}):
            await asyncio.create_task(hold_in_task())
        await stalls_of(watch, "hold_in_task")
        found = await all_stalls(watch)
        return found, watch.lag(asyncio.get_running_loop()).stalls

    found, counted = run(blocked)
    for function in ("hold_own", "hold_in_task"):
        assert [each["labels"]["asgi_pprof"] for each in of(found, function)] == ["own work"]
    others = [each for each in found if "asgi_pprof" not in each["labels"]]
    assert counted == sum(each["count"] for each in others)


def test_a_stalls_task_is_named_and_default_numbers_are_dropped():
    """Tasks with names of their own are distinguished."""

    async def block():
        hold_by_sleeping()

    async def blocked(watch):
        await idle(watch)
        await asyncio.create_task(block(), name="importer")
        await asyncio.create_task(block())
        return await stalls_of(watch, "block", count=2)

    assert {stall["labels"]["task"] for stall in run(blocked)} == {"importer", "Task"}


def test_a_stall_is_kept_if_reading_its_labels_fails():
    """An application's own objects may raise anything."""

    class HostileTask(asyncio.Task):
        def get_name(self):
            if threading.get_ident() != threading.main_thread().ident:
                raise ZeroDivisionError
            return super().get_name()

    async def block():
        hold_by_sleeping()

    async def blocked(watch):
        await idle(watch)
        await HostileTask(block(), loop=asyncio.get_running_loop())
        return await stalls_of(watch, "hold_by_sleeping")

    (stall,) = run(blocked)
    assert stall["labels"] == {"task": "unreadable: ZeroDivisionError"}


@pytest.mark.timing
def test_stalls_of_one_place_add_up():
    """Their count and nanoseconds rise."""

    async def blocked(watch):
        await idle(watch)
        totals = []
        for count in range(1, 4):
            hold_by_sleeping()
            (stall,) = await stalls_of(watch, "hold_by_sleeping", count)
            totals.append((stall["count"], stall["delay_ns"]))
        return totals

    totals = run(blocked)
    assert [count for count, _ in totals] == [1, 2, 3]
    assert all(after - before > 0.1e9 for (_, before), (_, after) in pairwise(totals))


def test_a_threshold_of_zero_is_off_until_a_window():
    """A window switches the watch on at 100 ms, and off again."""

    async def windowed(watch):
        collector = StallCollector(watch)
        watch.set_threshold(0)
        assert not watch.is_on()
        assert "off" in collector.note()
        hold_by_sleeping()
        assert (await taken(watch)).samples == ()
        with collector.window():
            assert watch.threshold_ms == 100
            await idle(watch)
            hold_by_sleeping()
            await stalls_of(watch, "hold_by_sleeping")
        assert not watch.is_on()
        hold_by_sleeping()
        watch.set_threshold(2000)
        await idle(watch)
        hold_by_sleeping()
        await asyncio.sleep(0.3)
        await idle(watch)
        return of(await all_stalls(watch), "hold_by_sleeping"), collector.count()

    (stall,), count = run(windowed)
    assert stall["count"] == 1
    assert count >= 1  # further stalls, which a busy machine causes, have other stacks


def test_no_loop_is_watched_where_that_is_not_safe(monkeypatch):
    """That is so without a GIL, and in sub-interpreters. The index page says why."""
    monkeypatch.setattr("asgi_pprof.collectors.stall.watch.CANNOT", "off: not here")

    async def watched(watch):
        return watch._is_watching, watch.is_on(), StallCollector(watch).note()

    assert run(watched) == (False, False, "off: not here")


@pytest.mark.go
def test_go_tool_pprof_reads_the_profile(tmp_path):
    """The function that blocked the loop comes first."""

    async def blocked(watch):
        await idle(watch)
        hold_by_sleeping()
        await stalls_of(watch, "hold_by_sleeping")
        return encode(await taken(watch))

    path = tmp_path / "stall.pb.gz"
    path.write_bytes(run(blocked))
    top = go_pprof(tmp_path, "-top", "-sample_index=delay", path).text
    (held,) = [value for name, value in flat(top).items() if name.endswith("hold_by_sleeping")]
    assert held.endswith("ms")
