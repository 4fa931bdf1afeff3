"""
What the C library's malloc has: all blocks that are not pymalloc's, Python's and others'.

Only glibc's is known. With the C core its lists of free blocks are followed without a
lock (malloc_arenas.h says why). Otherwise mallinfo2 says it, which holds the locks that
other threads need, for 1 us and more for each free block: so only while malloc has
little.

Source: asgi_pprof/_native/malloc_arenas.c; glibc, mallinfo(3), malloc/arena.c.
"""

from __future__ import annotations

import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from asgi_pprof.native.core import native
from asgi_pprof.runtime.libraries import ctypes
from asgi_pprof.runtime.mappings import Mapping, Range

_ALIGNMENT = 64 << 20  # of the heaps of all arenas but the first
_CHUNKS = 500_000  # free blocks counted at most, in 1 to 2.5 s of CPU
_SMALL = 64 << 20  # bytes for which mallinfo2 is quick enough


@dataclass(frozen=True, slots=True)
class Malloc:
    """
    What malloc has, in bytes.

    Args:
        heaps: The memory that it divides into blocks, as far as its place is known.
        system: How much that is in all.
        free: What of it is free, at least.
        mapped: Blocks so large that each is a mapping of its own.
        all_counted: Whether `free` is all.
    """

    heaps: tuple[Range, ...] = ()
    system: int = 0
    free: int = 0
    mapped: int = 0
    all_counted: bool = True

    @property
    def elsewhere(self) -> int:
        """Return the bytes whose place is not known."""
        return self.system - sum(heap.size for heap in self.heaps) + self.mapped

    @property
    def inuse(self) -> int:
        """Return the bytes in blocks in use, each with its head of 8 bytes."""
        return self.system - self.free + self.mapped


def read_malloc(mappings: Sequence[Mapping]) -> Malloc | str:
    """
    Return what malloc has, or why that is not known. On any thread.

    Args:
        mappings: All writable mappings.
    """
    first = first_heaps(mappings)
    if native and first:
        # Its other heaps begin at such addresses, maybe in the middle of a mapping.
        others = array.array(
            "Q",
            (
                address
                for each in mappings
                if not each.name
                for address in range(
                    -(-each.range.start // _ALIGNMENT) * _ALIGNMENT, each.range.end, _ALIGNMENT
                )
            ),
        )
        found = native.malloc_arenas(others.tobytes(), _CHUNKS)
        if found is not None:
            free, mapped, all_counted, heaps = found
            bounds = array.array("Q", heaps)
            more = zip(bounds[::2], bounds[1::2], strict=True)
            ranges = (*first, *(Range(start, start + size) for start, size in more))
            system = sum(heap.size for heap in ranges)
            return Malloc(ranges, system, min(free, system), mapped, all_counted)
    aligned = [
        each.range for each in mappings if not each.name and each.range.start % _ALIGNMENT == 0
    ]
    size = sum(heap.size for heap in (*first, *aligned))
    if size > _SMALL:
        return (
            f"mallinfo2 could hold up malloc for long, which may have {size >> 20} MiB;"
            " the C core can do without it"
        )
    info = _mallinfo2()
    if not info:
        return "the C library is not glibc, or its malloc is replaced"
    system = max(info["arena"], sum(heap.size for heap in first))
    return Malloc(first, system, info["fordblks"], info["hblkhd"])


def first_heaps(mappings: Sequence[Mapping]) -> tuple[Range, ...]:
    """Return the heap of malloc's first arena, in parts if its mapping is divided."""
    return tuple(each.range for each in mappings if each.name == "[heap]")


_MALLINFO2 = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()

if ctypes is not None:

    class _Mallinfo2(ctypes.Structure):
        _fields_ = [(name, ctypes.c_size_t) for name in _MALLINFO2]


_TEST_SIZE = 40 << 20  # malloc maps blocks above 32 MiB always


def _mallinfo2() -> dict[str, int]:
    """Return the fields of glibc's mallinfo2; {} unless malloc is glibc's."""
    try:
        libc: Any = ctypes.CDLL(None)
        mallinfo2, malloc, free = libc.mallinfo2, libc.malloc, libc.free
    except (AttributeError, OSError, TypeError):
        return {}
    mallinfo2.restype = _Mallinfo2
    malloc.restype, malloc.argtypes = ctypes.c_void_p, (ctypes.c_size_t,)
    free.restype, free.argtypes = None, (ctypes.c_void_p,)
    info = mallinfo2()
    block = malloc(_TEST_SIZE)
    is_glibcs = mallinfo2().hblkhd - info.hblkhd >= _TEST_SIZE
    free(block)
    return {name: getattr(info, name) for name in _MALLINFO2} if is_glibcs else {}
