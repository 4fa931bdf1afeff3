"""
CPU time per request, as a ratio to the same application without something.

The server's own CPU clock is read, not the wall: what the client uses, and
what other processes take away, does not count. Two servers take short turns,
so what slows the machine down (a neighbour on the same core, the clock rate)
slows both: turns of a second differed by 10 % on a shared machine, and their
ratios with them. After each round they change roles, and two rounds make one
ratio, their geometric mean: two processes of the same program differ by some
per cent for as long as they live.
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
    """CPU time per request in microseconds, without something and with it, of two rounds."""

    without_us: float
    with_us: float

    @property
    def ratio(self) -> float:
        return self.with_us / self.without_us


@dataclass(frozen=True, slots=True)
class SampleCost:
    """What the signal handler took, as it says itself, and the mean depth of the stacks."""

    engine: str
    samples: int
    depth: float
    cost_us: float


def compare(without: str, with_it: str, rounds: int, loop: str) -> list[Pair]:
    """Compare two dresses of tests/bench/apps.py while nobody takes a profile."""

    async def one_round(take_turns: TakeTurns, _: ServerProcess) -> tuple[float, float]:
        return await take_turns(times(TURNS))

    return asyncio.run(_compare(without, with_it, rounds, loop, one_round))


def compare_profiling(rounds: int, seconds: int, loop: str) -> list[Pair]:
    """
    Compare the middleware during a CPU profile, encoding included, with itself at rest.

    It works for half of that time only, so what a profile costs by the second
    and not by the sample is counted twice.
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
    """Take a CPU profile under load, and return what a sample took."""
    with serve_process(APP, loop) as server:
        server.visit("/dress/default")
        profile = decode(asyncio.run(_profile_under_load(server, seconds)))
    return sample_cost(profile)


def sample_cost(profile) -> SampleCost:
    """Return what a sample took as the profile's comments say, and the mean depth."""
    comments = "\n".join(profile["comments"])
    engine = re.search(r"engine: (\w+)", comments)
    said = re.search(r"sampler: (\d+) samples took ([\d.]+) ms", comments)
    assert engine, comments
    assert said, comments
    samples, milliseconds = int(said[1]), float(said[2])
    # Pseudo-frames stand alone.
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
                for plain, dressed in ((one, other), (other, one)):
                    plain.visit(f"/dress/{without}")
                    dressed.visit(f"/dress/{with_it}")
                    take_turns = partial(_take_turns, (plain, dressed), clients)
                    halves.append(await one_round(take_turns, dressed))
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
