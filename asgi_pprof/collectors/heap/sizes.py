"""
Size classes, and Go's estimator for sampled allocations.

Source: runtime/sizeclasses.go for the idea; runtime/pprof/protomem.go,
scaleHeapSample; asgi_pprof/_native/heap_sampler.c, heap_size_class.
"""

from __future__ import annotations

import math
from dataclasses import replace

from asgi_pprof.profile import LazySamples, Profile, Sample

_SMALL = 512  # pymalloc serves up to here, in classes of 16 bytes


def size_class(size: int) -> int:
    """
    Return the size of the class of blocks that a size belongs to.

    The classes are those of pymalloc up to 512 bytes; beyond, each doubling has eight.
    As in Go, blocks whose sizes differ by a few bytes share a sample.
    """
    if size <= _SMALL:
        return max(16, -(-size // 16) * 16)
    step = 1 << (size - 1).bit_length() - 4
    return -(-size // step) * step


def scale_sampled(profile: Profile) -> Profile:
    """
    Return a heap profile with estimates in place of the sampled numbers.

    A block of s bytes is sampled with probability 1 - exp(-s / rate), where rate is
    the profile's period, so sampled numbers are multiplied by the inverse of that. All
    blocks of one sample have about the same size. At period 1 every block was
    sampled, and nothing changes.

    Source: runtime/pprof, scaleHeapSample.
    """
    if profile.period <= 1:
        return profile
    samples, rate = profile.samples, profile.period
    return replace(
        profile, samples=LazySamples(len(samples), lambda index: _scale(samples[index], rate))
    )


def _scale(sample: Sample, rate: int) -> Sample:
    alloc_objects, alloc_bytes, live_objects, live_bytes = sample.values
    values = (
        *_estimate(alloc_objects, alloc_bytes, rate),
        *_estimate(live_objects, live_bytes, rate),
    )
    return replace(sample, values=values)


def _estimate(objects: int, size_bytes: int, rate: int) -> tuple[int, int]:
    if objects <= 0 or size_bytes <= 0:
        return 0, 0
    factor = 1 / -math.expm1(-(size_bytes / objects) / rate)
    return int(objects * factor), int(size_bytes * factor)
