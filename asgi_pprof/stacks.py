"""
Captured stacks: named, counted, and as stacks of locations, leaf first.

Nothing is kept of a frame but its code and where it was: a kept frame keeps its locals alive.
"""

from __future__ import annotations

import sys
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from types import CodeType, ModuleType
from typing import NamedTuple

from asgi_pprof.merge import sum_samples
from asgi_pprof.profile import Function, Label, Location, Sample, Stack, pseudo_location
from asgi_pprof.runtime.chains import Chain, wrappers
from asgi_pprof.runtime.frames import MAX_DEPTH as MAX_DEPTH
from asgi_pprof.runtime.frames import RawStack as RawStack
from asgi_pprof.runtime.frames import capture as capture
from asgi_pprof.runtime.frames import current_frames as current_frames

TRUNCATED = pseudo_location("truncated: outer frames not recorded")
UNKNOWN = pseudo_location("unknown")


class Symbols:
    """
    Names for code, remembered for the length of one collection.

    Codes are remembered by identity and kept alive meanwhile: equal code
    objects of different files compare equal.
    """

    def __init__(self) -> None:
        self._modules = _module_names()
        self._functions: dict[int, tuple[CodeType, Function]] = {}
        self._lines: dict[int, tuple[list[int], list[int]]] = {}

    def function(self, code: CodeType) -> Function:
        """Return a code's function, named after the module where that is loaded."""
        known = self._functions.get(id(code))
        if known is None:
            name = self.qualify(code.co_filename, code.co_qualname)
            known = code, Function(name, code.co_filename, code.co_firstlineno)
            self._functions[id(code)] = known
        return known[1]

    def qualify(self, filename: str, qualname: str) -> str:
        """Return the name with the module of the file in front, if one is loaded from it."""
        module = self._modules.get(filename)
        return f"{module}.{qualname}" if module else qualname

    def instruction(self, code: CodeType, lasti: int) -> Location:
        """Return the location of a bytecode offset, as `frame.f_lasti` gives it."""
        if id(code) not in self._lines:
            self.function(code)  # keeps the code alive, and with it the id
            ranges = [(start, line) for start, _, line in code.co_lines() if line is not None]
            self._lines[id(code)] = (
                [start for start, _ in ranges],
                [line for _, line in ranges],
            )
        starts, lines = self._lines[id(code)]
        index = bisect_right(starts, lasti) - 1
        line = lines[index] if index >= 0 else code.co_firstlineno
        return Location(self.function(code), line)

    def stack(self, raw: RawStack) -> Stack:
        """Return the locations of a captured stack, with the mark of truncation if it was cut."""
        stack = tuple(
            self.instruction(code, lasti)
            for code, lasti in raw[:MAX_DEPTH]
            if id(code) not in wrappers.by_id
        )
        return (*stack, TRUNCATED) if len(raw) > MAX_DEPTH else stack


def _module_names() -> dict[str, str]:
    names: dict[str, str] = {}
    # A copy, which nobody else changes: making pairs of the items may collect garbage (3.11).
    for name, module in sys.modules.copy().items():
        # Asking the object itself could load a lazy module, or a proxy of one.
        if issubclass(type(module), ModuleType):
            filename = object.__getattribute__(module, "__dict__").get("__file__")
            if isinstance(filename, str):
                names.setdefault(filename, name)
    return names


class StackKey(NamedTuple):
    """
    A captured stack in the form that can be looked up.

    Args:
        places: The id of the code and the bytecode offset of each frame in turn, leaf
            first. Code goes by identity: equal code objects of different files compare equal.
        codes: The code of each frame, to keep it alive, and with it the ids.
    """

    places: tuple[int, ...] = ()
    codes: tuple[CodeType, ...] = ()


def stack_key(stack: RawStack) -> StackKey:
    """Return the key of a captured stack."""
    places = tuple(part for code, lasti in stack for part in (id(code), lasti))
    return StackKey(places, tuple(code for code, _ in stack))


class StackTotal(NamedTuple):
    """The summed values of one stack, its labels, and the location in front of its leaf, if any."""

    stack: RawStack
    leaf: Location | None
    labels: tuple[Label, ...]
    values: tuple[int, ...]

    def sample(self, symbols: Symbols) -> Sample:
        """Return it as a sample."""
        leaf = () if self.leaf is None else (self.leaf,)
        stack = (*leaf, *symbols.stack(self.stack)) or (UNKNOWN,)
        return Sample(stack, self.values, self.labels)


class StackCounter:
    """
    Adds up values by captured stack, labels and leaf; stacks are named when the totals are read.

    Memory is bounded: what comes after `max_stacks` different keys is added up
    under one location. There is no lock: one thread may add at a time, and any
    thread may read.

    Args:
        overflow: The location of all that has no total of its own.
        max_stacks: How many keys have totals of their own; about 3 KiB each at 30 frames.
    """

    def __init__(self, overflow: Location, max_stacks: float = 4096) -> None:
        self._overflow = overflow
        self._max_stacks = max_stacks
        self._totals: dict[_CounterKey, tuple[StackKey, list[float]]] = {}
        self._further: list[float] = []
        self.overflowed = 0
        """How many times something was added that has no total of its own."""

    def add(
        self,
        stack: StackKey,
        values: Sequence[float],
        labels: tuple[Label, ...] = (),
        leaf: Location | None = None,
    ) -> None:
        """Add values to the total of this stack, these labels and this leaf."""
        key = stack.places, labels, leaf
        known = self._totals.get(key)
        if known is not None:
            total = known[1]
        elif len(self._totals) < self._max_stacks:
            self._totals[key] = stack, list(values)
            return
        else:
            self.overflowed += 1
            total = self._further = self._further or [0] * len(values)
        for index, value in enumerate(values):
            total[index] += value

    def __len__(self) -> int:
        return len(self._totals) + bool(self.overflowed)

    def totals(self) -> list[StackTotal]:
        """Return all totals as they are now, nothing named; values are rounded down."""
        totals = [
            StackTotal(_raw(stack), leaf, labels, tuple(map(int, values)))
            for (_, labels, leaf), (stack, values) in list(self._totals.items())
        ]
        if self.overflowed:
            totals.append(StackTotal((), self._overflow, (), tuple(map(int, self._further))))
        return totals


_CounterKey = tuple[tuple[int, ...], tuple[Label, ...], Location | None]


def _raw(stack: StackKey) -> RawStack:
    return tuple(zip(stack.codes, stack.places[1::2], strict=True))


def name_totals(totals: Iterable[StackTotal]) -> tuple[Sample, ...]:
    """Return totals as samples with named stacks; slow, for any thread."""
    symbols = Symbols()
    return sum_samples(total.sample(symbols) for total in totals)


def chain_stack(chain: Chain, symbols: Symbols) -> Stack:
    """Return where the awaitables of a chain wait, leaf first, at most `MAX_DEPTH` locations."""
    stack = [
        _frameless(each.awaitable)
        if each.code is None
        else symbols.instruction(each.code, each.lasti)
        for each in reversed(chain)
    ]
    if len(stack) > MAX_DEPTH:
        stack[MAX_DEPTH] = TRUNCATED
    return tuple(stack)


def _frameless(awaitable: object) -> Location:
    """Return a place for an awaitable without frames: an iterator that is no generator."""
    kind = type(awaitable)
    return pseudo_location(f"{kind.__module__}.{kind.__qualname__}")
