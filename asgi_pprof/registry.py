"""
The named profiles, their collectors and descriptions, and their order.

Source: net/http/pprof, profileDescriptions; runtime/pprof, profiles.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from asgi_pprof.collectors import SnapshotCollector
from asgi_pprof.collectors.contention.collector import ContentionCollector
from asgi_pprof.collectors.custom import custom_profiles
from asgi_pprof.collectors.goroutine.collector import TaskCollector
from asgi_pprof.collectors.goroutine.leak_collector import LeakCollector
from asgi_pprof.collectors.heap.collector import HeapCollector
from asgi_pprof.collectors.heap.memstats import mem_stats, mem_stats_text
from asgi_pprof.collectors.heap.sizes import scale_sampled
from asgi_pprof.collectors.heap.tracing import Peaks
from asgi_pprof.collectors.stall.collector import StallCollector
from asgi_pprof.collectors.threadcreate import ThreadCreateCollector
from asgi_pprof.collectors.threads import ThreadCollector
from asgi_pprof.encoders.text import contention_text, count_text, heap_text
from asgi_pprof.errors import UnknownProfile
from asgi_pprof.merge import by_stack
from asgi_pprof.profile import Goroutine, Profile
from asgi_pprof.recorders import (
    contention,
    gc_pauses,
    heap_sampler,
    heap_tracing,
    stall_watch,
    thread_starts,
)
from asgi_pprof.runtime.memory import read_memory


def _as_taken(profile: Profile) -> Profile:
    return profile


def _heap_text(name: str, profile: Profile) -> Iterator[str]:
    if profile.duration_ns:
        # A delta has estimates, which have no size class in a text, and must not be scaled again.
        delta = replace(by_stack(profile), period=1)
        return heap_text(delta, delta, trailer="")
    estimates = scale_sampled(profile)
    memory = read_memory()
    sampled_bytes = estimates.total("inuse_space")
    stats = mem_stats(memory, gc_pauses, sampled_bytes, heap_sampler.counters())
    return heap_text(profile, estimates, mem_stats_text(stats, memory.unknown))


@dataclass(frozen=True, slots=True)
class NamedProfile:
    """
    A profile that can be read at any moment, and all that is particular to it.

    Args:
        name: The name in its URL.
        collector: The source of its samples.
        description: For the index page; custom profiles have none.
        text: Yields the debug=1 text, given the name and the unscaled samples, as Go does,
            or a delta of scaled ones.
        estimate: Scales the samples to estimates of what they stand for.
        dump: Yields the entries of the debug=2 text; None where that is the debug=1 text.
        collects_garbage: Whether `gc=1` runs a collection first.
        of_asyncio: Whether it must be collected on an asyncio loop.
        custom: Whether the application registered it; those have no deltas, as in Go.
    """

    name: str
    collector: SnapshotCollector
    description: str = ""
    text: Callable[[str, Profile], Iterator[str]] = count_text
    estimate: Callable[[Profile], Profile] = _as_taken
    dump: Callable[[], AsyncGenerator[Goroutine, None]] | None = None
    collects_garbage: bool = False
    of_asyncio: bool = False
    custom: bool = False


DESCRIPTIONS: Mapping[str, str] = {
    "cmdline": "The command line invocation of the current program",
    "profile": "CPU profile. You can specify the duration in the seconds GET parameter. After you"
    " get the profile file, use the go tool pprof command to investigate the profile.",
    "stats": "Figures of event loops, thread pools, garbage collection and memory, one name and"
    " value a line, as Prometheus reads them.",
    "symbol": "Maps given program counters to function names. Counters can be specified in a GET"
    " raw query or POST body, multiple counters are separated by '+'.",
}
"""The endpoints that are no named profiles, and their descriptions."""


class Registry:
    """The built-in profiles of one application, and the process's custom ones."""

    def __init__(self) -> None:
        peaks = Peaks()
        tasks = TaskCollector()
        leaks = LeakCollector(tasks)
        self._built_in = {
            profile.name: profile
            for profile in (
                NamedProfile(
                    "allocs",
                    HeapCollector(heap_sampler, heap_tracing, peaks, "alloc_space"),
                    "A sampling of all past memory allocations",
                    _heap_text,
                    scale_sampled,
                ),
                NamedProfile(
                    "block",
                    ContentionCollector(contention, "block"),
                    "Stack traces that led to blocking on synchronization primitives",
                    contention_text,
                ),
                NamedProfile(
                    "goroutine",
                    tasks,
                    "Stack traces of all current asyncio tasks. Use debug=2 as a query parameter"
                    " to list every task with its state, in the format of an unrecovered panic.",
                    dump=tasks.goroutines,
                    of_asyncio=True,
                ),
                NamedProfile(
                    "goroutineleak",
                    leaks,
                    "Stack traces of all leaked asyncio tasks: those that nothing can wake any"
                    " more. Use debug=2 as a query parameter to list every task.",
                    dump=leaks.goroutines,
                    of_asyncio=True,
                ),
                NamedProfile(
                    "heap",
                    HeapCollector(heap_sampler, heap_tracing, peaks),
                    "A sampling of memory allocations of live objects. You can specify the gc GET"
                    " parameter to run GC before taking the heap sample.",
                    _heap_text,
                    scale_sampled,
                    collects_garbage=True,
                ),
                NamedProfile(
                    "mutex",
                    ContentionCollector(contention, "mutex"),
                    "Stack traces of holders of contended mutexes",
                    contention_text,
                ),
                NamedProfile(
                    "stall",
                    StallCollector(stall_watch),
                    "Stack traces that blocked an event loop, and for how long",
                    contention_text,
                ),
                NamedProfile(
                    "thread",
                    ThreadCollector(),
                    "Stack traces of all current OS threads",
                ),
                NamedProfile(
                    "threadcreate",
                    ThreadCreateCollector(thread_starts),
                    "Stack traces that led to the creation of new OS threads",
                ),
            )
        }

    def profiles(self) -> list[NamedProfile]:
        """Return all named profiles, sorted by name."""
        custom = (
            NamedProfile(name, profile, custom=True) for name, profile in custom_profiles().items()
        )
        return sorted([*self._built_in.values(), *custom], key=lambda profile: profile.name)

    def lookup(self, name: str) -> NamedProfile:
        """
        Return the profile of that name.

        Raises:
            UnknownProfile: There is none.
        """
        known = self._built_in.get(name)
        if known is not None:
            return known
        custom = custom_profiles().get(name)
        if custom is None:
            raise UnknownProfile
        return NamedProfile(name, custom, custom=True)
