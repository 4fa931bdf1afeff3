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
    """Return one sample per stack and label set, values added up, in order of first appearance."""
    totals: dict[SampleKey, tuple[int, ...]] = {}
    for sample in samples:
        yield_gil()
        key = (sample.stack, sample.labels)
        known = totals.get(key)
        totals[key] = sample.values if known is None else _add(known, sample.values)
    return tuple(_sample(key, values) for key, values in totals.items())


def _sample(key: SampleKey, values: tuple[int, ...]) -> Sample:
    yield_gil()
    return Sample(key[0], values, key[1])


def subtract(after: Profile, before: Profile) -> Profile:
    """
    Return what happened between two snapshots of one profile.

    Samples pair up by stack and labels; values are element-wise differences
    in the units of `sample_types`, negative where a quantity shrank. Samples
    in which nothing changed are left out.

    Args:
        after: The later snapshot; its `time_ns`, comments and
            `default_sample_type` are kept (Go loses the last).
        before: The earlier one, with the same sample and period types.

    Returns:
        A new profile whose `duration_ns` spans the two.

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


def _add(left: tuple[int, ...], right: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(a + b for a, b in zip(left, right, strict=True))
