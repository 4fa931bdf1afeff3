"""
Compares shares in the CPU profile with the true ones.

A share is a function's part of the CPU time of all named functions. So neither the
start and end of the measurement nor the server's own work affect it. The CPU time
outside the named functions is given separately. tests/bench/work.py says how the
truth is measured.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import NamedTuple

from asgi_pprof.params import DEFAULT_HZ
from tests.bench.load import connect
from tests.decode import decode
from tests.servers import ServerProcess, serve_process

CALIBRATION_S = 1.5
PROFILE_S = 5  # for each profile; on a busy machine more profiles are needed
_PREFIX = "tests.bench.work."
_BURNER = _PREFIX + "_burn"
# The root of the main thread's stacks, and so of the loop's.
_MAIN = "_run_module_as_main"


class Share(NamedTuple):
    """A true share of the CPU time and the profile's estimate of it, from 0 to 1."""

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
        samples: The number of samples of named functions.
        clocked: Each function's share of the CPU time of all named functions, by
            thread clocks read around its calls.
        counted: The same, by number of calls x calibrated cost.
        others: Shares of the process's whole CPU time: that in no named function,
            and that of threads other than the loop's.
        comments: The profile's comments.
    """

    samples: int
    clocked: tuple[Share, ...]
    counted: tuple[Share, ...]
    others: tuple[Share, ...]
    comments: Sequence[str]


def worst_error(shares: Sequence[Share]) -> float:
    """Return the largest difference between estimate and truth, from 0 to 1."""
    return max(abs(share.error) for share in shares)


def standard_error(share: float, samples: int) -> float:
    """Return the standard error of a perfect sampler, from 0 to 1."""
    return math.sqrt(share * (1 - share) / samples) if samples else math.nan


def mean_of(runs: Sequence[Accuracy]) -> Accuracy:
    """Return the mean shares of several runs, their samples and the last one's comments."""

    def mean(shares: Sequence[tuple[Share, ...]]) -> tuple[Share, ...]:
        return tuple(
            Share(same[0].name, fmean(s.truth for s in same), fmean(s.estimate for s in same))
            for same in zip(*shares, strict=True)
        )

    return Accuracy(
        samples=sum(run.samples for run in runs),
        clocked=mean([run.clocked for run in runs]),
        counted=mean([run.counted for run in runs]),
        others=mean([run.others for run in runs]),
        comments=runs[-1].comments,
    )


def measure(
    endpoint: str,
    samples: int,
    loop: str = "uvloop",
    burner: bool = False,
    hz: int = DEFAULT_HZ,
    env: dict[str, str] | None = None,
) -> Accuracy:
    """
    Profile the service under load, and compare.

    Args:
        endpoint: "loop" for an async endpoint, "thread" for a `def` one.
        samples: The minimum number of samples, not counting the burner's.
        loop: "asyncio" or "uvloop".
        burner: Whether another thread burns CPU; it uses three quarters of the CPU time.
        hz: Samples per second of CPU time. Periods shorter than the kernel's tick
            (often 4 ms) end several at a time, and such samples are not independent.
        env: The service's environment, in addition to this process's.
    """
    with serve_process("tests.bench.work:app", loop, env=env) as server:
        cost_before = _ask(server, f"calibrate?seconds={CALIBRATION_S}")
        if burner:
            _ask(server, "burn/true")
        before, after, profiles = asyncio.run(
            _profile_under_load(server, f"/{endpoint}", samples, hz)
        )
        if burner:
            _ask(server, "burn/false")
        cost_after = _ask(server, f"calibrate?seconds={CALIBRATION_S}")
    names = list(cost_before)
    clocked = {n: _grown(after, before, endpoint, "cpu_ns", n) for n in names}
    counted = {
        n: _grown(after, before, endpoint, "calls", n) * (cost_before[n] + cost_after[n]) / 2
        for n in names
    }
    return _compare(clocked, counted, before, after, profiles)


def _compare(clocked, counted, before, after, profiles) -> Accuracy:
    estimated, number = dict.fromkeys(clocked, 0), 0
    burner_ns = loop_ns = total_ns = 0
    for stack, (count, cpu_ns), _ in (each for p in profiles for each in p["samples"]):
        functions = {place[0] for place in stack}
        total_ns += cpu_ns
        if _BURNER in functions:
            burner_ns += cpu_ns
            continue
        if _MAIN in stack[-1][0]:
            loop_ns += cpu_ns
        for name in estimated:
            # None of the functions calls another, so a stack has at most one of them.
            if _PREFIX + name in functions:
                estimated[name] += cpu_ns
                number += count
    ran = {n: after[n] - before[n] for n in ("loop_thread_ns", "burner_ns", "process_ns")}
    process_ns = ran["process_ns"]
    named_ns, named_truth_ns = sum(estimated.values()), sum(clocked.values())
    others = [
        Share("in no named function", 1 - named_truth_ns / process_ns, 1 - named_ns / total_ns),
        Share(
            "threads other than the loop's",
            1 - ran["loop_thread_ns"] / process_ns,
            1 - loop_ns / total_ns,
        ),
    ]
    if ran["burner_ns"]:
        others.append(Share("the burner", ran["burner_ns"] / process_ns, burner_ns / total_ns))
    return Accuracy(
        samples=number,
        clocked=_shares(clocked, estimated),
        counted=_shares(counted, estimated),
        others=tuple(others),
        comments=profiles[-1]["comments"],
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


async def _profile_under_load(server: ServerProcess, path: str, samples: int, hz: int):
    """Return the truth before and after several profiles, and the profiles."""

    async def profile():
        profiles, taken = [], 0
        try:
            await asyncio.sleep(0.3)
            before = await asyncio.to_thread(_ask, server, "truth")
            while taken < samples:
                query = f"profile?seconds={PROFILE_S}&hz={hz}"
                answer = await asyncio.to_thread(server.get, query, timeout=600)
                assert answer.status == 200, answer.text
                profiles.append(decode(answer.body))
                taken += sum(
                    count
                    for stack, (count, _), _ in profiles[-1]["samples"]
                    if _BURNER not in {place[0] for place in stack}
                )
            return before, await asyncio.to_thread(_ask, server, "truth"), profiles
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
