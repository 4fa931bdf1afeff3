"""
The writable memory of this process: what is mapped where, and how much of it is in RAM.

`/proc/self/maps` says what is mapped. What is in RAM is asked of mincore(2), which
looks at page tables only: /proc/self/smaps looks at every page, and other threads
cannot map memory meanwhile (for 50 to 500 ms with 2 GiB, measured).

Source: Linux, proc(5), mincore(2); fs/proc/task_mmu.c.
"""

from __future__ import annotations

import array
import mmap
import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from asgi_pprof.native.core import native
from asgi_pprof.offload import yield_gil
from asgi_pprof.runtime.libraries import ctypes

_MAPS = "/proc/self/maps"
_READ = 16_384  # bytes in one call, in which mappings cannot change
_LINE = re.compile(rb"([0-9a-f]+)-([0-9a-f]+) (\S+) \S+ \S+ (\d+) *(.*)")
_NAMES = ("[heap]", "[stack]")
_CALL = 64 << 20  # bytes in one call of mincore


class Range(NamedTuple):
    """Addresses from the start up to the end, multiples of the page size."""

    start: int
    end: int

    @property
    def size(self) -> int:
        """Return how many bytes it is."""
        return self.end - self.start


class Mapping(NamedTuple):
    """A mapping that can be written, and is no file's; the name is "[heap]", "[stack]" or ""."""

    range: Range
    name: str


def writable_mappings() -> list[Mapping]:
    """Return all of them in the order of their addresses; [] where there is no /proc."""
    found = []
    for line in _lines(_MAPS):
        yield_gil()
        match = _LINE.match(line)
        if match and match[3].startswith(b"rw") and match[4] == b"0":
            name = match[5].decode(errors="replace")
            mapped = Range(int(match[1], 16), int(match[2], 16))
            # A program may name its own: "[anon:...]".
            found.append(Mapping(mapped, name if name in _NAMES else ""))
    return found


def _lines(path: str) -> Iterator[bytes]:
    try:
        with open(path, "rb", buffering=0) as file:
            rest = b""
            while block := file.read(_READ):
                *lines, rest = (rest + block).split(b"\n")
                yield from lines
    except OSError:
        return


def _resident_bytes(ranges: bytes) -> bytes:
    """Return what the C core's function does, without it; 0 everywhere without mincore."""
    try:
        mincore = ctypes.CDLL(None).mincore
    except (AttributeError, OSError, TypeError):
        return bytes(len(ranges) // 2)
    mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p)
    pages = ctypes.create_string_buffer(_CALL // mmap.PAGESIZE)
    sizes = array.array("Q")
    bounds = array.array("Q", ranges)
    for start, end in zip(bounds[::2], bounds[1::2], strict=True):
        count = 0
        for at in range(start, end, _CALL):
            size = min(end - at, _CALL)
            if mincore(at, size, pages) == 0:
                count += pages.raw[: size // mmap.PAGESIZE].count(1)
        sizes.append(count * mmap.PAGESIZE)
    return sizes.tobytes()


_in_ram: Callable[[bytes], bytes] = native.resident_bytes if native else _resident_bytes


def resident_bytes(ranges: Sequence[Range]) -> list[int]:
    """
    Return how many bytes of each range are in RAM; 0 where that is not known.

    A range that is not mapped any more counts as 0. 1 GiB in RAM takes about 2 ms.
    """
    bounds = array.array("Q", (bound for each in ranges for bound in each))
    return list(array.array("Q", _in_ram(bounds.tobytes())))
