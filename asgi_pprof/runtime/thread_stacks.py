"""
The stacks of this process's threads, in the system's sense.

A thread's stack is the mapping that has some address known to be on it: that of the
thread's own data, which the C library keeps at the end of the stack and Python uses
as the thread's `ident`, or, of threads that Python does not know, the stack pointer
while the thread sleeps. No address is followed, only looked up in the list of mappings,
so a thread may end meanwhile.

Source: glibc, nptl/allocatestack.c; Linux, proc(5), /proc/pid/syscall.
"""

from __future__ import annotations

import mmap
import os
import threading
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from asgi_pprof.offload import yield_gil
from asgi_pprof.runtime.libraries import resource
from asgi_pprof.runtime.mappings import Mapping, Range
from asgi_pprof.runtime.proc import native_thread_ids

_USUAL_SIZE = 8 << 20  # where there is no limit
_BEYOND = 64 << 10  # what the C library may keep beyond the address


def thread_stacks(mappings: Sequence[Mapping]) -> list[Range]:
    """
    Return the memory of all stacks, in order; neighbours may be one range.

    The stacks of threads in C that are running now are missing.

    Args:
        mappings: All writable mappings, in order.
    """
    anonymous = [each.range for each in mappings if not each.name]
    starts = [each.start for each in anonymous]
    found = [each.range for each in mappings if each.name == "[stack]"]
    for address, size in _addresses():
        index = bisect_right(starts, address) - 1
        if index >= 0 and address < anonymous[index].end:
            stack = anonymous[index]
            if stack.size > size + _BEYOND:
                # No guard page divides the mappings, as with glibc 2.42 and later.
                stack = Range(
                    max(stack.start, (address - size) & -mmap.PAGESIZE),
                    min(stack.end, (address + _BEYOND) & -mmap.PAGESIZE),
                )
            found.append(stack)
    return list(_united(found))


def _united(ranges: Iterable[Range]) -> Iterator[Range]:
    last = Range(0, 0)
    for each in sorted(ranges):
        if each.start < last.end:
            last = Range(last.start, max(last.end, each.end))
        else:
            if last.size:
                yield last
            last = each
    if last.size:
        yield last


def _usual_size() -> int:
    """Return the size of a stack that nobody has set."""
    if resource is None:
        return _USUAL_SIZE
    size, _ = resource.getrlimit(resource.RLIMIT_STACK)
    return size if size != resource.RLIM_INFINITY else _USUAL_SIZE


def _addresses() -> Iterator[tuple[int, int]]:
    """Yield an address on the stack of each thread but the main one, and the stack's size."""
    usual = _usual_size()
    idents = {threading.get_native_id(): threading.get_ident()}
    for thread in threading.enumerate():
        # Not the attributes, which a class of the application's may have replaced.
        native_id = threading.Thread.native_id.fget(thread)  # type: ignore[attr-defined]
        idents[native_id] = threading.Thread.ident.fget(thread)  # type: ignore[attr-defined]
        yield_gil()
    for native_id in native_thread_ids():
        yield_gil()
        if native_id == os.getpid():
            continue
        if ident := idents.get(native_id):
            yield ident, threading.stack_size() or usual
        elif pointer := _stack_pointer(native_id):
            yield pointer, usual


def _stack_pointer(native_id: int) -> int | None:
    """Return a sleeping thread's stack pointer."""
    try:
        state = Path(f"/proc/self/task/{native_id}/syscall").read_text()
        return int(state.split()[-2], 16)
    except (OSError, IndexError, ValueError):
        return None  # it runs, has ended, or the system does not say
