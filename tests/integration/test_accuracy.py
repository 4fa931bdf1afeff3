"""The CPU profile's shares are the truth, within what sampling allows."""

from __future__ import annotations

import pytest

from tests.bench.accuracy import measure

pytestmark = [pytest.mark.server, pytest.mark.slow]


def test_shares_on_the_loop_are_within_three_points():
    """
    3,000 samples of an async endpoint: loops, recursion, json, hashing, sorting.

    The truth is known in two ways, calls counted x calibrated cost and the
    thread's clock around each call, which differ by up to a point; their mean
    counts. A perfect sampler's standard error is 0.8 points for the largest
    share. A first failure is tried again with twice the samples.
    """
    for samples in (3000, 6000):
        found = measure("loop", samples)
        errors = {
            counted.name: (counted.error + clocked.error) / 2
            for counted, clocked in zip(found.counted, found.clocked, strict=True)
        }
        assert len(errors) >= 5
        assert all(share.truth > 0.02 for share in found.counted)
        if max(map(abs, errors.values())) < 0.03:
            return
    pytest.fail(f"shares are off by {errors}")
