"""Turns places, which the C core numbers, into locations."""

from __future__ import annotations

from collections.abc import Iterable

from asgi_pprof.native.core import native
from asgi_pprof.profile import Function, Location, Stack, pseudo_location
from asgi_pprof.stacks import TRUNCATED, Symbols

_UNREADABLE = pseudo_location("stack could not be read")
_NO_FRAME = pseudo_location("no Python code")
_SKIPPED = pseudo_location("no stack taken: samples of this thread had cost too much CPU")
_LATE = pseudo_location("one long system call, or SIGPROF was blocked")
_LOST = pseudo_location("lost: too many different names")


class Places:
    """Caches locations by place, for as long as one profile is read."""

    def __init__(self) -> None:
        self._symbols = Symbols()
        self._locations: dict[int, Location] = {
            native.PLACE_TRUNCATED: TRUNCATED,
            native.PLACE_UNREADABLE: _UNREADABLE,
            native.PLACE_NO_FRAME: _NO_FRAME,
            native.PLACE_LOST: _LOST,
            native.PLACE_SKIPPED: _SKIPPED,
            native.PLACE_LATE: _LATE,
        }

    def stack(self, places: Iterable[int]) -> Stack:
        """Return the locations of a stack, leaf first."""
        return tuple(self._locations.get(place) or self._describe(place) for place in places)

    def _describe(self, place: int) -> Location:
        try:
            qualname, filename, first_line, line = native.describe(place)
        except ValueError:  # the table has been closed meanwhile
            return _LOST
        function = Function(self._symbols.qualify(filename, qualname), filename, first_line)
        location = self._locations[place] = Location(function, line)
        return location
