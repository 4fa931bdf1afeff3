"""Shares in the CPU profile are right, within what sampling allows."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from asgi_pprof.collectors.cpu import native_engine as cpu_native
from tests.bench.accuracy import Share, measure

pytestmark = [pytest.mark.server, pytest.mark.timing, pytest.mark.oldest_and_newest]

# Its period is the kernel's tick: at a higher rate samples would not be independent.
HZ = 250

needs_native = pytest.mark.skipif(cpu_native.why_not() != "", reason=cpu_native.why_not())


@needs_native
@pytest.mark.parametrize("endpoint", ["loop", "thread"])
def test_shares_are_within_two_points(endpoint):
    """
    Every named function's share is right in 3,000 samples of an `async` or a `def` endpoint.

    The truth is the thread's clock, since no calibration knows what threads that contend
    for the GIL cost each other. A perfect sampler's standard error is 0.7 points for the
    largest share. After a first failure the test is tried again with twice the samples.

    In threads, hashing releases the GIL and waits for it again. It runs for so short a
    time before and after that the kernel's tick does not come. This was measured as 2.7
    points of 15, so the limit for hashing is 4 there, and the other functions' shares are
    those of the time in which none of them was hashing.
    """
    for samples in (3000, 6000):
        found = measure(endpoint, samples, hz=HZ).clocked
        assert all(share.truth > 0.02 for share in found)
        errors = _errors(_without("hashing", found) if endpoint == "thread" else found)
        hashing = _errors(found)["hashing"]
        if all(abs(error) < 2.0 for error in errors.values()) and abs(hashing) < 4.0:
            return
    pytest.fail(f"shares are off by {errors} points, and hashing by {hashing}")


def _errors(shares: Sequence[Share]) -> dict[str, float]:
    return {share.name: round(100 * share.error, 1) for share in shares}


def _without(name: str, shares: Sequence[Share]) -> list[Share]:
    """Return the others' shares of the time that is not this function's."""
    (left_out,) = (share for share in shares if share.name == name)
    return [
        Share(each.name, each.truth / (1 - left_out.truth), each.estimate / (1 - left_out.estimate))
        for each in shares
        if each is not left_out
    ]


@needs_native
def test_threads_are_charged_with_their_own_time():
    """A thread that burns CPU is charged with its own CPU time, and the loop with the rest."""
    found = measure("loop", 500, hz=HZ, burner=True)
    shares = {share.name: share for share in found.others}
    assert shares["the burner"].truth > 0.3
    for share in shares.values():
        assert abs(share.error) < 0.03, share


def test_shares_on_the_loop_are_within_three_points_without_the_c_core():
    """
    The signal engine takes 3,000 samples of an `async` endpoint.

    The truth is known in two ways, which differ by up to a point; their mean counts.
    After a first failure the test is tried again with twice the samples.
    """
    for samples in (3000, 6000):
        found = measure("loop", samples, hz=HZ, env={"ASGI_PPROF_NATIVE": "0"})
        errors = {
            clocked.name: round(50 * (clocked.error + counted.error), 1)
            for clocked, counted in zip(found.clocked, found.counted, strict=True)
        }
        assert len(errors) >= 5
        assert all(share.truth > 0.02 for share in found.clocked)
        if max(map(abs, errors.values())) < 3:
            return
    pytest.fail(f"shares are off by {errors} points")
