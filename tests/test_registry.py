"""What is particular to a named profile: here, the text of a heap profile's delta."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from asgi_pprof.collectors.heap.sizes import scale_sampled
from asgi_pprof.merge import subtract
from asgi_pprof.profile import Function, Location, Profile, Sample, ValueType
from asgi_pprof.registry import Registry
from tests.gotool import go_pprof

pytestmark = pytest.mark.once

CART, PAGE, MAIN = (
    Location(Function(name, "/srv/shop.py", 1), 1) for name in ("shop.cart", "shop.page", "m")
)
KINDS = {
    "alloc_objects": "count",
    "alloc_space": "bytes",
    "inuse_objects": "count",
    "inuse_space": "bytes",
}
EMPTY = Profile(
    sample_types=tuple(ValueType(*kind) for kind in KINDS.items()),
    samples=(),
    period_type=ValueType("space", "bytes"),
    period=512 * 1024,
    time_ns=1,
)


def sampled(*samples):
    """Return a profile of (stack, size of each block, allocated, live, route)."""
    return replace(
        EMPTY,
        samples=tuple(
            Sample(
                stack,
                (allocated, size * allocated, live, size * live),
                (("bytes", size), ("route", route)),
            )
            for stack, size, allocated, live, route in samples
        ),
    )


BEFORE = sampled(
    ((CART, MAIN), 64, 3, 3, "/cart"), ((PAGE, MAIN), 1000, 9, 9, "/"), ((MAIN,), 99, 1, 1, "/")
)
GROWN = sampled(
    ((CART, MAIN), 64, 5, 5, "/cart"),
    ((CART, MAIN), 640, 4, 2, "/pay"),
    ((PAGE, MAIN), 1000, 12, 9, "/"),
    ((MAIN,), 99, 1, 1, "/"),
)
SHRUNK = sampled(
    ((CART, MAIN), 64, 3, 3, "/cart"), ((PAGE, MAIN), 1000, 9, 2, "/"), ((MAIN,), 99, 2, 2, "/")
)


def delta(after):
    difference = subtract(scale_sampled(after), scale_sampled(BEFORE))
    return replace(difference, duration_ns=5_000_000_000)


def text(profile):
    return "".join(Registry().lookup("heap").text("heap", profile))


def records(of_text):
    return re.findall(r"^(-?\d+: -?\d+ \[\d+: \d+\]) @ ", of_text, re.MULTILINE)


def test_a_delta_of_memory_has_estimates_by_stack():
    """Sizes and labels are added up; there are no MemStats, which are of a moment."""
    sample = delta(GROWN).samples
    cart = [a + b for a, b in zip(sample[0].values, sample[1].values, strict=True)]
    page = sample[2].values
    assert cart[3] > 4 * 512 * 1024
    assert page[2:] == (0, 0)
    found = text(delta(GROWN))
    total = [a + b for a, b in zip(cart, page, strict=True)]
    assert found.splitlines()[:2] == [
        f"heap profile: {total[2]}: {total[3]} [{total[0]}: {total[1]}] @ heap/2",
        "# difference of two snapshots, 5.000s apart",
    ]
    assert records(found) == [
        f"{cart[2]}: {cart[3]} [{cart[0]}: {cart[1]}]",
        f"0: 0 [{page[0]}: {page[1]}]",
    ]
    assert "MemStats" not in found
    assert "estimate" not in found


def test_what_shrank_comes_last():
    """The largest growth is first, and a decrease is a negative number."""
    grew, shrank = records(text(delta(SHRUNK)))
    assert re.fullmatch(r"\d+: \d{6} \[\d+: \d{6}\]", grew)
    assert re.fullmatch(r"-\d+: -\d{7} \[0: 0\]", shrank)


@pytest.mark.go
def test_go_reads_the_estimates_of_a_delta_as_they_are(tmp_path):
    """It must not scale them once more."""
    saved = tmp_path / "heap.txt"
    saved.write_text(text(delta(GROWN)))
    raw = go_pprof(tmp_path, "-raw", "-symbolize=none", saved).text
    assert "inuse_space/bytes" in raw
    rows = re.findall(r"^ +(\d+) +(\d+) +(\d+) +(\d+): ", raw, re.MULTILINE)
    totals = [sum(map(int, column)) for column in zip(*rows, strict=True)]
    assert totals == [delta(GROWN).total(kind) for kind in KINDS]


@pytest.mark.go
def test_go_refuses_a_delta_that_shrank(tmp_path):
    """Its format has no negative totals, and it says so; the protobuf has them."""
    saved = tmp_path / "heap.txt"
    saved.write_text(text(delta(SHRUNK)))
    report = go_pprof(tmp_path, "-raw", "-symbolize=none", saved, fails=True)
    assert "unrecognized profile format" in report.messages
