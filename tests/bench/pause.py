"""
How long the event loop is blocked while heap profiles of 2 GiB are served.

A task of the service sleeps 1 ms again and again, and records how much longer that
took. Seconds with and without requests for profiles alternate. The time that the
thread waited for a CPU is given separately, because the machine causes it.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass

from tests.bench.report import progress
from tests.servers import ServerProcess, serve_process

MIB = 2048
TURN_S = 1.0


@dataclass(frozen=True, slots=True)
class Gaps:
    """Sorted gaps of the loop in milliseconds, with and without the waits for a CPU."""

    what: str
    seconds: float
    requests: int
    gaps: list[float]
    without_wait: list[float]


def measure(turns: int, loop: str, mib: int = MIB) -> list[Gaps]:
    """Return the gaps without requests, and with requests for each form of the profile."""
    queries = ("", "heap", "heap?debug=1", "allocs")
    found: dict[str, list[tuple[float, float]]] = {query: [] for query in queries}
    requests = dict.fromkeys(queries, 0)
    with serve_process("tests.bench.holding:app", loop) as server:
        progress(f"{int(server.visit(f'/hold/{mib}').body) >> 20} MiB")
        server.visit("/tick/true")
        for _ in range(turns):
            for query in queries:
                server.visit("/gaps")
                requests[query] += _ask_for_a_while(server, query)
                # The first gap is from the request for the gaps.
                found[query] += json.loads(server.visit("/gaps").body)[1:]
        server.visit("/tick/false")
    return [
        Gaps(
            query or "nobody asks",
            turns * TURN_S,
            requests[query],
            sorted(gap for gap, _ in gaps),
            sorted(max(0, gap - waited) for gap, waited in gaps),
        )
        for query, gaps in found.items()
    ]


def _ask_for_a_while(server: ServerProcess, query: str) -> int:
    end, made = time.monotonic() + TURN_S, 0
    while time.monotonic() < end:
        if query:
            assert server.get(query).status == 200
            made += 1
        time.sleep(0.05)
    return made
