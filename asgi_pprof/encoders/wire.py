"""
The part of the protobuf wire format that profile.proto needs: no groups, no
fixed-width fields, no presence bits.

Source: protobuf.dev/programming-guides/encoding.
"""

from __future__ import annotations

from collections.abc import Iterable

_VARINT = 0
_LENGTH_DELIMITED = 2
_UINT64 = 2**64 - 1


def varint(number: int) -> bytes:
    """Return a number as a base-128 varint; negative numbers as 64-bit two's complement."""
    number &= _UINT64
    if number < 0x80:
        return _SMALL[number]
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


_SMALL = [bytes([number]) for number in range(0x80)]


def int_field(field: int, number: int) -> bytes:
    """Return a number field; b"" for 0, which is what readers assume."""
    return varint(field << 3 | _VARINT) + varint(number) if number else b""


def bytes_field(field: int, payload: bytes) -> bytes:
    """Return a string, bytes or message field; an empty payload is kept."""
    return varint(field << 3 | _LENGTH_DELIMITED) + varint(len(payload)) + payload


def packed_field(field: int, numbers: Iterable[int]) -> bytes:
    """Return a packed repeated number field; b"" without numbers. Zeros are kept."""
    payload = b"".join(map(varint, numbers))
    return bytes_field(field, payload) if payload else b""
