"""A short form of the growth test; `python -m tests.soak.growth` is the long one."""

from __future__ import annotations

import random

import pytest

from tests.soak.growth import PULLS, grow

_REQUESTS = 3000
_MOST_MIB = 16


@pytest.mark.slow
@pytest.mark.oldest_and_newest
@pytest.mark.timeout(300)
@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_random_traffic_and_pulls_leave_nothing_behind(loop):
    """Every pull is answered; no descriptor and no thread is left, and memory stays bounded."""
    random.seed(1)
    growth = grow("tests.soak.growing_app:app", loop, _REQUESTS, PULLS, lambda line: None)
    assert growth.errors == []
    assert growth.counts["pulls"] > 10
    before, after = growth.idle
    assert after.files <= before.files
    assert after.threads <= before.threads
    assert growth.fourths()[-1] < growth.fourths()[0] + _MOST_MIB
