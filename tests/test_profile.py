"""The model of a profile: scrapers can rely on addresses, and each profile keeps the rules."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest

from asgi_pprof.profile import Function, Location, Profile, Sample, ValueType, pseudo_location
from tests.valid import InvalidProfile, check_valid

pytestmark = pytest.mark.once

PLACES = [
    Location(Function(name, filename, 1), line)
    for name in ("", "<lambda>", "shop.Cart.total", "shop.Cart.total_é", "shop.\udcff")
    for filename in ("", "/srv/shop.py", "/srv/shop2.py", "/srv/\udcff.py")
    for line in (0, 1, 2, 300, 2**31)
]


def test_every_location_has_its_own_address():
    """The address depends on name, file and line."""
    assert len({place.address for place in PLACES}) == len(PLACES)


def test_fields_are_kept_apart():
    """A digit that moves from the line to the file or the name gives another address."""
    places = [
        Location(Function("f", "/srv/shop.py1", 1), 2),
        Location(Function("f", "/srv/shop.py", 1), 12),
        Location(Function("2f", "/srv/shop.py", 1), 1),
    ]
    assert len({place.address for place in places}) == 3


def test_addresses_are_positive_numbers_of_63_bits():
    """Readers take 0 for no address, and some keep addresses in signed numbers."""
    addresses = [place.address for place in PLACES]
    assert all(0 < address < 2**63 for address in addresses)
    assert max(addresses) > 2**61  # most of the bits are used


def test_another_process_gives_the_same_addresses():
    """All workers agree, also after a restart, and whatever their hash seed is."""
    place = Location(Function("shop.Cart.total", "/srv/shop.py", 7), 9)
    program = (
        "from asgi_pprof.profile import Function, Location;"
        f"import sys; sys.stdout.write(str({place!r}.address))"
    )
    for seed in ("1", "2"):
        other = subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        )
        assert int(other.stdout) == place.address


def test_the_name_of_the_main_module_makes_no_difference():
    """A file is `__main__` in one worker and `__mp_main__` in a spawned one."""
    addresses = {
        Location(Function(f"{module}serve", "/srv/main.py", 1), 3).address
        for module in ("__main__.", "__mp_main__.", "")
    }
    assert len(addresses) == 1


def test_the_start_line_makes_no_difference_to_the_address():
    """Heap and CPU profiles may know different start lines of a function."""
    first, second = (Location(Function("f", "/srv/shop.py", start), 5) for start in (0, 4))
    assert first.address == second.address


def test_a_location_that_is_no_code_is_in_angle_brackets():
    """A pseudo location has only a name, and still an address."""
    place = pseudo_location("unknown")
    assert place == Location(Function("<unknown>", "", 0), 0)
    assert place.address


STACK = (PLACES[-1], PLACES[7])
SAMPLE = Sample(STACK, (1, 10), (("bytes", 64), ("tenant", "acme")))
VALID = Profile(
    sample_types=(ValueType("samples", "count"), ValueType("cpu", "nanoseconds")),
    samples=(SAMPLE, Sample(STACK, (-2, 0))),
    period_type=ValueType("cpu", "nanoseconds"),
    period=10_000_000,
    time_ns=1,
)


def with_sample(**changes):
    """Return the valid profile with its first sample changed."""
    return {"samples": (replace(SAMPLE, **changes), *VALID.samples[1:])}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"samples": ()},
        {"default_sample_type": "cpu"},
        {"period": 0},
        {"duration_ns": 10**9},
        {"comments": ("dropped 3 samples",)},
        with_sample(labels=(("bytes", 0),)),
        {
            "sample_types": tuple(ValueType(str(number), "count") for number in range(4)),
            "samples": (Sample(STACK, (0, 0, 0, 0)),),
        },
    ],
)
def test_a_profile_within_the_rules_is_valid(changes):
    """Negative values, an empty list of samples and numeric labels are allowed."""
    check_valid(replace(VALID, **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sample_types": (), "samples": ()}, "0 sample types, need 1 to 4"),
        (
            {"sample_types": VALID.sample_types * 2 + VALID.sample_types[:1], "samples": ()},
            "5 sample types, need 1 to 4",
        ),
        (
            {"default_sample_type": "inuse_space"},
            "default sample type 'inuse_space' is none of the sample types",
        ),
        ({"time_ns": 0}, "time is not set"),
        ({"time_ns": -1}, "time is not set"),
        ({"duration_ns": -1}, "duration or period is negative"),
        ({"period": -1}, "duration or period is negative"),
        (with_sample(values=(1,)), "sample 0 has 1 values for 2 sample types"),
        (with_sample(values=(1, 2, 3)), "sample 0 has 3 values for 2 sample types"),
        (with_sample(stack=()), "sample 0 has an empty stack"),
        (
            with_sample(labels=(("tenant", "acme"), ("bytes", 64))),
            "sample 0 has labels out of order",
        ),
        (with_sample(labels=(("", "acme"),)), "sample 0 has an empty label"),
        (with_sample(labels=(("tenant", ""),)), "sample 0 has an empty label"),
        (with_sample(labels=()), "sample 1 repeats an earlier stack and labels"),
    ],
)
def test_a_broken_rule_is_named_with_the_sample_that_breaks_it(changes, message):
    """Each rule has its message, which names the sample."""
    with pytest.raises(InvalidProfile) as caught:
        check_valid(replace(VALID, **changes))
    assert str(caught.value) == message
