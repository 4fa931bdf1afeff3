"""
The profile model: collectors make a `Profile`, encoders read it.

It is profile.proto without the bookkeeping: real strings and real references,
no ids and no string table. Everything here is immutable. Stacks are leaf first.

Functions, locations and value types are tuples rather than dataclasses because
every merge hashes them by the thousand: a 60-frame stack hashes in about 6 us
as tuples and in 40 us as frozen dataclasses (CPython 3.11).

Source: google/pprof, proto/profile.proto and profile/profile.go, CheckValid.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from asgi_pprof.errors import InvalidProfile

MAX_VALUES = 4  # Alloy keeps values in fixed arrays of four

Label = tuple[str, str | int]
"""A key with a string, or with a number in the unit its key names (`bytes`)."""


class ValueType(NamedTuple):
    """What a value counts, and its unit in full: ("cpu", "nanoseconds")."""

    type: str
    unit: str


class Function(NamedTuple):
    """A function: module-qualified name, file, and the line its code starts on (0 = unknown)."""

    name: str
    filename: str
    start_line: int


class Location(NamedTuple):
    """A line inside a function; 0 where the line is not known."""

    function: Function
    line: int

    @property
    def address(self) -> int:
        """
        A number that stands for this place: unique, non-zero, and the same in
        every worker and after a restart.

        Scrapers tell stacks apart by addresses alone, so the address is a
        63-bit hash of file, line and name (without the module, which is
        `__main__` in one worker and `__mp_main__` in another). The top bit
        stays clear: some readers keep addresses in signed numbers.
        """
        name, filename, _ = self.function
        return _address(name, filename, self.line)


@lru_cache(maxsize=65536)
def _address(name: str, filename: str, line: int) -> int:
    name = name.removeprefix("__main__.").removeprefix("__mp_main__.")
    text = f"{filename}\0{line}\0{name}".encode("utf-8", "surrogatepass")
    digest = hashlib.blake2b(text, digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1 or 1


Stack = tuple[Location, ...]


def pseudo_location(name: str) -> Location:
    """Return a place that is no code, such as `<unknown>`; the angle brackets set it apart."""
    return Location(Function(f"<{name}>", "", 0), 0)


@dataclass(frozen=True, slots=True)
class Sample:
    """
    One stack, leaf first, with a value for each of the profile's sample types.

    Labels are sorted by key, and neither keys nor values are empty.
    """

    stack: Stack
    values: tuple[int, ...]
    labels: tuple[Label, ...] = ()


@dataclass(frozen=True, slots=True)
class Profile:
    """
    A set of samples, what their values mean, and when they were taken.

    Args:
        sample_types: What each value counts, at most four.
        period_type: What is sampled; `period` is the events from one sample to the next.
        time_ns: UTC nanoseconds: the start of a CPU profile, the moment of a
            snapshot, the end of a delta.
        duration_ns: How long it covers; 0 for a snapshot (readers take any
            other number as the mark of a delta).
        default_sample_type: What a viewer shows first; "" leaves it to the viewer.
        comments: Lines for the reader: what was not seen, and what it cost.
    """

    sample_types: tuple[ValueType, ...]
    samples: tuple[Sample, ...]
    period_type: ValueType
    period: int
    time_ns: int
    duration_ns: int = 0
    default_sample_type: str = ""
    comments: tuple[str, ...] = ()

    def total(self, type_name: str) -> int:
        """Return the sum of the value of this type over all samples."""
        (index,) = (i for i, kind in enumerate(self.sample_types) if kind.type == type_name)
        return sum(sample.values[index] for sample in self.samples)


def count_profile(
    name: str, samples: Iterable[Sample], time_ns: int, comments: tuple[str, ...] = ()
) -> Profile:
    """Return a profile of NAME/count, the only value of each sample."""
    kind = ValueType(name, "count")
    return Profile((kind,), tuple(samples), kind, period=1, time_ns=time_ns, comments=comments)


@dataclass(frozen=True, slots=True)
class Goroutine:
    """
    One asyncio task as the debug=2 dump shows it.

    Args:
        id: A small number, the same for a task as long as it lives.
        state: What stands in the brackets: "running", "runnable" or what it waits for.
        stack: Its await chain, leaf first.
        labels: The labels of its context, and what else is to say of it.
        minutes: For how many whole minutes it is known to wait.
        leaked: Whether nothing can wake it any more.
        created_by: Where the call was that made it.
        creator: The number of the task that made it; 0 if none did.
    """

    id: int
    state: str
    stack: Stack
    labels: tuple[Label, ...] = ()
    minutes: int = 0
    leaked: bool = False
    created_by: Location | None = None
    creator: int = 0


def check_valid(profile: Profile) -> None:
    """
    Check a profile against the rules that every reader of ours shares.

    Raises:
        InvalidProfile: Saying what is wrong, and where.

    Source: google/pprof CheckValid; the stricter rules of Alloy and Parca
    (addresses, at most four values, non-empty labels).
    """
    for fault in _faults(profile):
        raise InvalidProfile(fault)


def _faults(profile: Profile) -> Iterator[str]:
    types = profile.sample_types
    if not 1 <= len(types) <= MAX_VALUES:
        yield f"{len(types)} sample types, need 1 to {MAX_VALUES}"
    if profile.default_sample_type not in {"", *(kind.type for kind in types)}:
        yield f"default sample type {profile.default_sample_type!r} is none of the sample types"
    if profile.time_ns <= 0:
        yield "time is not set"
    if profile.duration_ns < 0 or profile.period < 0:
        yield "duration or period is negative"
    seen = set()
    for number, sample in enumerate(profile.samples):
        if len(sample.values) != len(types):
            yield f"sample {number} has {len(sample.values)} values for {len(types)} sample types"
        if not sample.stack:
            yield f"sample {number} has an empty stack"
        if list(sample.labels) != sorted(sample.labels, key=lambda label: label[0]):
            yield f"sample {number} has labels out of order"
        if any(key == "" or value == "" for key, value in sample.labels):
            yield f"sample {number} has an empty label"
        if (key := (sample.stack, sample.labels)) in seen:
            yield f"sample {number} repeats an earlier stack and labels"
        seen.add(key)
