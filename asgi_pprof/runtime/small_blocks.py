"""
What pymalloc has: CPython's allocator of blocks of up to 512 bytes.

It gets arenas of 1 MiB from the system and divides them into pools of 16 KiB, each for
blocks of one size. An arena is given back when all its pools are empty.

With the C core on CPython 3.12 and later, 16 arenas are read at a time, and other
threads run in between. CPython 3.11 keeps its arenas private, and without the C core
nothing can be read but the text of `sys._debugmallocstats`: they are read at once, with
the GIL, in 5 ms a GiB (measured).

Source: Objects/obmalloc.c, _PyObject_DebugMallocStats.
"""

from __future__ import annotations

import array
import re
import sys
from collections import Counter
from dataclasses import dataclass
from typing import Any

from asgi_pprof.native.core import native
from asgi_pprof.offload import yield_gil
from asgi_pprof.runtime.libraries import ctypes

_ARENAS = 16  # in one call, which takes 0.1 ms, and 0.3 ms when the memory is cold
_AT_ONCE = 1 << 30  # bytes of arenas that may be read at once
_LARGEST = 512  # bytes of a small block
_IN_STEPS = sys.version_info >= (3, 12)
_INTERPRETERS = {"_interpreters", "_xxsubinterpreters"}  # modules that make sub-interpreters


@dataclass(frozen=True, slots=True)
class SmallBlocks:
    """
    The arenas and the blocks in them, in bytes.

    Args:
        system: What the arenas are.
        touched: What has ever been used of them.
        inuse: The pools with blocks in use.
        blocks: The number of blocks in use by size.
        larger: The number of blocks that are larger, and so malloc's.
    """

    system: int = 0
    touched: int = 0
    inuse: int = 0
    blocks: tuple[tuple[int, int], ...] = ()
    larger: int = 0

    @property
    def alloc(self) -> int:
        """Return the bytes in blocks in use."""
        return sum(size * count for size, count in self.blocks)

    @property
    def count(self) -> int:
        """Return the number of blocks in use."""
        return sum(count for _, count in self.blocks)


def read_small_blocks(at_most: int) -> SmallBlocks | str:
    """
    Return what pymalloc has, or why that is not known. On any thread.

    Args:
        at_most: A bound of the bytes in arenas, which says whether to read all at once.
    """
    if native and _IN_STEPS:
        return _in_steps()
    if _IN_STEPS and not _INTERPRETERS.isdisjoint(sys.modules):
        # CPython would read their arenas too, while those that have a GIL of their own free them.
        return "there may be sub-interpreters, whose arenas only the C core can leave alone"
    if at_most > _AT_ONCE:
        return (
            f"up to {at_most >> 20} MiB of them could only be read at once, which would"
            " stop all threads; CPython 3.12 and the C core can read them in steps"
        )
    text = native.small_blocks() if native else _debug_malloc_stats()
    if text:
        return _parsed(text)
    if sys.getallocatedblocks() == 0:
        return SmallBlocks()  # PYTHONMALLOC=malloc
    return "CPython does not say while another tool, such as tracemalloc, hooks its allocators"


_UNKNOWN = "the allocator is not pymalloc"


def _in_steps() -> SmallBlocks | str:
    sums: Counter[int] = Counter()
    first, larger, classes = 0, 0, 0
    while True:
        step = native.small_blocks(first, _ARENAS)
        if step is None:
            return _UNKNOWN
        first, larger, usage = step
        numbers = array.array("Q", usage)
        classes = len(numbers) - 3
        sums.update(dict(enumerate(numbers)))
        if first == 0:
            break
        yield_gil()
    sizes = range(_LARGEST // classes, _LARGEST + 1, _LARGEST // classes)
    blocks = tuple((size, sums[3 + index]) for index, size in enumerate(sizes))
    return SmallBlocks(sums[0], sums[1], sums[2], blocks, larger)


_ARENAS_LINE = re.compile(r"^(\d+) arenas \* (\d+) bytes/arena", re.MULTILINE)
_POOLS_LINE = re.compile(r"^\d+ unused pools \* (\d+) bytes", re.MULTILINE)
_CLASS_LINE = re.compile(r"^ *\d+ +(\d+) +(\d+) +(\d+) +\d+$", re.MULTILINE)


def _parsed(text: str) -> SmallBlocks | str:
    arenas, pools = _ARENAS_LINE.search(text), _POOLS_LINE.search(text)
    if not arenas or not pools:
        return _UNKNOWN
    system = int(arenas[1]) * int(arenas[2])
    classes = [tuple(map(int, numbers)) for numbers in _CLASS_LINE.findall(text)]
    inuse = sum(count for _, count, _ in classes) * int(pools[1])
    blocks = tuple((size, blocks) for size, _, blocks in classes)
    small = SmallBlocks(system, system, inuse, blocks)
    return SmallBlocks(
        system, system, inuse, blocks, max(0, sys.getallocatedblocks() - small.count)
    )


def _debug_malloc_stats() -> str:
    """Return the text of `sys._debugmallocstats`; "" if there is none."""
    try:
        libc: Any = ctypes.CDLL(None)
        open_memstream, fclose, free = libc.open_memstream, libc.fclose, libc.free
        write = ctypes.PyDLL(None)._PyObject_DebugMallocStats  # keeps the GIL
    except (AttributeError, OSError, TypeError):
        return ""
    open_memstream.restype = ctypes.c_void_p
    fclose.argtypes = write.argtypes = free.argtypes = (ctypes.c_void_p,)
    free.restype = None
    text, size = ctypes.c_void_p(), ctypes.c_size_t()
    file = open_memstream(ctypes.byref(text), ctypes.byref(size))
    if not file:
        return ""
    write(file)
    fclose(file)
    try:
        return ctypes.string_at(text.value, size.value).decode() if text.value else ""
    finally:
        free(text)
