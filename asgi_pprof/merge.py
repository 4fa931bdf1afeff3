"""
Sums and differences of profiles.

Source: google/pprof, profile/merge.go; net/http/pprof, delta handling.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from asgi_pprof.errors import IncompatibleProfiles
from asgi_pprof.offload import yield_gil
from asgi_pprof.profile import Label, Profile, Sample, Stack

SampleKey = tuple[Stack, tuple[Label, ...]]


def sum_samples(samples: Iterable[Sample]) -> tuple[Sample, ...]:
    """Return one sample per stack and labels with the summed values, in order of appearance."""
    totals: dict[SampleKey, Sample] = {}
    for sample in samples:
        yield_gil()
        key = (sample.stack, sample.labels)
        known = totals.get(key)
        if known is not None:
            values = tuple(a + b for a, b in zip(known.values, sample.values, strict=True))
            sample = Sample(known.stack, values, known.labels)
        totals[key] = sample
    return tuple(totals.values())


def subtract(after: Profile, before: Profile) -> Profile:
    """
    Return the difference of two snapshots of one profile.

    Values of samples with the same stack and labels are subtracted one by one, and
    are negative where a quantity shrank. Samples without a change are left out. The
    duration is the time between the snapshots; all else is the later one's (Go loses
    the default sample type).

    Raises:
        IncompatibleProfiles: The sample or period types differ.

    Source: net/http/pprof, delta handling; google/pprof, Merge and Scale.
    """
    kind = (after.sample_types, after.period_type)
    if kind != (before.sample_types, before.period_type):
        raise IncompatibleProfiles("failed to compute delta")
    negated = (
        replace(sample, values=tuple(-value for value in sample.values))
        for sample in before.samples
    )
    changes = sum_samples([*after.samples, *negated])
    return replace(
        after,
        samples=tuple(sample for sample in changes if any(sample.values)),
        duration_ns=max(after.time_ns - before.time_ns, 1),
    )
