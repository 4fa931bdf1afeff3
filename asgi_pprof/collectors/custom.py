"""
Profiles that the application keeps itself, such as one of its open connections.

What is measured: the values that were added and not removed, by the stack that
called `add`. What it costs: about 0.1 us per frame for each `add`.

Source: runtime/pprof, NewProfile, Profile.Add and Profile.Remove.
"""

from __future__ import annotations

import math
import posixpath
import re
import sys
import time
from collections.abc import Callable, Hashable

from asgi_pprof.collectors import AlwaysOn
from asgi_pprof.profile import Profile, Sample, count_profile
from asgi_pprof.stacks import UNKNOWN, RawStack, StackCounter, capture, name_totals, stack_key

_NAME = re.compile(r"[^\s\x00-\x1f\x7f\"\\?#]+")


class CustomProfile(AlwaysOn):
    """
    A profile that the application keeps, served by its name like the built-in ones.

    Exported as `asgi_pprof.Profile`. Methods may be called from any thread.

        connections = Profile("example.com/shop.connections")
        connections.add(connection)
        connections.remove(connection)

    Args:
        name: Its name in the URL. By convention the name starts with a package or
            import path; it has no white space, control characters, `"`, `\\`, `?`, `#`.

    Raises:
        ValueError: The name is taken or not allowed.

    Source: runtime/pprof, NewProfile.
    """

    def __init__(self, name: str) -> None:
        # Encoding and path cleaning must leave the name as it is.
        servable = name.encode("utf-8", "replace").decode() == posixpath.normpath(name)
        if not _NAME.fullmatch(name) or not servable or name.startswith(("/", ".")):
            raise ValueError(f"{name!r} cannot name a profile")
        self.name = name
        self._stacks: dict[Hashable, list[RawStack]] = {}
        if name in BUILT_IN_NAMES or _registry.setdefault(name, self) is not self:
            raise ValueError(f"a profile named {name!r} exists already")

    def add(self, value: Hashable, skip: int = 0) -> None:
        """
        Add a value under the stack of the caller.

        Args:
            value: The profile keeps it alive until it is removed.
            skip: How many of the innermost frames to leave out.

        Raises:
            ValueError: The value is in the profile already.
        """
        # Single dictionary operations need no lock, which a fork could leave held.
        stack = [capture(sys._getframe(1))[max(skip, 0) :]]
        if self._stacks.setdefault(value, stack) is not stack:
            kind = type(value).__name__
            raise ValueError(f"profile {self.name!r} has this {kind} already")

    def remove(self, value: Hashable) -> None:
        """Remove a value; do nothing if it is not there."""
        self._stacks.pop(value, None)

    def close(self) -> None:
        """Stop serving the profile, drop its values and free its name."""
        if _registry.get(self.name) is self:
            _registry.pop(self.name, None)
        self._stacks.clear()

    def count(self) -> int:
        """Return the number of values."""
        return len(self._stacks)

    async def snapshot(self) -> Callable[[], Profile]:
        """Take NAME/count by the stack that added the values."""
        stacks = [stack for (stack,) in self._stacks.copy().values()]
        time_ns = time.time_ns()
        return lambda: count_profile(self.name, _samples(stacks), time_ns)


def _samples(stacks: list[RawStack]) -> tuple[Sample, ...]:
    counter = StackCounter(UNKNOWN, max_stacks=math.inf)
    for stack in stacks:
        counter.add(stack_key(stack), (1,))
    return name_totals(counter.totals())


BUILT_IN_NAMES = frozenset(
    # Includes names reserved for profiles that do not exist yet.
    "allocs block cmdline goroutine goroutineleak heap mutex profile stall stats symbol thread"
    " threadcreate trace".split()
)

# Single dictionary operations, as for values.
_registry: dict[str, CustomProfile] = {}


def custom_profiles() -> dict[str, CustomProfile]:
    """Return the profiles that are in service, by name."""
    return _registry.copy()
