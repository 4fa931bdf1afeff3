"""The wire format agrees with the specification's examples and with the tests' decoder."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asgi_pprof.encoders.wire import bytes_field, int_field, packed_field, varint
from tests.decode import fields

pytestmark = pytest.mark.once

INT64 = st.integers(-(2**63), 2**63 - 1)
UINT64 = st.integers(0, 2**64 - 1)
FIELD = st.integers(1, 2**29 - 1)


@pytest.mark.parametrize(
    ("number", "encoded"),
    [
        (0, "00"),
        (1, "01"),
        (127, "7f"),
        (128, "8001"),
        (150, "9601"),
        (300, "ac02"),
        (16_383, "ff7f"),
        (16_384, "808001"),
        (2**32, "8080808010"),
        (2**63 - 1, "ffffffffffffffff7f"),
        (2**63, "80808080808080808001"),
        (2**64 - 1, "ffffffffffffffffff01"),
        (-1, "ffffffffffffffffff01"),
        (-2, "feffffffffffffffff01"),
        (-(2**63), "80808080808080808001"),
    ],
)
def test_varints_are_those_of_the_specification(number, encoded):
    """A byte has seven bits, the lowest first. Negative numbers take ten bytes."""
    assert varint(number).hex() == encoded


@pytest.mark.parametrize(
    ("encoded", "expected"),
    [
        (int_field(1, 150), "089601"),
        (int_field(1, -1), "08ffffffffffffffffff01"),
        (int_field(15, 1), "7801"),
        (int_field(16, 1), "800101"),
        (int_field(1, 0), ""),
        (bytes_field(2, b"testing"), "120774657374696e67"),
        (bytes_field(2, b""), "1200"),
        (bytes_field(3, bytes_field(1, b"\x01")), "1a030a0101"),
        (packed_field(6, [3, 270, 86_942]), "3206038e029ea705"),
        (packed_field(6, [0, 0]), "32020000"),
        (packed_field(6, iter([1])), "320101"),
        (packed_field(6, []), ""),
    ],
)
def test_fields_are_those_of_the_specification(encoded, expected):
    """A number field of 0 is left out. Empty strings and zeros in lists are kept."""
    assert encoded.hex() == expected


@given(FIELD, INT64.filter(bool))
def test_a_number_field_is_read_back(field, number):
    """Every field number and every 64-bit number can be encoded."""
    assert fields(int_field(field, number)) == [(field, number % 2**64)]


@given(FIELD, st.binary(max_size=300))
def test_a_bytes_field_is_read_back(field, payload):
    """The length may take more than one byte."""
    assert fields(bytes_field(field, payload)) == [(field, payload)]


@given(st.lists(INT64 | UINT64, min_size=1))
def test_packed_numbers_are_read_back(numbers):
    """Numbers keep their order, and zeros are kept."""
    ((field, payload),) = fields(packed_field(4, numbers))
    assert field == 4
    # A packed list is a sequence of varints. If each had a tag, it would be a list of fields.
    tagged, start = b"", 0
    for end, byte in enumerate(payload, 1):
        if byte < 0x80:
            tagged, start = tagged + b"\x08" + payload[start:end], end
    assert [value for _, value in fields(tagged)] == [number % 2**64 for number in numbers]
