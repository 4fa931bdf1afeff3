"""
The ratio of the CPU times per request of two variants of an application.

The servers' CPU clocks are read, so the client and other processes do not count. Two
servers get requests in short turns, so that a machine that gets slower (by a neighbour
on the same core, or the clock rate) slows both: with turns of a second, times differed
by 10 % on a shared machine, and so did the ratios. After each round the servers exchange roles,
and the ratio is the geometric mean of two rounds: two processes of the same program
differ by some per cent as long as they live.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from statistics import geometric_mean

from tests.bench.load import Client, connect, times
from tests.bench.report import progress
from tests.decode import decode
from tests.servers import ServerProcess, serve_process

PATH = "/items/42?detail=true"
WARM_UP = 2000
TURN = 50  # requests
TURNS = 40  # in half a round, of each server

APP = "tests.bench.apps:app"


@dataclass(frozen=True, slots=True)
class Pair:
    """CPU time per request of the two variants, in microseconds, from two rounds."""

    without_us: float
    with_us: float

    @property
    def ratio(self) -> float:
        return self.with_us / self.without_us


@dataclass(frozen=True, slots=True)
class SampleCost:
    """The CPU time that the sampler measured of itself, and the mean depth of the stacks."""

    engine: str
    samples: int
    depth: float
    cost_us: float


def compare(without: str, with_it: str, rounds: int, loop: str) -> list[Pair]:
    """Compare two variants of tests/bench/apps.py while no profile is recorded."""

    async def one_round(take_turns: TakeTurns, _: ServerProcess) -> tuple[float, float]:
        return await take_turns(times(TURNS))

    return asyncio.run(_compare(without, with_it, rounds, loop, one_round))


def compare_profiling(rounds: int, seconds: int, loop: str) -> list[Pair]:
    """
    Compare the middleware during a CPU profile and its encoding with the middleware at rest.

    The profiled server works during only half of the time. So the costs of a profile
    per second, unlike those per sample, count twice.
    """

    async def one_round(take_turns: TakeTurns, profiled: ServerProcess) -> tuple[float, float]:
        profile = asyncio.create_task(
            asyncio.to_thread(profiled.get, f"profile?seconds={seconds}", timeout=seconds + 60)
        )
        used = await take_turns(lambda: not profile.done())
        assert (await profile).status == 200
        return used

    return asyncio.run(_compare("default", "default", rounds, loop, one_round))


def measure_sample(seconds: int, loop: str) -> SampleCost:
    """Record a CPU profile under load, and return the cost of a sample."""
    with serve_process(APP, loop) as server:
        server.visit("/variant/default")
        profile = decode(asyncio.run(_profile_under_load(server, seconds)))
    return sample_cost(profile)


def sample_cost(profile) -> SampleCost:
    """Return the cost of a sample from the profile's comments, and the mean depth."""
    comments = "\n".join(profile["comments"])
    engine = re.search(r"engine: (\w+)", comments)
    said = re.search(r"sampler: (\d+) samples took ([\d.]+) ms", comments)
    assert engine, comments
    assert said, comments
    samples, milliseconds = int(said[1]), float(said[2])
    # A stack of one location is a pseudo-frame.
    stacks = [(len(stack), values[0]) for stack, values, _ in profile["samples"] if len(stack) > 1]
    depth = sum(size * count for size, count in stacks) / sum(count for _, count in stacks)
    return SampleCost(engine[1], samples, depth, milliseconds * 1000 / samples)


TakeTurns = Callable[[Callable[[], bool]], Awaitable[tuple[float, float]]]


async def _compare(
    without: str,
    with_it: str,
    rounds: int,
    loop: str,
    one_round: Callable[[TakeTurns, ServerProcess], Awaitable[tuple[float, float]]],
) -> list[Pair]:
    pairs = []
    with serve_process(APP, loop) as one, serve_process(APP, loop) as other:
        async with connect(one.port) as client, connect(other.port) as other_client:
            clients = {one: client, other: other_client}
            for each in clients.values():
                await each.visit(PATH, times(WARM_UP))
            for number in range(rounds):
                halves = []
                for plain, profiled in ((one, other), (other, one)):
                    plain.visit(f"/variant/{without}")
                    profiled.visit(f"/variant/{with_it}")
                    take_turns = partial(_take_turns, (plain, profiled), clients)
                    halves.append(await one_round(take_turns, profiled))
                pairs.append(Pair(*map(geometric_mean, zip(*halves, strict=True))))
                progress(f"round {number + 1} of {rounds}: {pairs[-1].ratio:.3f}")
    return pairs


async def _take_turns(
    servers: tuple[ServerProcess, ServerProcess],
    clients: dict[ServerProcess, Client],
    more: Callable[[], bool],
) -> tuple[float, float]:
    pair = tuple(clients[server] for server in servers)
    for client in pair:
        await client.visit(PATH, times(TURN))
    before = [_cpu_us(server) for server in servers]
    turns = 0
    while more():
        await _turn(*pair if turns % 2 else pair[::-1])
        turns += 1
    after = [_cpu_us(server) for server in servers]
    first, second = ((b - a) / turns / TURN for a, b in zip(before, after, strict=True))
    return first, second


async def _turn(*clients: Client) -> None:
    for client in clients:
        await client.visit(PATH, times(TURN))


def _cpu_us(server: ServerProcess) -> float:
    return int(server.visit("/cpu").body) / 1000


async def _profile_under_load(server: ServerProcess, seconds: int) -> bytes:
    profile = asyncio.create_task(
        asyncio.to_thread(server.get, f"profile?seconds={seconds}", timeout=seconds + 60)
    )
    async with connect(server.port) as client:
        await client.visit(PATH, lambda: not profile.done())
    return (await profile).body
