"""Query strings are parsed by Go's rules; the tables were checked against Go 1.27.3."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asgi_pprof.errors import BadParameter
from asgi_pprof.params import Params

pytestmark = pytest.mark.once

LONGEST = 9_223_372_036  # seconds whose nanoseconds fit into 63 bits
MANY_NINES = b"9" * 10_000
MANY_ZEROS = b"0" * 10_000


def named(cases):
    """Return cases with short ids; some of the numbers have 10,000 digits."""
    return [pytest.param(*case, id=f"{case[0][:40]!r}") for case in cases]


@pytest.mark.parametrize(
    ("query", "sign"),
    named(
        [
            (b"", 0),
            (b"debug", 0),
            (b"debug=", 0),
            (b"debug=0", 0),
            (b"debug=1", 1),
            (b"debug=2", 1),
            (b"debug=%31", 1),
            (b"deb%75g=1", 1),
            (b"debug=007", 1),
            (b"debug=%2B1", 1),
            (b"debug=-1", -1),
            (b"debug=-0", 0),
            # not a number: as if absent
            (b"debug=abc", 0),
            (b"debug=0x1", 0),
            (b"debug=1_0", 0),
            (b"debug=1.0", 0),
            (b"debug=1e1", 0),
            (b"debug=+1", 0),  # a plus is a space
            (b"debug=%201", 0),
            (b"debug=1%0A", 0),
            (b"debug=1%00", 0),
            (b"debug=--1", 0),
            (b"debug=%2B", 0),
            (b"debug=1=2", 0),
            (b"debug=true", 0),
            ("debug=１".encode(), 0),
            ("debug=٣".encode(), 0),
            ("debug=²".encode(), 0),
            # out of range: saturates
            (b"debug=99999999999999999999", 1),
            (b"debug=-99999999999999999999", -1),
            (b"debug=" + MANY_NINES, 1),
            (b"debug=-" + MANY_NINES, -1),
            (b"debug=" + MANY_ZEROS, 0),
            (b"debug=-" + MANY_ZEROS, 0),
            (b"debug=" + MANY_ZEROS + b"1", 1),
            # the first value wins
            (b"debug=1&debug=0", 1),
            (b"debug=0&debug=1", 0),
            (b"debug=&debug=1", 0),
            (b"debug&debug=1", 0),
            # pairs that Go's parser refuses are ignored
            (b"debug=1;gc=1", 0),
            (b"a;b=1&debug=1", 1),
            (b"debug=1;&debug=2", 1),
            (b"debug=%zz", 0),
            (b"debug=1%", 0),
            (b"debug=1%3", 0),
            (b"debug=%zz&debug=1", 1),
            (b"de%zzbug=1", 0),
            (b"%&debug=1", 1),
            # other parameters are ignored
            (b"&&debug=1&", 1),
            (b"=&=1&debug=1", 1),
            (b"labels=a&debug=1", 1),
            (b"DEBUG=1", 0),
            (b"\xff\xfe=\xff&debug=1", 1),
            (b"debug=\xff", 0),
            (b"debug=1\xff", 0),
            (b"debug=%ff", 0),
            (b"debug=%c0%b1", 0),
        ]
    ),
)
def test_debug_is_a_decimal_number_of_any_length(query, sign):
    """Only its sign matters here; a value that is not a number counts as 0."""
    debug = Params(query).debug
    assert (debug > 0) - (debug < 0) == sign


def test_small_values_of_debug_are_told_apart():
    """debug=2 and above requests the dump."""
    assert [Params(b"debug=%d" % number).debug for number in range(-1, 4)] == [-1, 0, 1, 2, 3]


@pytest.mark.parametrize(
    ("query", "wanted"),
    named(
        [
            (b"", False),
            (b"gc", False),
            (b"gc=0", False),
            (b"gc=1", True),
            (b"gc=7", True),
            (b"gc=-1", False),
            (b"gc=true", False),
            (b"gc=1.0", False),
            (b"gc=0&gc=1", False),
            (b"gc=1&gc=0", True),
            (b"debug=1;x&gc=1", True),
            (b"gc=99999999999999999999", True),
            (b"gc=-99999999999999999999", False),
            (b"gc=" + MANY_NINES, True),
            (b"gc=" + MANY_ZEROS, False),
        ]
    ),
)
def test_gc_asks_for_a_collection_when_it_is_above_0(query, wanted):
    """A value that is not a number counts as 0; a huge number is above 0."""
    assert Params(query).gc is wanted


@pytest.mark.parametrize(
    ("query", "seconds"),
    named(
        [
            (b"seconds=1", 1),
            (b"seconds=5", 5),
            (b"seconds=0005", 5),
            (b"seconds=%2B5", 5),
            (b"seconds=86400", 86_400),
            (b"seconds=1&seconds=2", 1),
            (b"seconds=9223372036", LONGEST),
            (b"seconds=9223372037", LONGEST),  # Go overflows and returns at once
            (b"seconds=9223372036854775807", LONGEST),
            (b"seconds=" + MANY_ZEROS + b"5", 5),
            # missing, not positive, not a 64-bit integer: 30
            (b"", 30),
            (b"seconds", 30),
            (b"seconds=", 30),
            (b"seconds=&seconds=5", 30),
            (b"seconds=0", 30),
            (b"seconds=-1", 30),
            (b"seconds=-9223372036854775808", 30),
            (b"seconds=abc", 30),
            (b"seconds=1.5", 30),
            (b"seconds=1e3", 30),
            (b"seconds=1s", 30),
            (b"seconds=0x10", 30),
            (b"seconds=1_000", 30),
            (b"seconds=+5", 30),
            (b"seconds=NaN", 30),
            (b"seconds=9223372036854775808", 30),
            (b"seconds=99999999999999999999", 30),
            (b"seconds=-99999999999999999999", 30),
            (b"seconds=" + MANY_NINES, 30),
            (b"seconds=-" + MANY_NINES, 30),
            (b"seconds=" + MANY_ZEROS, 30),
            (b"seconds=5;debug=1", 30),
            (b"seconds=5%", 30),
            (b"seconds=5\xff", 30),
            (b"seconds=5%C2%A0", 30),
            ("seconds=５".encode(), 30),
        ]
    ),
)
def test_a_cpu_profile_takes_30_seconds_unless_told_otherwise(query, seconds):
    """Values that Go does not accept mean 30 and are no error."""
    assert Params(query).cpu_seconds == seconds


@pytest.mark.parametrize(
    "query",
    [b"", b"seconds", b"seconds=", b"seconds=&seconds=5", b"seconds=5;x", b"seconds=%z", b"s=5"],
)
def test_seconds_that_are_absent_or_empty_ask_for_no_delta(query):
    """An empty value counts as absent."""
    assert Params(query).delta is False


@pytest.mark.parametrize(
    ("query", "seconds"),
    named(
        [
            (b"seconds=1", 1),
            (b"seconds=%2B1", 1),
            (b"seconds=2&seconds=", 2),
            (b"seconds=2&seconds=x", 2),
            (b"seconds=9223372036854775807", LONGEST),
            (b"seconds=" + MANY_ZEROS + b"2", 2),
        ]
    ),
)
def test_a_delta_takes_a_positive_number_of_seconds(query, seconds):
    """The maximum is the number of seconds whose nanoseconds fit into 64 bits."""
    params = Params(query)
    assert params.delta is True
    assert params.delta_seconds == seconds


@pytest.mark.parametrize(
    "query",
    [
        b"seconds=0",
        b"seconds=-1",
        b"seconds=+1",
        b"seconds=%20",
        b"seconds=abc",
        b"seconds=1.5",
        b"seconds=1s",
        b"seconds=0x1",
        b"seconds=1_0",
        b"seconds=x&seconds=5",
        b"seconds=9223372036854775808",
        b"seconds=" + MANY_NINES,
        b"seconds=" + MANY_ZEROS,
        b"seconds=\xff",
    ],
    ids=lambda query: repr(query)[:40],
)
def test_a_delta_refuses_seconds_that_are_no_positive_integer(query):
    """The error is Go's, word for word, with status 400."""
    params = Params(query)
    assert params.delta is True
    with pytest.raises(BadParameter) as caught:
        _ = params.delta_seconds
    assert str(caught.value) == 'invalid value for "seconds" - must be a positive integer'
    assert caught.value.status == 400


@given(
    st.binary(max_size=60) | st.text("debuggcsecons=&;%+-0123456789", max_size=60).map(str.encode)
)
def test_no_query_string_raises_anything_but_bad_parameter(query):
    """Every query string of a client gets an answer."""
    params = Params(query)
    assert isinstance(params.debug, int)
    assert isinstance(params.gc, bool)
    assert 0 < params.cpu_seconds <= LONGEST
    if params.delta:
        try:
            assert 0 < params.delta_seconds <= LONGEST
        except BadParameter:
            assert params.cpu_seconds == 30


@pytest.mark.parametrize(
    ("query", "hz"),
    named(
        [
            (b"", 100),
            (b"hz", 100),
            (b"hz=", 100),
            (b"hz=1", 1),
            (b"hz=100", 100),
            (b"hz=1000", 1000),
            (b"hz=0007", 7),
            (b"hz=%2B7", 7),
            (b"hz=7&hz=x", 7),
            (b"hz=x;y", 100),  # a pair that Go's parser refuses
            (b"HZ=7", 100),
            (b"hz=" + MANY_ZEROS + b"9", 9),
        ]
    ),
)
def test_a_cpu_profile_takes_100_samples_a_second_unless_told_otherwise(query, hz):
    """1 to 1000 are allowed."""
    assert Params(query).hz == hz


@pytest.mark.parametrize(
    "query",
    [
        b"hz=0",
        b"hz=-1",
        b"hz=1001",
        b"hz=1.5",
        b"hz=1e2",
        b"hz=0x10",
        b"hz=1_0",
        b"hz=+7",
        b"hz=%20",
        b"hz=abc",
        b"hz=x&hz=7",
        b"hz=9223372036854775808",
        b"hz=" + MANY_NINES,
        b"hz=\xff",
        "hz=５".encode(),
    ],
    ids=lambda query: repr(query)[:40],
)
def test_invalid_frequencies_are_refused(query):
    """Go has no such parameter; the error has the form of Go's errors."""
    with pytest.raises(BadParameter) as caught:
        _ = Params(query).hz
    assert str(caught.value) == 'invalid value for "hz" - must be an integer from 1 to 1000'
    assert caught.value.status == 400
