"""
The CPU profile's shares against the truth.

Shares are of all named functions together, so neither the edges of the
measurement nor the server's own work blurs them; how much is outside them is
told apart. See tests/bench/work.py for where the truth comes from.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from asgi_pprof.collectors.cpu import HZ
from tests.bench.load import connect
from tests.decode import decode
from tests.servers import ServerProcess, serve_process

CALIBRATION_S = 1.5
_PREFIX = "tests.bench.work."
_THREADS = "<thread "


class Share(NamedTuple):
    """A function's share of the CPU time of all named functions, from 0 to 1."""

    name: str
    truth: float
    estimate: float

    @property
    def error(self) -> float:
        return self.estimate - self.truth


@dataclass(frozen=True, slots=True)
class Accuracy:
    """
    One comparison.

    Args:
        samples: How many samples the named functions have.
        counted: Shares whose truth is calls counted x calibrated cost.
        clocked: The same, by thread clocks read around each call.
        outside: What of the loop thread's CPU time is in no named function.
        threads: What of the process's CPU time other threads used; the
            estimate is what their pseudo-frames have.
        comments: The profile's.
    """

    samples: int
    counted: tuple[Share, ...]
    clocked: tuple[Share, ...]
    outside: Share
    threads: Share
    comments: Sequence[str]


def shares_on_the_loop(samples: int = 1000, loop: str = "uvloop") -> list[tuple[str, float, float]]:
    """
    Return (function, true share, estimated share) of an async endpoint under load.

    Starts a server of its own; takes about a second for 90 samples, and four
    more.
    """
    measured = measure("loop", samples, loop)
    return [(share.name, share.truth, share.estimate) for share in measured.counted]


def worst_error(shares: Sequence[tuple[str, float, float]]) -> float:
    """Return the largest difference of an estimate from the truth, from 0 to 1."""
    return max(abs(estimate - truth) for _, truth, estimate in shares)


def standard_error(share: float, samples: int) -> float:
    """Return that of a perfect sampler, from 0 to 1."""
    return math.sqrt(share * (1 - share) / samples) if samples else math.nan


def measure(endpoint: str, samples: int, loop: str = "uvloop", burner: bool = False) -> Accuracy:
    """
    Profile the service under load, and compare.

    Args:
        endpoint: "loop" for an async endpoint, "thread" for a `def` one.
        samples: How many to take, about.
        loop: "asyncio" or "uvloop".
        burner: Whether a thread burns CPU beside it.
    """
    seconds = math.ceil(samples / (0.9 * HZ))
    with serve_process("tests.bench.work:app", loop) as server:
        cost_before = _ask(server, f"calibrate?seconds={CALIBRATION_S}")
        if burner:
            _ask(server, "burn/true")
        before, after, profile = asyncio.run(_profile_under_load(server, f"/{endpoint}", seconds))
        if burner:
            _ask(server, "burn/false")
        cost_after = _ask(server, f"calibrate?seconds={CALIBRATION_S}")
    names = list(cost_before)
    clocked = {n: _grown(after, before, endpoint, "cpu_ns", n) for n in names}
    counted = {
        n: _grown(after, before, endpoint, "calls", n) * (cost_before[n] + cost_after[n]) / 2
        for n in names
    }
    return _compare(names, counted, clocked, before, after, profile, endpoint)


def _compare(names, counted, clocked, before, after, profile, endpoint) -> Accuracy:
    estimated, number = dict.fromkeys(names, 0), 0
    threads_ns = main_ns = 0
    for stack, (count, cpu_ns), _ in profile["samples"]:
        functions = {place[0] for place in stack}
        if stack[0][0].startswith(_THREADS):
            threads_ns += cpu_ns
            continue
        main_ns += cpu_ns
        for name in names:
            # At most one is in a stack: none of them calls another.
            if _PREFIX + name in functions:
                estimated[name] += cpu_ns
                number += count
    loop_ns = after["loop_thread_ns"] - before["loop_thread_ns"]
    process_ns = after["process_ns"] - before["process_ns"]
    known_ns = sum(clocked.values()) if endpoint == "loop" else 0
    return Accuracy(
        samples=number,
        counted=_shares(counted, estimated),
        clocked=_shares(clocked, estimated),
        outside=Share(
            "outside", 1 - known_ns / loop_ns, 1 - _ratio(sum(estimated.values()), main_ns)
        ),
        threads=Share(
            "other threads", 1 - loop_ns / process_ns, _ratio(threads_ns, threads_ns + main_ns)
        ),
        comments=profile["comments"],
    )


def _shares(truth: dict[str, float], estimated: dict[str, int]) -> tuple[Share, ...]:
    true_total, total = sum(truth.values()), sum(estimated.values())
    return tuple(
        Share(name, _ratio(truth[name], true_total), _ratio(estimated[name], total))
        for name in truth
    )


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _grown(after, before, endpoint: str, what: str, name: str) -> int:
    grown: int = after[endpoint][what][name] - before[endpoint][what][name]
    return grown


async def _profile_under_load(server: ServerProcess, path: str, seconds: int):
    """Return the truth just before and just after a profile, and the profile."""

    async def profile():
        try:
            await asyncio.sleep(0.3)
            before = await asyncio.to_thread(_ask, server, "truth")
            answer = await asyncio.to_thread(server.get, f"profile?seconds={seconds}", timeout=600)
            after = await asyncio.to_thread(_ask, server, "truth")
            assert answer.status == 200, answer.text
            return before, after, decode(answer.body)
        finally:
            done.set()

    done = asyncio.Event()
    async with connect(server.port) as client:
        load = client.visit(path, lambda: not done.is_set())
        return (await asyncio.gather(load, profile()))[1]


def _ask(server: ServerProcess, path: str):
    answer = server.visit(f"/{path}")
    assert answer.status == 200, answer.text
    return json.loads(answer.body)
