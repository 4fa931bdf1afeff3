"""
runtime.MemStats, filled with what CPython, its C library and the system know.

docs/profiles.md gives the source of each field. A field for which there is nothing is
0. Nothing is switched on for it. Pauses of the garbage collector are timed by
`gc.callbacks` while a middleware lives, which costs well under 1 us per collection.

Source: runtime/mstats.go; runtime/pprof, writeHeapInternal; CPython, gc and
sys documentation.
"""

from __future__ import annotations

import gc
import sys
import tracemalloc
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from asgi_pprof.runtime.gc_pauses import GcPauses
from asgi_pprof.runtime.libraries import resource
from asgi_pprof.runtime.memory import (
    MALLOC,
    MAPPED_FILES,
    OTHER,
    PROFILER,
    PYTHON_HEAP,
    THREAD_STACKS,
    Memory,
)


@dataclass(frozen=True, slots=True)
class AllocationCounters:
    """The calls of Python's allocators, and the bytes they allocated, since counting began."""

    mallocs: int
    frees: int
    total_bytes: int


_Value = int | float | tuple[int, ...] | tuple[tuple[int, int, int], ...]
MemStats = Mapping[str, _Value]
"""The fields of Go's runtime.MemStats in its order, then DebugGC and MaxRSS, which Go
prints too, and ours; in bytes unless the name says otherwise."""

_RSS_PARTS = {
    "RSSPythonHeap": PYTHON_HEAP,
    "RSSMalloc": MALLOC,
    "RSSThreadStacks": THREAD_STACKS,
    "RSSMappedFiles": MAPPED_FILES,
    "RSSProfiler": PROFILER,
    "RSSOther": OTHER,
}


def mem_stats(
    memory: Memory,
    gc_pauses: GcPauses,
    sampled_bytes: int = 0,
    counters: AllocationCounters | None = None,
) -> MemStats:
    """
    Return the fields.

    Args:
        memory: What the process has.
        gc_pauses: The timer of garbage collections.
        sampled_bytes: The live bytes of a heap profile.
        counters: Those of the native heap sampler, if it is on.
    """
    pauses = gc_pauses.pauses()
    counters = counters or AllocationCounters(0, 0, 0)
    tables = memory.tables + (
        tracemalloc.get_tracemalloc_memory() if tracemalloc.is_tracing() else 0
    )
    known = memory.system + memory.stack_system + tables
    return {
        "Alloc": memory.alloc,
        "TotalAlloc": counters.total_bytes,
        "Sys": max(memory.mapped, known),
        "Lookups": 0,
        "Mallocs": counters.mallocs,
        "Frees": counters.frees,
        "HeapAlloc": memory.alloc,
        "HeapSys": memory.system,
        "HeapIdle": memory.idle,
        "HeapInuse": memory.inuse,
        "HeapReleased": memory.released,
        "HeapObjects": memory.objects,
        "StackInuse": memory.stack_inuse,
        "StackSys": memory.stack_system,
        "MSpanInuse": 0,
        "MSpanSys": 0,
        "MCacheInuse": 0,
        "MCacheSys": 0,
        "BuckHashSys": tables,
        "GCSys": 0,
        "OtherSys": max(0, memory.mapped - known),
        "NextGC": 0,
        "LastGC": gc_pauses.last_end_ns,
        "PauseTotalNs": gc_pauses.total_ns,
        "PauseNs": tuple(pause_ns for pause_ns, _ in pauses),
        "PauseEnd": tuple(end_ns for _, end_ns in pauses),
        "NumGC": sum(generation["collections"] for generation in gc.get_stats()),
        "NumForcedGC": gc_pauses.forced,
        "GCCPUFraction": gc_pauses.cpu_fraction(),
        # CPython counts the blocks that live, and not those that have been freed.
        "BySize": tuple((size, count, 0) for size, count in memory.by_size),
        "DebugGC": gc.get_debug() != 0,
        "MaxRSS": _max_rss(),
        "RSS": memory.resident,
        **{name: memory.parts[part] for name, part in _RSS_PARTS.items()},
        "HeapSampled": sampled_bytes,
    }


_GO_PRINTS = (
    "Alloc TotalAlloc Sys Lookups Mallocs Frees HeapAlloc HeapSys HeapIdle HeapInuse HeapReleased"
    " HeapObjects Stack MSpan MCache BuckHashSys GCSys OtherSys NextGC LastGC PauseNs PauseEnd"
    " NumGC NumForcedGC GCCPUFraction DebugGC MaxRSS"
).split()


def mem_stats_text(stats: MemStats, unknown: Iterable[str] = ()) -> str:
    """
    Return the trailer of heap?debug=1: Go's lines in Go's order, then the other fields.

    Args:
        stats: The fields.
        unknown: What they leave out; a line each at the end.

    Source: runtime/pprof, writeHeapInternal.
    """
    left = dict(stats)
    lines = ["# runtime.MemStats"]
    for name in _GO_PRINTS:
        if name in left:
            lines.append(f"# {name} = {_text(left.pop(name))}")
        else:  # Go prints these two as a pair
            lines.append(f"# {name} = {left.pop(f'{name}Inuse')} / {left.pop(f'{name}Sys')}")
    lines += (f"# {name} = {_text(value)}" for name, value in left.items())
    lines += (f"# heap: {each}" for each in unknown)
    return "\n".join(lines) + "\n"


def _text(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"[{' '.join(map(_element, value))}]"
    return str(value)


def _element(value: object) -> str:
    return f"{{{' '.join(map(str, value))}}}" if isinstance(value, tuple) else str(value)


def _max_rss() -> int:
    if resource is None:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
