"""
Sums and differences of profiles.

Source: google/pprof, profile/merge.go; net/http/pprof, delta handling.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from asgi_pprof.errors import IncompatibleProfiles
from asgi_pprof.offload import yield_gil
from asgi_pprof.profile import Label, Profile, Sample, Stack

SampleKey = tuple[Stack, tuple[Label, ...]]


def sum_samples(samples: Iterable[Sample]) -> tuple[Sample, ...]:
    """Return one sample per stack and labels with the summed values, in order of appearance."""
    totals: dict[SampleKey, Sample] = {}
    for sample in _yielding(samples):
        key = (sample.stack, sample.labels)
        known = totals.get(key)
        if known is not None:
            values = tuple(a + b for a, b in zip(known.values, sample.values, strict=True))
            sample = Sample(known.stack, values, known.labels)
        totals[key] = sample
    return tuple(totals.values())


def by_stack(profile: Profile) -> Profile:
    """Return the profile without labels: one sample per stack, and none that is all zeros."""
    sums = sum_samples(replace(sample, labels=()) for sample in profile.samples)
    return replace(
        profile, samples=tuple(sample for sample in _yielding(sums) if any(sample.values))
    )


def subtract(after: Profile, before: Profile) -> Profile:
    """
    Return the difference of two snapshots of one profile.

    Neither snapshot has two samples with the same stack and labels. The values of
    samples that are in both are subtracted one by one, and are negative where a
    quantity shrank. Samples without a change are left out. The duration is the time
    between the snapshots; all else is the later one's (Go loses the default sample type).

    Raises:
        IncompatibleProfiles: The sample or period types differ.

    Source: net/http/pprof, delta handling; google/pprof, Merge and Scale.
    """
    kind = (after.sample_types, after.period_type)
    if kind != (before.sample_types, before.period_type):
        raise IncompatibleProfiles("failed to compute delta")
    return replace(
        after,
        samples=tuple(_changes(after.samples, before.samples)),
        duration_ns=max(after.time_ns - before.time_ns, 1),
    )


def _changes(after: Sequence[Sample], before: Sequence[Sample]) -> Iterator[Sample]:
    # Only the hashes are kept, since the samples of a heap profile are made as they are read.
    at = {hash((sample.stack, sample.labels)): i for i, sample in enumerate(_yielding(before))}
    is_left = bytearray(b"\1" * len(before))
    for sample in _yielding(after):
        index = at.get(hash((sample.stack, sample.labels)))
        values = sample.values
        if index is not None and is_left[index]:
            old = before[index]
            if (old.stack, old.labels) == (sample.stack, sample.labels):
                is_left[index] = 0
                values = tuple(a - b for a, b in zip(values, old.values, strict=True))
        if any(values):
            yield replace(sample, values=values)
    for sample in itertools.compress(_yielding(before), is_left):
        if any(sample.values):
            yield replace(sample, values=tuple(-value for value in sample.values))


def _yielding(samples: Iterable[Sample]) -> Iterator[Sample]:
    for sample in samples:
        yield_gil()
        yield sample
