"""
runtime.MemStats as CPython and the system know it.

Every field of Go's struct is there. Each has a source, given beside it below
and in docs/profiles.md; where CPython has no such thing it is 0. Pauses of the
garbage collector are timed by `gc.callbacks` while a middleware lives, which
costs well under 1 us a collection.

Source: runtime/mstats.go; runtime/pprof, writeHeapInternal; CPython, gc and
sys documentation; mallinfo(3), proc(5).
"""

from __future__ import annotations

import gc
import sys
import tracemalloc
from dataclasses import dataclass, fields
from typing import Any

from asgi_pprof.runtime.gc_pauses import gc_pauses
from asgi_pprof.runtime.proc import proc_status


@dataclass(frozen=True, slots=True)
class AllocationCounters:
    """Allocations and frees by Python's allocators, and bytes allocated, since counting began."""

    mallocs: int
    frees: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class MemStats:
    """Go's runtime.MemStats in its order, and RSS; bytes unless named otherwise."""

    Alloc: int
    TotalAlloc: int
    Sys: int
    Lookups: int
    Mallocs: int
    Frees: int
    HeapAlloc: int
    HeapSys: int
    HeapIdle: int
    HeapInuse: int
    HeapReleased: int
    HeapObjects: int
    StackInuse: int
    StackSys: int
    MSpanInuse: int
    MSpanSys: int
    MCacheInuse: int
    MCacheSys: int
    BuckHashSys: int
    GCSys: int
    OtherSys: int
    NextGC: int
    LastGC: int
    PauseTotalNs: int
    PauseNs: tuple[int, ...]
    PauseEnd: tuple[int, ...]
    NumGC: int
    NumForcedGC: int
    GCCPUFraction: float
    BySize: tuple[int, ...]
    DebugGC: bool
    MaxRSS: int
    RSS: int


def read_mem_stats(live_bytes: int = 0, counters: AllocationCounters | None = None) -> MemStats:
    """
    Return the numbers now; takes some hundred us, from any thread.

    Args:
        live_bytes: What a heap profile says is in use.
        counters: What the native heap sampler has counted, if it is on.
    """
    malloc, status, pauses = _mallinfo(), proc_status(), gc_pauses.pauses()
    counters = counters or AllocationCounters(0, 0, 0)
    return MemStats(
        Alloc=live_bytes,
        TotalAlloc=counters.total_bytes,
        Sys=status.get("VmData", 0) + status.get("VmStk", 0),
        Lookups=0,
        Mallocs=counters.mallocs,
        Frees=counters.frees,
        HeapAlloc=live_bytes,
        HeapSys=malloc["arena"] + malloc["hblkhd"],
        HeapIdle=malloc["fordblks"],
        HeapInuse=malloc["uordblks"] + malloc["hblkhd"],
        HeapReleased=0,
        HeapObjects=sys.getallocatedblocks(),
        StackInuse=status.get("VmStk", 0),
        StackSys=status.get("VmStk", 0),
        MSpanInuse=0,
        MSpanSys=0,
        MCacheInuse=0,
        MCacheSys=0,
        BuckHashSys=tracemalloc.get_tracemalloc_memory() if tracemalloc.is_tracing() else 0,
        GCSys=0,
        OtherSys=0,
        NextGC=0,
        LastGC=gc_pauses.last_end_ns,
        PauseTotalNs=gc_pauses.total_ns,
        PauseNs=tuple(pause_ns for pause_ns, _ in pauses),
        PauseEnd=tuple(end_ns for _, end_ns in pauses),
        NumGC=sum(generation["collections"] for generation in gc.get_stats()),
        NumForcedGC=gc_pauses.forced,
        GCCPUFraction=gc_pauses.cpu_fraction(),
        BySize=(),
        DebugGC=gc.get_debug() != 0,
        MaxRSS=_max_rss(),
        RSS=status.get("VmRSS", 0),
    )


_PAIRED = {
    "Stack": "StackInuse StackSys",
    "MSpan": "MSpanInuse MSpanSys",
    "MCache": "MCacheInuse MCacheSys",
}
_GO_PRINTS = (
    "Alloc TotalAlloc Sys Lookups Mallocs Frees HeapAlloc HeapSys HeapIdle HeapInuse HeapReleased"
    " HeapObjects Stack MSpan MCache BuckHashSys GCSys OtherSys NextGC LastGC PauseNs PauseEnd"
    " NumGC NumForcedGC GCCPUFraction DebugGC MaxRSS"
).split()


def mem_stats_text(stats: MemStats) -> str:
    """
    Return the trailer of heap?debug=1: Go's lines in Go's order, then those Go does not print.

    Source: runtime/pprof, writeHeapInternal.
    """
    values: dict[str, Any] = {field.name: getattr(stats, field.name) for field in fields(stats)}
    printed = set(_GO_PRINTS)
    lines = ["# runtime.MemStats"]
    for name in _GO_PRINTS:
        if name in _PAIRED:
            inuse, system = _PAIRED[name].split()
            printed |= {inuse, system}
            lines.append(f"# {name} = {values[inuse]} / {values[system]}")
        else:
            lines.append(f"# {name} = {_text(values[name])}")
    lines += (f"# {name} = {_text(value)}" for name, value in values.items() if name not in printed)
    return "\n".join(lines) + "\n"


def _text(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"[{' '.join(map(str, value))}]"
    return str(value)


_MALLINFO2 = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()


def _mallinfo() -> dict[str, int]:
    """Return glibc's mallinfo2, all 0 with another C library."""
    try:
        import ctypes  # here: a build without it must still be able to import this package

        mallinfo2 = ctypes.CDLL(None).mallinfo2
    except (ImportError, AttributeError, OSError, TypeError):
        return dict.fromkeys(_MALLINFO2, 0)

    class Mallinfo2(ctypes.Structure):
        _fields_ = [(name, ctypes.c_size_t) for name in _MALLINFO2]

    mallinfo2.restype = Mallinfo2
    info = mallinfo2()
    return {name: getattr(info, name) for name in _MALLINFO2}


def _max_rss() -> int:
    try:
        import resource
    except ImportError:
        return 0  # Windows
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
