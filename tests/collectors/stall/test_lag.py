"""The lag figures say how late callbacks were."""

from __future__ import annotations

import asyncio

import pytest

from asgi_pprof.collectors.stall import lag
from tests.collectors.stall.watched import hold_by_sleeping, idle, run, stalls_of

MS = 1_000_000
S = 1000 * MS
START_NS = 1000 * S


@pytest.mark.parametrize(
    ("delays", "pending_ms", "after_s", "quantiles_ms"),
    [
        ([], 0, 0, (0, 0, 0, 0)),  # watched for no time
        ([], 0, 60, (0, 0, 0, 0)),
        ([(1, 1000)], 0, 1, (500, 900, 1000, 1000)),  # blocked all the time
        ([(1, 1000)], 0, 2, (0, 800, 1000, 1000)),  # blocked half of the time
        ([(1, 1000)], 0, 60, (0, 0, 400, 1000)),  # blocked for one second of a minute
        ([(1, 1000), (3, 300)], 0, 60.9, (0, 0, 400, 1000)),
        ([(1, 1000), (3, 300)], 0, 61, (0, 0, 0, 300)),  # the first delay is older than the window
        ([], 500, 1, (0, 400, 500, 500)),  # a delay that has not ended
        ([(200, 100_000)], 0, 200, (70_000, 94_000, 99_400, 100_000)),  # longer than the window
    ],
)
def test_lag_is_taken_over_all_moments(monkeypatch, delays, pending_ms, after_s, quantiles_ms):
    """At each moment of a delay, a callback is late by the rest of the delay."""
    monkeypatch.setattr(lag, "_clock_ns", lambda: START_NS)
    lateness = lag.Lateness()
    for ended_s, delay_ms in delays:
        lateness.add(START_NS + ended_s * S, delay_ms * MS)
    now_ns = START_NS + int(after_s * S)
    found = lateness.quantiles(now_ns, pending_ms * MS, step_ns=100 * MS)
    assert tuple(ns // MS for ns in found) == quantiles_ms


@pytest.mark.timing
def test_the_lag_comes_from_the_stalls_that_are_counted():
    """A loop that is blocked for a part of its time has lag at that part of all moments."""

    async def late(watch):
        await idle(watch)
        for count in range(1, 4):
            hold_by_sleeping()
            await stalls_of(watch, "hold_by_sleeping", count)
        return watch.lag(asyncio.get_running_loop()), watch.totals()

    found, totals = run(late)
    assert found.stalls == sum(total.values[0] for total in totals) >= 3
    assert found.stall_ns == sum(total.values[1] for total in totals) > 0.3e9
    assert 0.1e9 < found.max_ns
    assert 0 <= found.p50_ns <= found.p90_ns <= found.p99_ns <= found.max_ns
