"""Protobuf profiles are read back by the tests' own small decoder and by Google's runtime."""

import gzip
import os
import pickle
import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asgi_pprof.encoders.protobuf import encode, encode_uncompressed
from asgi_pprof.profile import Function, Location, Profile, Sample, ValueType
from tests import official
from tests.decode import decode, fields, tables
from tests.valid import check_valid

pytestmark = pytest.mark.once

INT64 = st.integers(-(2**63), 2**63 - 1)
POSITIVE = st.integers(1, 2**63 - 1)
NOT_NEGATIVE = st.integers(0, 2**63 - 1)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
SOME_TEXT = TEXT.filter(bool)

# There are few different functions and lines, so that samples share entries of the tables.
functions = st.builds(
    Function, st.sampled_from(["<module>", "build_cart", "é"]) | TEXT, TEXT, NOT_NEGATIVE
)
stacks = st.lists(
    st.builds(Location, functions, st.integers(0, 3) | NOT_NEGATIVE), min_size=1, max_size=5
).map(tuple)
label_sets = st.dictionaries(SOME_TEXT, SOME_TEXT | INT64, max_size=3).map(
    lambda pairs: tuple(sorted(pairs.items()))
)


@st.composite
def profiles(draw):
    """Draw a valid profile with one to four sample types."""
    types = draw(st.lists(st.builds(ValueType, SOME_TEXT, SOME_TEXT), min_size=1, max_size=4))
    sample = st.builds(Sample, stacks, st.tuples(*[INT64] * len(types)), label_sets)
    profile = Profile(
        sample_types=tuple(types),
        samples=tuple(
            draw(st.lists(sample, max_size=6, unique_by=lambda each: (each.stack, each.labels)))
        ),
        period_type=draw(st.builds(ValueType, TEXT, TEXT)),
        period=draw(NOT_NEGATIVE),
        time_ns=draw(POSITIVE),
        duration_ns=draw(NOT_NEGATIVE),
        default_sample_type=draw(st.sampled_from(["", *(kind.type for kind in types)])),
        comments=tuple(draw(st.lists(TEXT, max_size=3))),
    )
    check_valid(profile)
    return profile


def plain(profile):
    """Return a profile in the form of `tests.decode`: plain values only."""
    return {
        "sample_types": tuple(map(tuple, profile.sample_types)),
        "samples": tuple(
            (
                tuple((*place.function, place.line) for place in sample.stack),
                sample.values,
                sample.labels,
            )
            for sample in profile.samples
        ),
        "period_type": tuple(profile.period_type),
        "period": profile.period,
        "time_nanos": profile.time_ns,
        "duration_nanos": profile.duration_ns,
        "default_sample_type": profile.default_sample_type,
        "comments": profile.comments,
    }


def plain_of_official(message):
    """Return an official protobuf message in the same form."""
    strings = message.string_table
    functions = {
        each.id: (strings[each.name], strings[each.filename], each.start_line)
        for each in message.function
    }
    places = {
        each.id: tuple((*functions[line.function_id], line.line) for line in each.line)
        for each in message.location
    }

    def kind(value_type):
        return strings[value_type.type], strings[value_type.unit]

    def label(each):
        return strings[each.key], strings[each.str] if each.str else each.num

    return {
        "sample_types": tuple(map(kind, message.sample_type)),
        "samples": tuple(
            (
                tuple(place for number in each.location_id for place in places[number]),
                tuple(each.value),
                tuple(map(label, each.label)),
            )
            for each in message.sample
        ),
        "period_type": kind(message.period_type),
        "period": message.period,
        "time_nanos": message.time_nanos,
        "duration_nanos": message.duration_nanos,
        "default_sample_type": strings[message.default_sample_type],
        "comments": tuple(strings[number] for number in message.comment),
    }


CPU = ValueType("cpu", "nanoseconds")
SERVE = Location(Function("shop.serve", "/srv/shop.py", 3), 5)
MAIN = Location(Function("<module>", "/srv/shop.py", 1), 20)
PROFILE = Profile(
    sample_types=(ValueType("samples", "count"), CPU),
    samples=(
        Sample((SERVE, MAIN), (2, 20_000_000), (("route", "/cart"),)),
        Sample((MAIN,), (1, 10_000_000)),
        Sample((SERVE, SERVE, MAIN), (0, -1), (("bytes", 64),)),
    ),
    period_type=CPU,
    period=10_000_000,
    time_ns=1_700_000_000_000_000_000,
    duration_ns=30_000_000_000,
)


@given(profiles())
def test_a_profile_is_read_back_as_it_was(profile):
    """Decoding gives the same values in the same order."""
    assert decode(encode(profile)) == plain(profile)


@given(profiles())
def test_googles_runtime_reads_the_same_profile(profile):
    """Google's runtime gives the same values, and finds no unknown field."""
    message = official.parse(encode(profile))
    assert plain_of_official(message) == plain(profile)
    whole = message.SerializeToString()
    message.DiscardUnknownFields()
    assert message.SerializeToString() == whole


@given(profiles())
def test_equal_profiles_give_equal_bytes(profile):
    """A copy of a profile encodes to the same bytes."""
    copy = pickle.loads(pickle.dumps(profile))
    assert copy == profile
    assert encode(copy) == encode(profile)


def test_another_process_gives_equal_bytes():
    """Encoding does not depend on the hash seed."""
    program = (
        "import pickle, sys; from asgi_pprof.encoders.protobuf import encode;"
        "sys.stdout.buffer.write(encode(pickle.load(sys.stdin.buffer)))"
    )
    other = subprocess.run(
        [sys.executable, "-c", program],
        input=pickle.dumps(PROFILE),
        env={**os.environ, "PYTHONHASHSEED": "7"},
        capture_output=True,
        check=True,
    )
    assert other.stdout == encode(PROFILE)


def test_the_profile_is_gzip_without_a_time_or_a_name():
    """The gzip header is Go's: magic, deflate, no flags, time 0."""
    body = encode(PROFILE)
    assert body[:8] == bytes.fromhex("1f8b080000000000")
    assert gzip.decompress(body) == encode_uncompressed(PROFILE)


@given(profiles())
def test_ids_count_up_from_1_in_order_of_appearance(profile):
    """Locations appear in the order of samples, functions in that of locations."""
    raw = tables(encode(profile))
    location_ids = [location["id"] for location in raw["locations"]]
    function_ids = [function["id"] for function in raw["functions"]]
    assert location_ids == list(range(1, len(location_ids) + 1))
    assert function_ids == list(range(1, len(function_ids) + 1))
    first_seen = dict.fromkeys(number for ids in raw["sample_location_ids"] for number in ids)
    assert list(first_seen) == location_ids
    lines = [line for location in raw["locations"] for line in location["lines"]]
    assert list(dict.fromkeys(function_id for function_id, _, _ in lines)) == function_ids


@given(profiles())
def test_tables_hold_everything_once(profile):
    """Each location, function and string is there once; the first string is empty."""
    raw = tables(encode(profile))
    places = {place for sample in profile.samples for place in sample.stack}
    assert len(raw["locations"]) == len(places)
    assert len(raw["functions"]) == len({place.function for place in places})
    assert raw["strings"][0] == ""
    assert len(raw["strings"]) == len(set(raw["strings"]))


@given(profiles())
def test_every_location_is_one_line_in_the_one_mapping_at_its_address(profile):
    """Scrapers tell stacks apart by addresses."""
    raw = tables(encode(profile))
    addresses = {place.address for sample in profile.samples for place in sample.stack}
    assert {location["address"] for location in raw["locations"]} == addresses
    for location in raw["locations"]:
        assert (location["mapping_id"], location["is_folded"]) == (1, False)
        assert [column for _, _, column in location["lines"]] == [0]


@pytest.mark.parametrize("profile", [PROFILE, replace(PROFILE, samples=())])
def test_the_one_mapping_is_flagged_as_symbolised(profile):
    """Readers then look for no binary. A profile without samples has the mapping too."""
    assert tables(encode(profile))["mappings"] == [
        {
            "id": 1,
            "start": 0,
            "limit": 0,
            "offset": 0,
            "filename": sys.executable,
            "build_id": "",
            "flags": (True, True, True, True),
        }
    ]


def test_an_embedded_interpreter_has_a_mapping_too(monkeypatch):
    """`sys.executable` may be empty or None there, and a mapping needs a name."""
    for executable in ("", None):
        monkeypatch.setattr(sys, "executable", executable)
        (mapping,) = tables(encode(PROFILE))["mappings"]
        assert mapping["filename"] == "python"


def test_the_system_name_is_never_set():
    """pprof would demangle `<lambda>` and `<module>` to empty names."""
    names = {each["name"]: each["system_name"] for each in tables(encode(PROFILE))["functions"]}
    assert names == {"shop.serve": "", "<module>": ""}


def test_a_location_that_is_repeated_in_one_stack_is_kept():
    """A stack shows each level of a recursion."""
    assert tables(encode(PROFILE))["sample_location_ids"] == [(1, 2), (2,), (1, 1, 2)]


@pytest.mark.parametrize(
    ("duration_ns", "times"), [(0, {"time_nanos"}), (5, {"time_nanos", "duration_nanos"})]
)
def test_only_profiles_of_a_time_span_have_a_duration(duration_ns, times):
    """Readers recognise deltas and CPU profiles by their duration."""
    message = official.parse(encode(replace(PROFILE, duration_ns=duration_ns)))
    present = {field.name for field, _ in message.ListFields()}
    assert present & {"time_nanos", "duration_nanos"} == times
    assert message.time_nanos == PROFILE.time_ns


def test_the_time_is_written_once():
    """If it were written twice, pprof would report concatenated profiles."""
    numbers = [number for number, _ in fields(encode_uncompressed(PROFILE))]
    assert numbers.count(9) == 1


def test_fields_that_go_does_not_set_are_not_set():
    """These are drop_frames, keep_frames and doc_url, and comments if there are none."""
    present = {field.name for field, _ in official.parse(encode(PROFILE)).ListFields()}
    assert present == {
        "sample_type",
        "sample",
        "mapping",
        "location",
        "function",
        "string_table",
        "time_nanos",
        "duration_nanos",
        "period_type",
        "period",
    }


def test_an_empty_profile_has_types_a_mapping_and_a_string_table():
    """Readers need these three to show an empty profile."""
    message = official.parse(encode(replace(PROFILE, samples=(), duration_ns=0)))
    present = {field.name for field, _ in message.ListFields()}
    assert present == {
        "sample_type",
        "mapping",
        "string_table",
        "time_nanos",
        "period_type",
        "period",
    }


SURROGATES = "caf\udce9"  # os.fsdecode returns this for a file name that cannot be decoded


def test_lone_surrogates_are_escaped_everywhere():
    """Strict readers refuse a whole message with invalid UTF-8."""
    place = Location(Function(SURROGATES, f"/srv/{SURROGATES}.py", 1), 1)
    profile = replace(
        PROFILE,
        samples=(Sample((place,), (1, 1), ((SURROGATES, SURROGATES),)),),
        comments=(SURROGATES,),
    )
    escaped = r"caf\udce9"
    for told in (decode(encode(profile)), plain_of_official(official.parse(encode(profile)))):
        (sample,) = told["samples"]
        assert sample == (
            ((escaped, f"/srv/{escaped}.py", 1, 1),),
            (1, 1),
            ((escaped, escaped),),
        )
        assert told["comments"] == (escaped,)


def test_names_beyond_the_basic_plane_are_kept():
    """Characters outside the basic plane are not lone surrogates."""
    place = Location(Function("😀.日本", "/srv/é.py", 1), 1)
    profile = replace(PROFILE, samples=(Sample((place,), (1, 1)),))
    assert decode(encode(profile))["samples"][0][0] == (("😀.日本", "/srv/é.py", 1, 1),)


def test_encoding_does_not_change_the_profile():
    """A profile can be encoded more than once."""
    copy = pickle.loads(pickle.dumps(PROFILE))
    encode(PROFILE)
    assert copy == PROFILE
