"""
CPU time per request, as a ratio to the bare application.

The server's own CPU clock is read, not the wall: what the client uses, and
what other processes take away, does not count. Both servers live through the
whole run and take short turns, so what slows the machine down (a neighbour on
the same core, the clock rate) slows both: turns of a second differed by 10 %
on a shared machine, and their ratios with them.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from tests.bench.load import Client, connect, times
from tests.bench.report import progress
from tests.decode import decode
from tests.servers import ServerProcess, serve_process

PATH = "/items/42?detail=true"
WARM_UP = 2000
TURN = 50  # requests
TURNS = 60  # in a round, of each server


@dataclass(frozen=True, slots=True)
class Pair:
    """CPU time per request in microseconds, of the two servers in one round."""

    bare_us: float
    profiled_us: float

    @property
    def ratio(self) -> float:
        return self.profiled_us / self.bare_us


@dataclass(frozen=True, slots=True)
class SampleCost:
    """What the signal handler took, as it says itself, and the mean depth of the stacks."""

    samples: int
    depth: float
    cost_us: float


def compare_idle(rounds: int, loop: str) -> list[Pair]:
    """Compare the middleware that nobody asks for a profile with no middleware."""

    async def one_round(take_turns: TakeTurns, with_it: ServerProcess) -> Pair:
        return await take_turns(times(TURNS))

    return asyncio.run(_compare(rounds, loop, one_round))


def compare_profiling(rounds: int, seconds: int, loop: str) -> list[Pair]:
    """Compare a server whose CPU is being profiled, encoding included, with the bare one."""

    async def one_round(take_turns: TakeTurns, with_it: ServerProcess) -> Pair:
        profile = asyncio.create_task(
            asyncio.to_thread(with_it.get, f"profile?seconds={seconds}", timeout=seconds + 60)
        )
        pair = await take_turns(lambda: not profile.done())
        assert (await profile).status == 200
        return pair

    return asyncio.run(_compare(rounds, loop, one_round))


def measure_sample(seconds: int, loop: str) -> SampleCost:
    """Take a CPU profile under load, and return what a sample took."""
    with serve_process("tests.bench.apps:profiled", loop) as server:
        profile = decode(asyncio.run(_profile_under_load(server, seconds)))
    said = re.search(r"sampler: (\d+) samples took ([\d.]+) ms", "\n".join(profile["comments"]))
    assert said, profile["comments"]
    samples, milliseconds = int(said[1]), float(said[2])
    # Pseudo-frames stand alone.
    stacks = [(len(stack), values[0]) for stack, values, _ in profile["samples"] if len(stack) > 1]
    depth = sum(size * count for size, count in stacks) / sum(count for _, count in stacks)
    return SampleCost(samples, depth, milliseconds * 1000 / samples)


TakeTurns = Callable[[Callable[[], bool]], Awaitable[Pair]]


async def _compare(
    rounds: int, loop: str, one_round: Callable[[TakeTurns, ServerProcess], Awaitable[Pair]]
) -> list[Pair]:
    pairs = []
    with (
        serve_process("tests.bench.apps:bare", loop) as without,
        serve_process("tests.bench.apps:profiled", loop) as with_it,
    ):
        async with connect(without.port) as bare, connect(with_it.port) as profiled:

            async def take_turns(more: Callable[[], bool]) -> Pair:
                before = _cpu_us(without), _cpu_us(with_it)
                turns = 0
                while more():
                    await _turn(bare, profiled)
                    turns += 1
                after = _cpu_us(without), _cpu_us(with_it)
                requests = turns * TURN
                return Pair((after[0] - before[0]) / requests, (after[1] - before[1]) / requests)

            for client in (bare, profiled):
                await client.visit(PATH, times(WARM_UP))
            for number in range(rounds):
                pairs.append(await one_round(take_turns, with_it))
                progress(f"round {number + 1} of {rounds}: {pairs[-1].ratio:.3f}")
    return pairs


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
