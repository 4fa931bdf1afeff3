"""The rules that all readers of profiles have, which every profile in the tests must keep."""

from __future__ import annotations

from collections.abc import Iterator

from asgi_pprof.profile import Profile

_MAX_VALUES = 4  # Alloy keeps values in fixed arrays of four


class InvalidProfile(Exception):
    """A profile that breaks the rules."""


def check_valid(profile: Profile) -> None:
    """
    Raise unless a profile keeps the rules of all readers.

    Raises:
        InvalidProfile: The message names the rule and the sample.

    Source: google/pprof, CheckValid; the stricter rules of Alloy and Parca (at most
    four values, non-empty labels).
    """
    for fault in _faults(profile):
        raise InvalidProfile(fault)


def _faults(profile: Profile) -> Iterator[str]:
    types = profile.sample_types
    if not 1 <= len(types) <= _MAX_VALUES:
        yield f"{len(types)} sample types, need 1 to {_MAX_VALUES}"
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
