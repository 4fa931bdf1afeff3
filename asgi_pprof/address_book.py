"""
The `symbol` endpoint: function names for the addresses in debug=1 texts.

Addresses are hashes, from which no name can be computed, so the latest 8,192
locations of the texts served are remembered. Other workers of the same service do
not know them.

Source: net/http/pprof, Symbol; strconv, ParseUint with base 0.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator

from asgi_pprof.offload import yield_gil
from asgi_pprof.profile import Location, Profile
from asgi_pprof.slices import Slices

_SLICE_S = 0.001
_MAX_NAMES = 8_192
_NAME_BYTES = 250
_BUFFER = 4096  # the size of bufio's buffer, which must hold an item and its separator
_MAX_BODY = 16 * 2**20  # 800,000 addresses
_MAX_ADDRESS = 2**64 - 1
_GO_INTEGER = re.compile(r"0[xX](_?[0-9a-fA-F])+|0[bB](_?[01])+|0[oO]?(_?[0-7])+|[1-9](_?[0-9])*|0")


class AddressBook:
    """Function names by address, from the texts that one application has served."""

    def __init__(self) -> None:
        self._names: dict[int, str] = {}

    def remember(self, profile: Profile) -> None:
        """Remember the locations of a profile; drop the oldest beyond the limit."""
        locations: set[Location] = set()
        for sample in profile.samples:
            yield_gil()
            locations.update(sample.stack)
            if len(locations) >= _MAX_NAMES:
                break
        for location in locations:
            yield_gil()
            address = location.address
            self._names.pop(address, None)
            self._names[address] = location.function.name
        for address in list(self._names)[: max(0, len(self._names) - _MAX_NAMES)]:
            self._names.pop(address, None)

    def memory_bytes(self) -> int:
        """Return about how much memory the names take."""
        return _NAME_BYTES * len(self._names)

    async def answer(self, chunks: AsyncIterator[bytes]) -> str:
        """
        Return a line for each known address of a list separated by `+`.

        The line has the address in hexadecimal and the function's name. The return
        address (one above the location's own) is known as well.
        """
        lines = ["num_symbols: 1\n"]  # any number above 0 says that there are symbols
        rest, total, slices = b"", 0, Slices(_SLICE_S)
        async for chunk in chunks:
            total += len(chunk)
            *items, rest = (rest + chunk).split(b"+")
            for item in (*items, rest):
                if slices.is_over():
                    await slices.yield_to_loop()
                if len(item) >= _BUFFER:
                    return "".join((*lines, "reading request: bufio: buffer full\n"))
                if item is not rest:
                    lines.append(self._line(item))
            if total > _MAX_BODY:
                return "".join((*lines, "reading request: http: request body too large\n"))
        return "".join((*lines, self._line(rest)))

    def _line(self, item: bytes) -> str:
        address = _parse(item.decode("latin-1"))
        name = self._names.get(address) or self._names.get(address - 1)
        return f"{address:#x} {name}\n" if name else ""


def _parse(text: str) -> int:
    """Return the value of a Go integer literal of at most 64 bits, 0 for any other text."""
    if not _GO_INTEGER.fullmatch(text):
        return 0
    digits = text.replace("_", "")
    octal = re.fullmatch(r"0[0-7]+", digits)
    number = int(digits, 8) if octal else int(digits, 0)
    return number if number <= _MAX_ADDRESS else 0
