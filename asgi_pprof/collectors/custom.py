"""
Profiles an application keeps itself, such as its open connections.

Each value that is added has the stack of whoever added it; the profile counts
the values that have not been removed. Adding costs about 0.1 us a frame.

Source: runtime/pprof, NewProfile, Profile.Add and Profile.Remove.
"""

from __future__ import annotations

import math
import posixpath
import re
import sys
import threading
import time
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext

from asgi_pprof.profile import Profile, Sample, count_profile
from asgi_pprof.stacks import UNKNOWN, RawStack, StackCounter, capture, name_totals, stack_key

_NAME = re.compile(r"[^\s\x00-\x1f\x7f\"\\?#]+")


class CustomProfile:
    """
    A profile of the application's own, served under its name beside the built-in ones.

    Exported as `asgi_pprof.Profile`. Methods may be called from any thread.

        connections = Profile("example.com/shop.connections")
        connections.add(connection)
        connections.remove(connection)

    Args:
        name: What it is called in the URL, by convention led by a package or
            import path; no white space, control characters, `"`, `\\`, `?` or `#`.

    Raises:
        ValueError: The name is taken, or no name for a profile.

    Source: runtime/pprof, NewProfile.
    """

    def __init__(self, name: str) -> None:
        # A name must come through a URL as it is.
        servable = name.encode("utf-8", "replace").decode() == posixpath.normpath(name)
        if not _NAME.fullmatch(name) or not servable or name.startswith(("/", ".")):
            raise ValueError(f"{name!r} cannot name a profile")
        self.name = name
        self._stacks: dict[Hashable, list[RawStack]] = {}
        with _registry_lock:
            if name in BUILT_IN_NAMES or name in _registry:
                raise ValueError(f"a profile named {name!r} exists already")
            _registry[name] = self

    def add(self, value: Hashable, skip: int = 0) -> None:
        """
        Add a value, with the stack of the caller.

        Args:
            value: Anything hashable; it is kept alive until it is removed.
            skip: How many of the innermost frames to leave out.

        Raises:
            ValueError: The value is in the profile already.
        """
        # Single dictionary operations, no lock: a fork could leave one taken.
        stack = [capture(sys._getframe(1))[max(skip, 0) :]]
        if self._stacks.setdefault(value, stack) is not stack:
            kind = type(value).__name__
            raise ValueError(f"profile {self.name!r} has this {kind} already")

    def remove(self, value: Hashable) -> None:
        """Remove a value; nothing happens if it is not there."""
        self._stacks.pop(value, None)

    def close(self) -> None:
        """Take the profile out of service and forget its values; its name is free again."""
        with _registry_lock:
            if _registry.get(self.name) is self:
                del _registry[self.name]
        self._stacks.clear()

    def count(self) -> int:
        """Return the number of values."""
        return len(self._stacks)

    def note(self) -> str:
        """Return nothing: it is always on."""
        return ""

    def window(self) -> AbstractContextManager[None]:
        """Return a manager that does nothing."""
        return nullcontext()

    async def snapshot(self) -> Callable[[], Profile]:
        """Give NAME/count by the stack that added the values."""
        stacks = [stack for (stack,) in self._stacks.copy().values()]
        time_ns = time.time_ns()
        return lambda: count_profile(self.name, _samples(stacks), time_ns)


def _samples(stacks: list[RawStack]) -> tuple[Sample, ...]:
    counter = StackCounter(UNKNOWN, max_stacks=math.inf)
    for stack in stacks:
        counter.add(stack_key(stack), (1,))
    return name_totals(counter.totals())


BUILT_IN_NAMES = frozenset(
    # Those still to come are kept free for them.
    "allocs block cmdline goroutine goroutineleak heap mutex profile stall stats symbol thread"
    " threadcreate trace".split()
)

_registry: dict[str, CustomProfile] = {}
_registry_lock = threading.Lock()


def custom_profiles() -> dict[str, CustomProfile]:
    """Return the application's profiles by name."""
    with _registry_lock:
        return dict(_registry)
