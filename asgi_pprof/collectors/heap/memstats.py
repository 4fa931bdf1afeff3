"""
runtime.MemStats, filled with what CPython and the system know.

docs/profiles.md gives the source of each field. A field that CPython has nothing for
is 0. Pauses of the garbage collector are timed by `gc.callbacks` while a middleware
lives, which costs well under 1 us per collection.

Source: runtime/mstats.go; runtime/pprof, writeHeapInternal; CPython, gc and
sys documentation; mallinfo(3), proc(5).
"""

from __future__ import annotations

import gc
import sys
import tracemalloc
from collections.abc import Mapping
from dataclasses import dataclass

from asgi_pprof.runtime.gc_pauses import GcPauses
from asgi_pprof.runtime.libraries import ctypes, resource
from asgi_pprof.runtime.proc import proc_status


@dataclass(frozen=True, slots=True)
class AllocationCounters:
    """The calls of Python's allocators, and the bytes they allocated, since counting began."""

    mallocs: int
    frees: int
    total_bytes: int


MemStats = Mapping[str, int | float | tuple[int, ...]]
"""The fields of Go's runtime.MemStats in its order, then DebugGC and MaxRSS, which Go
prints too, and RSS, which is ours; in bytes unless the name says otherwise."""


def read_mem_stats(
    gc_pauses: GcPauses, live_bytes: int = 0, counters: AllocationCounters | None = None
) -> MemStats:
    """
    Return the current numbers; takes some hundred us, on any thread.

    Args:
        gc_pauses: The timer of garbage collections.
        live_bytes: The live bytes of a heap profile.
        counters: Those of the native heap sampler, if it is on.
    """
    malloc, status, pauses = _mallinfo(), proc_status(), gc_pauses.pauses()
    counters = counters or AllocationCounters(0, 0, 0)
    return {
        "Alloc": live_bytes,
        "TotalAlloc": counters.total_bytes,
        "Sys": status.get("VmData", 0) + status.get("VmStk", 0),
        "Lookups": 0,
        "Mallocs": counters.mallocs,
        "Frees": counters.frees,
        "HeapAlloc": live_bytes,
        "HeapSys": malloc["arena"] + malloc["hblkhd"],
        "HeapIdle": malloc["fordblks"],
        "HeapInuse": malloc["uordblks"] + malloc["hblkhd"],
        "HeapReleased": 0,
        "HeapObjects": sys.getallocatedblocks(),
        "StackInuse": status.get("VmStk", 0),
        "StackSys": status.get("VmStk", 0),
        "MSpanInuse": 0,
        "MSpanSys": 0,
        "MCacheInuse": 0,
        "MCacheSys": 0,
        "BuckHashSys": tracemalloc.get_tracemalloc_memory() if tracemalloc.is_tracing() else 0,
        "GCSys": 0,
        "OtherSys": 0,
        "NextGC": 0,
        "LastGC": gc_pauses.last_end_ns,
        "PauseTotalNs": gc_pauses.total_ns,
        "PauseNs": tuple(pause_ns for pause_ns, _ in pauses),
        "PauseEnd": tuple(end_ns for _, end_ns in pauses),
        "NumGC": sum(generation["collections"] for generation in gc.get_stats()),
        "NumForcedGC": gc_pauses.forced,
        "GCCPUFraction": gc_pauses.cpu_fraction(),
        "BySize": (),
        "DebugGC": gc.get_debug() != 0,
        "MaxRSS": _max_rss(),
        "RSS": status.get("VmRSS", 0),
    }


_GO_PRINTS = (
    "Alloc TotalAlloc Sys Lookups Mallocs Frees HeapAlloc HeapSys HeapIdle HeapInuse HeapReleased"
    " HeapObjects Stack MSpan MCache BuckHashSys GCSys OtherSys NextGC LastGC PauseNs PauseEnd"
    " NumGC NumForcedGC GCCPUFraction DebugGC MaxRSS"
).split()


def mem_stats_text(stats: MemStats) -> str:
    """
    Return the trailer of heap?debug=1: Go's lines in Go's order, then the other fields.

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
    return "\n".join(lines) + "\n"


def _text(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"[{' '.join(map(str, value))}]"
    return str(value)


_MALLINFO2 = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()

if ctypes is not None:

    class _Mallinfo2(ctypes.Structure):
        _fields_ = [(name, ctypes.c_size_t) for name in _MALLINFO2]


def _mallinfo() -> dict[str, int]:
    """Return the fields of glibc's mallinfo2; all are 0 with another C library."""
    try:
        mallinfo2 = ctypes.CDLL(None).mallinfo2
    except (AttributeError, OSError, TypeError):
        return dict.fromkeys(_MALLINFO2, 0)
    mallinfo2.restype = _Mallinfo2
    info = mallinfo2()
    return {name: getattr(info, name) for name in _MALLINFO2}


def _max_rss() -> int:
    if resource is None:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
