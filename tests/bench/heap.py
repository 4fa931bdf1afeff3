"""
Compares the heap profile with functions that know how much they hold.

Each holder returns its objects, which keeps them alive, and the number of bytes it
holds and has allocated. A profile is a sample, so its numbers are wrong by chance: for
blocks smaller than the rate by about sqrt(rate / bytes), which is 9 % for 64 MiB at
the default rate. The mean over several starts of the sampler is closer.
"""

from __future__ import annotations

import asyncio
import math
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import repeat

from asgi_pprof.collectors.heap.collector import HeapCollector
from asgi_pprof.collectors.heap.sampler import DEFAULT_RATE
from asgi_pprof.collectors.heap.sizes import scale_sampled
from asgi_pprof.collectors.heap.tracing import Peaks
from asgi_pprof.profile import Stack
from asgi_pprof.recorders import heap_sampler, heap_tracing

HELD = 64 << 20
CHURNED = 1 << 30


class Point:
    __slots__ = ("x", "y")


@dataclass(slots=True)
class Held:
    """The true live bytes, and the bytes ever allocated if that is known, else 0."""

    what: object
    live: int
    allocated: int


def bytes_blocks() -> Held:
    block = sys.getsizeof(bytes(4096))
    number = HELD // block
    blocks = [bytes(4096) for _ in range(number)]
    return Held(blocks, number * block, number * block)


def strings() -> Held:
    size = 200
    text = sys.getsizeof("x" * size)
    number = HELD // text
    texts = ["x" * size for _ in range(number)]
    return Held(texts, number * text + sys.getsizeof(texts), 0)


def small_objects() -> Held:
    point = sys.getsizeof(Point())
    number = HELD // (point + 8)
    points = [Point() for _ in range(number)]
    return Held(points, number * point + sys.getsizeof(points), 0)


def list_by_append() -> Held:
    numbers: list[None] = []
    for _ in repeat(None, HELD // 8):
        numbers.append(None)
    return Held(numbers, sys.getsizeof(numbers), _asked_by_append(HELD // 8))


@cache
def _asked_by_append(length: int) -> int:
    # Reading the sizes creates integers, so it must not happen in the measured function.
    numbers: list[None] = []
    empty = last = sys.getsizeof(numbers)
    asked = 0
    for _ in repeat(None, length):
        numbers.append(None)
        size = sys.getsizeof(numbers)
        if size != last:
            asked += size - empty  # a resized block counts as a new allocation
            last = size
    return asked


def dict_of_integers() -> Held:
    integer = 32  # sizeof(PyLongObject) is allocated, although getsizeof returns 28
    known = dict.fromkeys(range(1000, 1000 + HELD // 64))
    return Held(known, sys.getsizeof(known) + len(known) * integer, 0)


def bytearray_by_iadd() -> Held:
    piece, whole = bytes(40_000), bytearray()
    while len(whole) < HELD:
        whole += piece
    return Held(whole, sys.getsizeof(whole), 0)


def blocks_of_200_kb() -> Held:
    blocks = [bytes(200_000) for _ in range(HELD // 200_000)]
    size = sum(map(sys.getsizeof, blocks))
    return Held(blocks, size, size)


def churn() -> Held:
    number = CHURNED // sys.getsizeof(bytes(2000))
    for _ in range(number):
        bytes(2000)
    return Held(None, 0, CHURNED)


HOLDERS: tuple[Callable[[], Held], ...] = (
    bytes_blocks,
    blocks_of_200_kb,
    strings,
    small_objects,
    list_by_append,
    dict_of_integers,
    bytearray_by_iadd,
    churn,
)


@dataclass(frozen=True, slots=True)
class Seen:
    """The estimates of a holder's bytes in one snapshot, and the truth."""

    live: int
    allocated: int
    held: Held


def measure(holder: Callable[[], Held], rate: int = DEFAULT_RATE) -> Seen:
    """Start the sampler, run a holder, and return the profile's estimates for it."""
    heap_sampler.enable(rate)
    try:
        held = holder()
        profile = scale_sampled(asyncio.run(_snapshot()))
    finally:
        heap_sampler.disable()
    held.what = None
    live = allocated = 0
    for sample in profile.samples:
        if _function_here(sample.stack) == holder.__name__:
            allocated += sample.values[1]
            live += sample.values[3]
    return Seen(live, allocated, held)


def _function_here(stack: Stack) -> str:
    """Return the innermost function of this module; of a comprehension, the one around it."""
    names = [place.function.name for place in stack]
    ours = (name.removeprefix(__name__ + ".") for name in names if name.startswith(__name__ + "."))
    return next(ours, "").partition(".")[0]


async def _snapshot():
    return (await HeapCollector(heap_sampler, heap_tracing, Peaks()).snapshot())()


def mean_and_error(ratios: list[float]) -> tuple[float, float]:
    """Return the mean and its standard error, which is NaN for a single ratio."""
    error = statistics.stdev(ratios) / math.sqrt(len(ratios)) if len(ratios) > 1 else math.nan
    return statistics.fmean(ratios), error
