"""Size classes, and estimates from sampled allocations."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asgi_pprof.collectors.heap.sizes import scale_sampled, size_class
from asgi_pprof.native.core import native
from asgi_pprof.profile import Profile, Sample, ValueType, pseudo_location

STACK = (pseudo_location("somewhere"),)


def heap(*values, rate):
    kinds = ("alloc_objects", "alloc_space", "inuse_objects", "inuse_space")
    return Profile(
        sample_types=tuple(
            ValueType(kind, "count" if kind.endswith("objects") else "bytes") for kind in kinds
        ),
        samples=(Sample(STACK, values),),
        period_type=ValueType("space", "bytes"),
        period=rate,
        time_ns=1,
    )


@pytest.mark.parametrize(
    ("size", "served_by"),
    [
        *((0, 16), (1, 16), (16, 16), (17, 32), (512, 512)),
        *((513, 576), (576, 576), (577, 640), (1024, 1024), (1025, 1152), (2**20 + 1, 9 * 2**17)),
    ],
)
def test_size_classes(size, served_by):
    """Classes are pymalloc's steps of 16 up to 512, then eight to each doubling."""
    assert size_class(size) == served_by


@given(st.integers(0, 2**48))
def test_a_class_is_little_larger_than_its_sizes(size):
    """A class is at most an eighth larger than a large size, and is its own class."""
    served_by = size_class(size)
    assert served_by >= size
    assert served_by <= max(16, size + 15) or served_by <= size * 9 / 8 + 1
    assert size_class(served_by) == served_by


@pytest.mark.skipif(not native, reason="needs the C core")
@given(st.integers(0, 2**48))
def test_both_engines_have_the_same_classes(size):
    """C and Python agree on all sizes."""
    assert native.size_class(size) == size_class(size)


def test_small_blocks_count_for_the_rate():
    """Ten samples of 64 bytes at one in 512 KiB are 5 MiB in 82,000 blocks, as in Go."""
    rate = 512 * 1024
    values = scale_sampled(heap(10, 640, 5, 320, rate=rate)).samples[0].values
    factor = 1 / (1 - math.exp(-64 / rate))
    assert values == tuple(int(sampled * factor) for sampled in (10, 640, 5, 320))
    assert values[1] == pytest.approx(10 * rate, rel=1e-3)


def test_large_blocks_count_for_themselves():
    """All blocks of 100 times the rate are sampled."""
    size = 100 * 512 * 1024
    assert scale_sampled(heap(3, 3 * size, 1, size, rate=512 * 1024)).samples[0].values == (
        *(3, 3 * size),
        *(1, size),
    )


def test_rate_one_and_zeros_are_left_alone():
    """All blocks were sampled, or there are none: nothing is scaled."""
    assert scale_sampled(heap(3, 48, 0, 0, rate=1)).samples[0].values == (3, 48, 0, 0)
    assert scale_sampled(heap(0, 0, 0, 0, rate=1000)).samples[0].values == (0, 0, 0, 0)
