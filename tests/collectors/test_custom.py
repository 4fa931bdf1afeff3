"""The application can keep profiles of its own, as with Go's NewProfile."""

from __future__ import annotations

import asyncio
import threading

import pytest

from asgi_pprof import Profile
from asgi_pprof.collectors.custom import custom_profiles
from tests.valid import check_valid


@pytest.fixture
def profile():
    profile = Profile("example.com/test")
    yield profile
    profile.close()


def open_connection(profile, value):
    profile.add(value)


def test_values_are_counted_by_the_stack_that_added_them(profile):
    """The leaf is the caller of add. Removed values no longer count."""
    for value in range(3):
        open_connection(profile, value)
    profile.remove(1)
    snapshot = asyncio.run(profile.snapshot())()
    check_valid(snapshot)
    (sample,) = snapshot.samples
    assert sample.values == (2,)
    assert sample.stack[0].function.name.endswith("open_connection")
    assert profile.count() == 2
    assert snapshot.sample_types[0].type == "example.com/test"


def test_skip_leaves_out_the_innermost_frames(profile):
    """skip=1 in a helper makes its caller the leaf."""

    def helper():
        profile.add("value", skip=1)

    helper()
    (sample,) = asyncio.run(profile.snapshot())().samples
    assert sample.stack[0].function.name.endswith("test_skip_leaves_out_the_innermost_frames")


def test_skipping_all_frames_leaves_a_location(profile):
    """A sample never has an empty stack."""
    profile.add("value", skip=10_000)
    check_valid(asyncio.run(profile.snapshot())())


def test_a_value_cannot_be_added_twice(profile):
    """Go panics. A removed value can be added again; removing it twice does nothing."""
    profile.add("value")
    with pytest.raises(ValueError, match="has this str already"):
        profile.add("value")
    profile.remove("value")
    profile.remove("value")
    profile.add("value")


@pytest.mark.parametrize(
    "name",
    ["", "a b", "a\nb", 'a"b', "/a", "a/", "a?b", "a#b", "a//b", "a/../b", ".", "\x7f", "\udcff"],
)
def test_invalid_names_are_refused(name):
    """Such a name would break the URL, the header or the text."""
    with pytest.raises(ValueError, match="cannot name a profile"):
        Profile(name)


@pytest.mark.parametrize("name", ["heap", "profile", "symbol", "trace", "example.com/test"])
def test_a_name_that_is_taken_is_refused(profile, name):
    """Built-in, reserved and registered names are taken."""
    with pytest.raises(ValueError, match="exists already"):
        Profile(name)


def test_close_frees_the_name():
    """close() also drops the values."""
    first = Profile("example.com/again")
    first.add("value")
    first.close()
    second = Profile("example.com/again")
    assert custom_profiles()["example.com/again"] is second
    first.close()
    assert custom_profiles()["example.com/again"] is second
    second.close()
    assert first.count() == 0


def test_many_threads_add_and_remove(profile):
    """Concurrent calls lose nothing."""

    def add_and_remove(start):
        for value in range(start, start + 200):
            profile.add(value)
        for value in range(start, start + 100):
            profile.remove(value)

    threads = [threading.Thread(target=add_and_remove, args=(n * 1000,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert profile.count() == 800
