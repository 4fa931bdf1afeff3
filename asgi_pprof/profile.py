"""
The profile model: collectors make a `Profile`, encoders read it.

It is profile.proto without the bookkeeping: real strings and references in place of
ids and a string table. Everything here is immutable. Stacks are leaf first.

Functions, locations and value types are tuples, not dataclasses, because a merge
hashes thousands of them: a stack of 60 frames takes about 6 us as tuples and 40 us
as frozen dataclasses (CPython 3.11).

Source: google/pprof, proto/profile.proto and profile/profile.go, CheckValid.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, overload

Label = tuple[str, str | int]
"""A key, and a string or a number; the key names the number's unit (`bytes`)."""


class ValueType(NamedTuple):
    """The quantity a value counts, and its unit in full: ("cpu", "nanoseconds")."""

    type: str
    unit: str


class Function(NamedTuple):
    """A function: module-qualified name, file, and the line its code starts on (0 = unknown)."""

    name: str
    filename: str
    start_line: int


class Location(NamedTuple):
    """A line inside a function; 0 if the line is unknown."""

    function: Function
    line: int

    @property
    def address(self) -> int:
        """
        Return a unique number above 0, the same in every worker and after a restart.

        Scrapers compare stacks by addresses alone, so the address is a hash of file,
        line and name, without the names of the main module: it is `__main__` in one
        worker and `__mp_main__` in another. It has 63 bits, because some readers keep
        addresses in signed numbers.
        """
        name, filename, _ = self.function
        return _address(name, filename, self.line)


@lru_cache(maxsize=8192)  # some 3 MB
def _address(name: str, filename: str, line: int) -> int:
    name = name.removeprefix("__main__.").removeprefix("__mp_main__.")
    text = f"{filename}\0{line}\0{name}".encode("utf-8", "surrogatepass")
    digest = hashlib.blake2b(text, digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1 or 1


Stack = tuple[Location, ...]


@lru_cache(maxsize=1024)
def pseudo_location(name: str) -> Location:
    """Return a location that is not code, named in angle brackets, such as `<unknown>`."""
    return Location(Function(f"<{name}>", "", 0), 0)


@dataclass(frozen=True, slots=True)
class Sample:
    """
    A stack, and a value for each of the profile's sample types.

    Labels are sorted by key; neither keys nor values are empty.
    """

    stack: Stack
    values: tuple[int, ...]
    labels: tuple[Label, ...] = ()


class LazySamples(Sequence[Sample]):
    """
    Samples that are made each time they are read: thousands at once take 1 KB each.

    Args:
        count: Their number.
        make: Returns the sample at an index.
    """

    def __init__(self, count: int, make: Callable[[int], Sample]) -> None:
        self._indices = range(count)
        self._make = make

    def __len__(self) -> int:
        return len(self._indices)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> LazySamples: ...
    def __getitem__(self, index: int | slice) -> Sample | LazySamples:
        if isinstance(index, int):
            return self._make(self._indices[index])
        indices = self._indices[index]
        return LazySamples(len(indices), lambda at: self._make(indices[at]))


@dataclass(frozen=True, slots=True)
class Profile:
    """
    A set of samples, the meaning of their values, and the time they cover.

    Args:
        sample_types: The types of the values, one to four.
        samples: One for each stack and labels.
        period_type: The type of the sampled events, of which there is one sample
            for every `period`.
        time_ns: UTC nanoseconds: the start of a CPU profile, the moment of a
            snapshot, the end of a delta.
        duration_ns: The time covered; 0 for a snapshot, since readers take any
            other number as the mark of a delta.
        default_sample_type: The type a viewer shows first; "" leaves it to the viewer.
        comments: Remarks for the reader, such as what is missing and what it cost.
    """

    sample_types: tuple[ValueType, ...]
    samples: Sequence[Sample]
    period_type: ValueType
    period: int
    time_ns: int
    duration_ns: int = 0
    default_sample_type: str = ""
    comments: tuple[str, ...] = ()

    def total(self, type_name: str) -> int:
        """Return the sum over all samples of the values of this type."""
        (index,) = (i for i, kind in enumerate(self.sample_types) if kind.type == type_name)
        return sum(sample.values[index] for sample in self.samples)


def count_profile(
    name: str, samples: Iterable[Sample], time_ns: int, comments: tuple[str, ...] = ()
) -> Profile:
    """Return a profile whose samples have one value each, of type NAME/count."""
    kind = ValueType(name, "count")
    return Profile((kind,), tuple(samples), kind, period=1, time_ns=time_ns, comments=comments)


@dataclass(frozen=True, slots=True)
class Goroutine:
    """
    An asyncio task as the debug=2 dump shows it.

    Args:
        id: A small number that the task keeps as long as it lives.
        state: The text in brackets: "running", "runnable" or what the task waits for.
        stack: Its await chain, leaf first.
        labels: The labels of its context, and further properties.
        minutes: The whole minutes that it is known to have waited.
        leaked: Whether nothing can wake it any more.
        created_by: The location of the call that created it.
        creator: The id of the task that created it; 0 if none did.
    """

    id: int
    state: str
    stack: Stack
    labels: tuple[Label, ...] = ()
    minutes: int = 0
    leaked: bool = False
    created_by: Location | None = None
    creator: int = 0
