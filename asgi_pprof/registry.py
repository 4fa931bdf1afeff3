"""
What is served under which name: collectors, descriptions, and their order.

Source: net/http/pprof, profileDescriptions; runtime/pprof, profiles.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from asgi_pprof.collectors import SnapshotCollector
from asgi_pprof.collectors.contention.collector import ContentionCollector
from asgi_pprof.collectors.custom import custom_profiles
from asgi_pprof.collectors.goroutine.collector import TaskCollector
from asgi_pprof.collectors.goroutine.leak_collector import LeakCollector
from asgi_pprof.collectors.heap.collector import HeapCollector
from asgi_pprof.collectors.heap.sizes import scale_sampled
from asgi_pprof.collectors.heap.tracing import Peaks
from asgi_pprof.collectors.stall.collector import StallCollector
from asgi_pprof.collectors.threadcreate import ThreadCreateCollector
from asgi_pprof.collectors.threads import ThreadCollector
from asgi_pprof.errors import UnknownProfile
from asgi_pprof.profile import Profile

TextForm = Literal["count", "heap", "contention"]


@dataclass(frozen=True, slots=True)
class NamedProfile:
    """
    A profile that can be read at any moment.

    Args:
        name: What it is called in the URL.
        collector: Where it comes from.
        description: For the index page; custom profiles have none.
        text: Which debug=1 text it has.
        custom: Whether the application registered it; those have no deltas, as in Go.
    """

    name: str
    collector: SnapshotCollector
    description: str = ""
    text: TextForm = "count"
    custom: bool = False

    def estimate(self, profile: Profile) -> Profile:
        """Return what its samples stand for; debug=1 texts show them as taken, as in Go."""
        return scale_sampled(profile) if self.text == "heap" else profile


SPECIAL: Mapping[str, str] = {
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
        self.tasks = TaskCollector()
        self.leaks = LeakCollector(self.tasks)
        self._built_in = {
            profile.name: profile
            for profile in (
                NamedProfile(
                    "allocs",
                    HeapCollector(peaks, default_sample_type="alloc_space"),
                    "A sampling of all past memory allocations",
                    "heap",
                ),
                NamedProfile(
                    "block",
                    ContentionCollector("block"),
                    "Stack traces that led to blocking on synchronization primitives",
                    "contention",
                ),
                NamedProfile(
                    "goroutine",
                    self.tasks,
                    "Stack traces of all current asyncio tasks. Use debug=2 as a query parameter"
                    " to list every task with its state, in the format of an unrecovered panic.",
                ),
                NamedProfile(
                    "goroutineleak",
                    self.leaks,
                    "Stack traces of all leaked asyncio tasks: those that nothing can wake any"
                    " more. Use debug=2 as a query parameter to list every task.",
                ),
                NamedProfile(
                    "heap",
                    HeapCollector(peaks),
                    "A sampling of memory allocations of live objects. You can specify the gc GET"
                    " parameter to run GC before taking the heap sample.",
                    "heap",
                ),
                NamedProfile(
                    "mutex",
                    ContentionCollector("mutex"),
                    "Stack traces of holders of contended mutexes",
                    "contention",
                ),
                NamedProfile(
                    "stall",
                    StallCollector(),
                    "Stack traces that held an event loop, and for how long it did not turn",
                    "contention",
                ),
                NamedProfile(
                    "thread",
                    ThreadCollector(),
                    "Stack traces of all current OS threads",
                ),
                NamedProfile(
                    "threadcreate",
                    ThreadCreateCollector(),
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
