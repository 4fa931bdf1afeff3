"""block and mutex while their rates are unset."""

from __future__ import annotations

import asyncio

from asgi_pprof.collectors.contention import ContentionCollector
from asgi_pprof.profile import check_valid


def test_valid_empty_and_says_so():
    """Go's sample types, no samples, and a comment and a note that it is off."""
    collector = ContentionCollector()
    profile = asyncio.run(collector.snapshot())()
    check_valid(profile)
    assert [tuple(kind) for kind in profile.sample_types] == [
        ("contentions", "count"),
        ("delay", "nanoseconds"),
    ]
    assert profile.samples == ()
    assert profile.comments[0].startswith("off: ")
    assert collector.note().startswith("off: ")
    assert collector.count() == 0
