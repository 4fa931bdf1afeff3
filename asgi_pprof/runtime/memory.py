"""
The memory of this process: the heap, and what its resident memory is for.

The heap is pymalloc's arenas and all that malloc has: Python's larger blocks and those
of C libraries. Its figures satisfy alloc <= inuse and inuse + idle = system, whatever
other threads do meanwhile, since they are sums of parts that do.

What it costs: some 3 ms of CPU for a small service; for a larger one 3 to 4 ms a GiB of
pymalloc's arenas, 2 ms a GiB of malloc's memory, 2 to 3 us for each piece that is free in
it, 20 to 40 us a thread. The event loop is not held up, except on CPython 3.11 and without
the C core (`small_blocks`).

Source: runtime/mstats.go; Linux, proc(5), /proc/pid/status.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from asgi_pprof.forks import Renewed
from asgi_pprof.native.core import native
from asgi_pprof.runtime.malloc import Malloc, first_heaps, read_malloc
from asgi_pprof.runtime.mappings import resident_bytes, writable_mappings
from asgi_pprof.runtime.proc import proc_status
from asgi_pprof.runtime.small_blocks import SmallBlocks, read_small_blocks
from asgi_pprof.runtime.thread_stacks import thread_stacks

PYTHON_HEAP, MALLOC, THREAD_STACKS = "python_heap", "malloc", "thread_stacks"
MAPPED_FILES, PROFILER, OTHER = "mapped_files", "profiler", "other"
RESIDENT_PARTS = (PYTHON_HEAP, MALLOC, THREAD_STACKS, MAPPED_FILES, PROFILER, OTHER)
"""What resident memory is for."""

_LONG_S = 0.1  # of CPU time
_SHARE = 0.01  # of a CPU


@dataclass(frozen=True, slots=True)
class Memory:
    """
    What the process has, in bytes; 0 is what is not known.

    Args:
        alloc: Blocks in use, small and large.
        inuse: Pools with blocks in use, and large blocks.
        idle: Empty pools, and what is free inside malloc.
        released: What of `idle` is not in RAM: never used yet, or given back.
        objects: The number of Python's blocks in use.
        by_size: The number of small ones, by size.
        stack_inuse: The stacks of all threads, what is in RAM of them.
        stack_system: The stacks of all threads.
        tables: The tables of the C core, what is in RAM of them.
        mapped: All private memory that can be written.
        resident: What is in RAM.
        parts: `resident`, divided by what it is for.
        unknown: What `alloc`, `inuse` and `idle` leave out, and why.
    """

    alloc: int
    inuse: int
    idle: int
    released: int
    objects: int
    by_size: tuple[tuple[int, int], ...]
    stack_inuse: int
    stack_system: int
    tables: int
    mapped: int
    resident: int
    parts: dict[str, int]
    unknown: tuple[str, ...]

    @property
    def system(self) -> int:
        """Return what the heap has got from the system."""
        return self.inuse + self.idle


def read_memory() -> Memory:
    """Return what the process has now. On any thread."""
    mappings = writable_mappings()
    malloc = read_malloc(mappings)
    heaps = malloc.heaps if isinstance(malloc, Malloc) else first_heaps(mappings)
    stacks = thread_stacks(mappings)
    in_ram = resident_bytes([*heaps, *stacks])
    heaps_in_ram, stacks_in_ram = sum(in_ram[: len(heaps)]), sum(in_ram[len(heaps) :])
    status = proc_status()
    resident = status.get("VmRSS", 0)
    anonymous = status.get("RssAnon", resident)
    tables = native.memory() if native else 0
    elsewhere = malloc.elsewhere if isinstance(malloc, Malloc) else 0
    small = read_small_blocks(at_most=anonymous - heaps_in_ram - elsewhere)
    unknown = []
    if isinstance(small, str):
        unknown.append(f"small blocks are not known: {small}")
        small = SmallBlocks()
    if isinstance(malloc, str):
        unknown.append(f"malloc's blocks are not known: {malloc}")
        malloc = Malloc()
    elif not malloc.all_counted:
        unknown.append("more is free in malloc than is counted: it is in too many pieces")
    absent = min(malloc.free, sum(heap.size for heap in heaps) - heaps_in_ram)
    absent += small.system - small.touched
    idle = small.system - small.inuse + malloc.free
    return Memory(
        alloc=small.alloc + malloc.inuse,
        inuse=small.inuse + malloc.inuse,
        idle=idle,
        # Memory that has been swapped out is not in RAM either.
        released=min(idle, max(0, absent - status.get("VmSwap", 0))),
        objects=small.count + small.larger,
        by_size=small.blocks,
        stack_inuse=stacks_in_ram,
        stack_system=sum(stack.size for stack in stacks),
        tables=tables,
        mapped=status.get("VmData", 0) + status.get("VmStk", 0),
        resident=resident,
        parts=_parts(
            resident,
            anonymous,
            status.get("RssFile", 0) + status.get("RssShmem", 0),
            {
                PYTHON_HEAP: small.touched,
                THREAD_STACKS: stacks_in_ram,
                MALLOC: heaps_in_ram,
                PROFILER: tables,
            },
            elsewhere,
        ),
        unknown=tuple(unknown),
    )


def _parts(
    resident: int, anonymous: int, files: int, in_ram: dict[str, int], elsewhere: int
) -> dict[str, int]:
    """
    Return what resident memory is for.

    Args:
        resident: All of it.
        anonymous: What of it is no file's.
        files: What of it is a file's.
        in_ram: What is known of `anonymous`.
        elsewhere: What malloc has and may be in RAM or not.
    """
    parts, left = {}, anonymous
    for name, size in in_ram.items():
        # Some may be swapped out, and the figures are not of one moment.
        parts[name] = min(size, left)
        left -= parts[name]
    parts[MALLOC] += min(elsewhere, left)
    parts[MAPPED_FILES] = files
    parts[OTHER] = max(0, resident - sum(parts.values()))
    return {name: parts[name] for name in RESIDENT_PARTS}


class MemoryReader(Renewed):
    """Reads the memory for those who ask often."""

    def __init__(self) -> None:
        super().__init__()
        self._renew_after_fork()

    def _renew_after_fork(self) -> None:
        self._kept: tuple[Memory, float] | None = None  # and until when

    def read(self) -> Memory:
        """
        Return what the process has. On any thread.

        Where that takes more than 0.1 s of CPU time, the answer is kept for as long as
        makes it less than 1 % of a CPU.
        """
        kept = self._kept
        if kept is not None and time.monotonic() < kept[1]:
            return kept[0]
        start_s = time.thread_time()
        memory = read_memory()
        used_s = time.thread_time() - start_s
        kept_s = used_s / _SHARE if used_s > _LONG_S else 0
        self._kept = memory, time.monotonic() + kept_s
        return memory
