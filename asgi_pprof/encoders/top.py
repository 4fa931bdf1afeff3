"""
Encode a CPU profile as text: where the time went by function, by route, then by stack.

Go has no text of CPU profiles, and no legacy format has CPU time in text. The tables
are lines that begin with #, which parsers skip; the stacks are records of a legacy
profile of counts, so that `go tool pprof` reads the text as samples/count.

Source: google/pprof, internal/report, printText; profile/legacy_profile.go, parseGoCount.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterator

from asgi_pprof.encoders.text import comment_lines, count_records, one_line
from asgi_pprof.offload import yield_gil
from asgi_pprof.profile import Profile, Sample

_ROWS = 50  # in each table
_NO_ROUTE = "(no route)"


def cpu_text(profile: Profile) -> Iterator[str]:
    """
    Yield a CPU profile as debug=1 text.

    Args:
        profile: It has samples/count and cpu/nanoseconds.
    """
    count = total_ns = 0
    flat: Counter[str] = Counter()
    cumulative: Counter[str] = Counter()
    routes: Counter[str] = Counter()
    for sample in profile.samples:
        yield_gil()
        samples, cpu_ns = sample.values
        count += samples
        total_ns += cpu_ns
        names = [location.function.name for location in sample.stack]
        flat[names[0]] += cpu_ns
        for name in set(names):  # a function that calls itself counts once
            cumulative[name] += cpu_ns
        routes[_route(sample)] += cpu_ns
    yield (
        f"# {total_ns / 1e9:.3f}s of CPU time in {profile.duration_ns / 1e9:.3f}s,"
        f" {_percent(total_ns, profile.duration_ns)} of one CPU; {count} samples\n"
    )
    yield f"{comment_lines(profile)}#\n"
    yield from _function_table(flat, cumulative, total_ns)
    if routes.keys() - {_NO_ROUTE}:
        yield "#\n"
        yield from _route_table(routes, total_ns)
    yield f"\nsamples profile: total {count}\n"
    yield from count_records(profile.samples)


def _function_table(flat: Counter[str], cumulative: Counter[str], total_ns: int) -> Iterator[str]:
    def rank(name: str) -> tuple[int, int, str]:
        yield_gil()
        return -flat[name], -cumulative[name], name

    yield f"# {'flat':>10} {'flat%':>6} {'cum':>10} {'cum%':>6}  function\n"
    rest_ns = total_ns
    for name in heapq.nsmallest(_ROWS, cumulative, rank):
        rest_ns -= flat[name]
        shares = f"{_share(flat[name], total_ns)} {_share(cumulative[name], total_ns)}"
        yield f"# {shares}  {one_line(name)}\n"
    if len(cumulative) > _ROWS:
        yield f"# {_share(rest_ns, total_ns)} {'':17}  ({len(cumulative) - _ROWS} more functions)\n"


def _route_table(routes: Counter[str], total_ns: int) -> Iterator[str]:
    yield f"# {'cpu':>10} {'cpu%':>6}  route\n"
    rest_ns = total_ns
    for route, cpu_ns in heapq.nsmallest(_ROWS, routes.items(), lambda pair: (-pair[1], pair[0])):
        rest_ns -= cpu_ns
        yield f"# {_share(cpu_ns, total_ns)}  {one_line(route)}\n"
    if len(routes) > _ROWS:
        yield f"# {_share(rest_ns, total_ns)}  ({len(routes) - _ROWS} more routes)\n"


def _route(sample: Sample) -> str:
    labels = dict(sample.labels)
    if "route" not in labels:
        return _NO_ROUTE
    return f"{labels.get('method', '')} {labels['route']}".strip()


def _share(cpu_ns: int, total_ns: int) -> str:
    return f"{f'{cpu_ns / 1e9:.3f}s':>10} {_percent(cpu_ns, total_ns):>6}"


def _percent(part_ns: int, total_ns: int) -> str:
    return f"{100 * part_ns / total_ns:.1f}%" if total_ns else "0.0%"
