"""
Captured stacks: how they are named and counted. Stacks are leaf first.

A captured stack has the code and the bytecode offset of each frame, never the frame
itself, which would keep its locals alive.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from types import CodeType
from typing import NamedTuple

from asgi_pprof.merge import sum_samples
from asgi_pprof.offload import yield_gil
from asgi_pprof.profile import Function, Label, Location, Sample, Stack, pseudo_location
from asgi_pprof.runtime.chains import Chain, wrappers
from asgi_pprof.runtime.frames import MAX_DEPTH as MAX_DEPTH
from asgi_pprof.runtime.frames import RawStack as RawStack
from asgi_pprof.runtime.frames import capture as capture
from asgi_pprof.runtime.frames import current_frames as current_frames
from asgi_pprof.runtime.modules import frozen_module, loaded_modules

TRUNCATED = pseudo_location("truncated: outer frames not recorded")
UNKNOWN = pseudo_location("unknown")

_STACK_BYTES = 2500  # of 30 frames
_KEY_BYTES = 450  # with three labels


class Symbols:
    """
    Functions and locations by code object, cached for one collection.

    The caches go by identity and keep the code alive: equal code objects of
    different files compare equal.
    """

    def __init__(self) -> None:
        self._modules: dict[str, str] = {}
        for filename, name, _ in loaded_modules():
            self._modules.setdefault(filename, name)
        self._functions: dict[int, tuple[CodeType, Function]] = {}
        self._lines: dict[int, tuple[array[int], array[int]]] = {}
        self._stacks: dict[tuple[int, ...], Stack] = {}

    def function(self, code: CodeType) -> Function:
        """Return the function of a code object."""
        known = self._functions.get(id(code))
        if known is None:
            name = self.qualify(code.co_filename, code.co_qualname)
            known = code, Function(name, code.co_filename, code.co_firstlineno)
            self._functions[id(code)] = known
        return known[1]

    def qualify(self, filename: str, qualname: str) -> str:
        """Return the name qualified by the module whose code has this file name, if any."""
        module = self._modules.get(filename) or frozen_module(filename)
        return f"{module}.{qualname}" if module else qualname

    def instruction(self, code: CodeType, lasti: int) -> Location:
        """Return the location of a bytecode offset, as `frame.f_lasti` gives it."""
        if id(code) not in self._lines:
            self.function(code)  # keeps the code alive, so that its id stays valid
            # Arrays, and not in one go: generated code may have a million lines.
            starts, lines = self._lines[id(code)] = array("l"), array("l")
            for start, _, line in code.co_lines():
                if line is not None:
                    starts.append(start)
                    lines.append(line)
                yield_gil()
        starts, lines = self._lines[id(code)]
        index = bisect_right(starts, lasti) - 1
        line = lines[index] if index >= 0 else code.co_firstlineno
        return Location(self.function(code), line)

    def stack(self, raw: RawStack) -> Stack:
        """Return the locations of a captured stack, with `TRUNCATED` at the end if it was cut."""
        stack = tuple(
            self.instruction(code, lasti)
            for code, lasti in raw[:MAX_DEPTH]
            if id(code) not in wrappers.by_id
        )
        return (*stack, TRUNCATED) if len(raw) > MAX_DEPTH else stack

    def key_stack(self, key: StackKey) -> Stack:
        """Return the locations of a captured stack; equal ones share one object."""
        known = self._stacks.get(key.places)
        if known is None:
            raw = tuple(zip(key.codes, key.places[1::2], strict=True))
            known = self._stacks[key.places] = self.stack(raw)
        return known


class StackKey(NamedTuple):
    """
    A captured stack in a form that can be a key.

    Args:
        places: For each frame the id of its code, then its bytecode offset. Ids,
            because equal code objects of different files compare equal.
        codes: The code of each frame, kept alive so that the ids stay valid.
    """

    places: tuple[int, ...] = ()
    codes: tuple[CodeType, ...] = ()


def stack_key(stack: RawStack) -> StackKey:
    """Return the key of a captured stack."""
    places = tuple(part for code, lasti in stack for part in (id(code), lasti))
    return StackKey(places, tuple(code for code, _ in stack))


class StackTotal(NamedTuple):
    """A stack, the location to put in front of its leaf if any, its labels and summed values."""

    stack: StackKey
    leaf: Location | None
    labels: tuple[Label, ...]
    values: tuple[int, ...]

    def sample(self, symbols: Symbols) -> Sample:
        """Return the total as a sample."""
        stack = symbols.key_stack(self.stack)
        if self.leaf is not None:
            stack = (self.leaf, *stack)
        stack = stack or (UNKNOWN,)
        return Sample(stack, self.values, self.labels)


class StackCounter:
    """
    Sums values by captured stack, labels and leaf.

    Memory is bounded: keys beyond `max_stacks` share one total. There is no lock: one
    thread may add at a time, and any thread may read.

    Args:
        overflow: The location of the shared total.
        max_stacks: The number of keys with a total of their own. A stack takes about
            2.5 KiB at 30 frames, and a key some 450 bytes.
    """

    def __init__(self, overflow: Location, max_stacks: float = 4096) -> None:
        self._overflow = overflow
        self._max_stacks = max_stacks
        self._totals: dict[_CounterKey, tuple[StackKey, list[float]]] = {}
        self._stacks: dict[tuple[int, ...], StackKey] = {}
        self._shared: list[float] = []
        self.overflowed = 0
        """The number of additions to the shared total."""

    def add(
        self,
        stack: StackKey,
        values: Sequence[float],
        labels: tuple[Label, ...] = (),
        leaf: Location | None = None,
    ) -> None:
        """Add values to the total of a key."""
        key = stack.places, labels, leaf
        known = self._totals.get(key)
        if known is not None:
            total = known[1]
        elif len(self._totals) < self._max_stacks:
            stack = self._stacks.setdefault(stack.places, stack)
            self._totals[stack.places, labels, leaf] = stack, list(values)
            return
        else:
            self.overflowed += 1
            total = self._shared = self._shared or [0] * len(values)
        for index, value in enumerate(values):
            total[index] += value

    def memory_bytes(self) -> int:
        """Return about how much memory the totals take."""
        return _STACK_BYTES * len(self._stacks) + _KEY_BYTES * len(self._totals)

    def __len__(self) -> int:
        return len(self._totals) + bool(self.overflowed)

    def totals(self) -> list[StackTotal]:
        """Return copies of all totals, quick enough for a loop; values are rounded down."""
        # A copy, which no other thread changes: creating the pairs may collect garbage (3.11).
        totals = [
            StackTotal(stack, leaf, labels, tuple(map(int, values)))
            for (_, labels, leaf), (stack, values) in self._totals.copy().items()
        ]
        if self.overflowed:
            shared = tuple(map(int, self._shared))
            totals.append(StackTotal(StackKey(), self._overflow, (), shared))
        return totals

    def count(self) -> int:
        """Return the sum of the first values."""
        shared = self._shared[:1]
        return int(sum([*shared, *(values[0] for _, values in self._totals.copy().values())]))


_CounterKey = tuple[tuple[int, ...], tuple[Label, ...], Location | None]


def name_totals(totals: Iterable[StackTotal]) -> tuple[Sample, ...]:
    """Return totals as samples with named stacks; slow, callable on any thread."""
    symbols = Symbols()
    return sum_samples(total.sample(symbols) for total in totals)


def chain_stack(chain: Chain, symbols: Symbols) -> Stack:
    """Return a chain as a stack, leaf first; beyond `MAX_DEPTH` locations it is truncated."""
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
