"""
The cost of the heap sampler for code that does nothing but allocate.

The sampler is switched on and off in one process, in turns of 10 ms of CPU time, in
the order off, on, on, off, so that a slower machine slows both.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import repeat

from asgi_pprof.collectors.heap.sampler import DEFAULT_RATE
from asgi_pprof.recorders import heap_sampler

TURN_S = 0.01


class Point:
    __slots__ = ("x", "y")

    def __init__(self, x: int, y: int) -> None:
        self.x = x
        self.y = y


def integers() -> object:
    last = 0
    for number in range(300, 10_000):  # created and freed by each iteration
        last = number
    return last


def lists_and_tuples() -> object:
    return [[number, (number, number)] for number in range(2000)]


def dicts() -> object:
    return [{"a": number, "b": number} for number in range(2000)]


def objects() -> object:
    return [Point(number, number) for number in range(2000)]


def bytes_of_1_kb() -> object:
    return [bytes(1000) for _ in range(1000)]


def strings_of_1_kb() -> object:
    size = 1000  # a literal would be multiplied by the compiler
    return ["x" * size for _ in range(1000)]


def blocks_of_100_kb() -> object:
    return [bytearray(100_000) for _ in range(20)]


def list_growth() -> object:
    numbers: list[object] = []
    for _ in repeat(None, 20_000):
        numbers.append(None)
    return numbers


def str_growth_to_10_kb() -> object:
    text = ""
    for _ in range(1000):
        text += "ten bytes "
    return text


def str_growth_to_1_mb() -> object:
    text = ""
    for _ in range(10_000):
        text += "one hundred bytes " * 6
    return text


KINDS: tuple[Callable[[], object], ...] = (
    integers,
    lists_and_tuples,
    dicts,
    objects,
    bytes_of_1_kb,
    strings_of_1_kb,
    blocks_of_100_kb,
    list_growth,
    str_growth_to_10_kb,
    str_growth_to_1_mb,
)


@dataclass(frozen=True, slots=True)
class Slowdown:
    """For one kind, microseconds per call without the sampler, and the ratios of the pairs."""

    kind: str
    off_us: float
    ratios: list[float]


def measure_slowdown(kind: Callable[[], object], rounds: int) -> Slowdown:
    """Return how the sampler slows a kind down, from two pairs of turns per round."""
    calls = _calls_in(kind, TURN_S)
    ratios, least = [], float("inf")
    gc.collect()
    gc.disable()  # collections would fall into some of the turns only
    try:
        for _ in range(rounds):
            first_off, first_on = _turn(kind, calls, False), _turn(kind, calls, True)
            second_on, second_off = _turn(kind, calls, True), _turn(kind, calls, False)
            ratios += [first_on / first_off, second_on / second_off]
            least = min(least, first_off, second_off)
    finally:
        gc.enable()
    return Slowdown(kind.__name__, least / calls * 1e6, ratios)


def _calls_in(kind: Callable[[], object], seconds: float) -> int:
    calls, start = 0, time.thread_time()
    while time.thread_time() - start < seconds:
        kind()
        calls += 1
    return calls


def _turn(kind: Callable[[], object], calls: int, sampled: bool) -> float:
    if sampled:
        heap_sampler.enable(DEFAULT_RATE)
    try:
        for _ in range(max(1, calls // 20)):  # the first samples of new stacks cost more
            kind()
        start = time.thread_time()
        for _ in range(calls):
            kind()
        return time.thread_time() - start
    finally:
        if sampled:
            heap_sampler.disable()
