"""
Encode a Profile as gzipped profile.proto, in the one form that go tool pprof,
Alloy, Pyroscope and Parca all accept.

- Ids count up from 1 in order of appearance; string 0 is empty.
- There is one mapping, flagged as symbolised, so that readers look for no binary.
- `system_name` stays unset: pprof would demangle `<lambda>` to an empty name.
- Equal profiles encode to equal bytes: the gzip header has no time.

Source: google/pprof, proto/profile.proto; runtime/pprof/proto.go; Parca's and
Alloy's validation.
"""

from __future__ import annotations

import sys
import zlib
from collections.abc import Iterator

from asgi_pprof.encoders.wire import bytes_field, int_field, packed_field
from asgi_pprof.offload import yield_gil
from asgi_pprof.profile import Function, Label, Location, Profile, Sample, ValueType

# message Profile
_SAMPLE_TYPE = 1  # repeated ValueType
_SAMPLE = 2  # repeated Sample
_MAPPING = 3  # repeated Mapping
_LOCATION = 4  # repeated Location
_FUNCTION = 5  # repeated Function
_STRING_TABLE = 6  # repeated string
_TIME_NANOS = 9  # int64
_DURATION_NANOS = 10  # int64
_PERIOD_TYPE = 11  # ValueType
_PERIOD = 12  # int64
_COMMENT = 13  # repeated int64, string index
_DEFAULT_SAMPLE_TYPE = 14  # int64, string index

# message ValueType
_TYPE = 1  # int64, string index
_UNIT = 2  # int64, string index

# message Sample
_LOCATION_ID = 1  # repeated uint64
_VALUE = 2  # repeated int64
_LABEL = 3  # repeated Label

# message Label
_KEY = 1  # int64, string index
_STR = 2  # int64, string index
_NUM = 3  # int64

# message Mapping, Location and Function
_ID = 1  # uint64
_FILENAME = 5  # Mapping: int64, string index
_HAS_FUNCTIONS = 7  # bool
_HAS_FILENAMES = 8  # bool
_HAS_LINE_NUMBERS = 9  # bool
_HAS_INLINE_FRAMES = 10  # bool
_MAPPING_ID = 2  # Location: uint64
_ADDRESS = 3  # Location: uint64
_LINE = 4  # Location: repeated Line
_FUNCTION_ID = 1  # Line: uint64
_LINE_NUMBER = 2  # Line: int64
_NAME = 2  # Function: int64, string index
_FUNCTION_FILENAME = 4  # Function: int64, string index
_START_LINE = 5  # Function: int64

_GZIP_LEVEL = 1  # as Go's runtime/pprof
_GZIP_WBITS = 31  # the largest window, with gzip's header, which has no time then
_PIECE = 65_536  # bytes that are compressed at a time


def encode(profile: Profile) -> bytes:
    """Return the profile as gzipped protobuf; equal profiles give equal bytes."""
    compressor = zlib.compressobj(_GZIP_LEVEL, wbits=_GZIP_WBITS)
    compressed, fields, size = [], [], 0
    for field in _Encoder().profile(profile):
        fields.append(field)
        size += len(field)
        if size >= _PIECE:
            compressed.append(compressor.compress(b"".join(fields)))
            fields, size = [], 0
    compressed.append(compressor.compress(b"".join(fields)))
    return b"".join((*compressed, compressor.flush()))


def encode_uncompressed(profile: Profile) -> bytes:
    """Return the protobuf message without gzip."""
    return b"".join(_Encoder().profile(profile))


class _Encoder:
    """
    Encodes one message, which has every string, function and location once.

    Functions and locations follow the first sample that has them.
    """

    def __init__(self) -> None:
        self._strings: dict[str, int] = {"": 0}
        self._functions: dict[Function, int] = {}
        self._locations: dict[Location, int] = {}
        self._tables: list[bytes] = []  # functions and locations that have not been yielded

    def profile(self, profile: Profile) -> Iterator[bytes]:
        """Yield the message field by field."""
        yield bytes_field(_PERIOD_TYPE, self._value_type(profile.period_type))
        yield int_field(_PERIOD, profile.period)
        for kind in profile.sample_types:
            yield bytes_field(_SAMPLE_TYPE, self._value_type(kind))
        yield int_field(_DEFAULT_SAMPLE_TYPE, self._string(profile.default_sample_type))
        for sample in profile.samples:
            yield bytes_field(_SAMPLE, self._sample(sample))
            yield from self._tables
            self._tables.clear()
        yield int_field(_TIME_NANOS, profile.time_ns)
        yield int_field(_DURATION_NANOS, profile.duration_ns)
        yield bytes_field(_MAPPING, self._mapping())
        yield packed_field(_COMMENT, map(self._string, profile.comments))
        for string in self._strings:
            yield bytes_field(_STRING_TABLE, _utf8(string))

    def _sample(self, sample: Sample) -> bytes:
        yield_gil()
        return b"".join(
            (
                packed_field(_LOCATION_ID, map(self._location, sample.stack)),
                packed_field(_VALUE, sample.values),
                *(bytes_field(_LABEL, self._label(label)) for label in sample.labels),
            )
        )

    def _label(self, label: Label) -> bytes:
        key, value = label
        if isinstance(value, str):
            return int_field(_KEY, self._string(key)) + int_field(_STR, self._string(value))
        return int_field(_KEY, self._string(key)) + int_field(_NUM, value)

    def _location(self, location: Location) -> int:
        known = self._locations.get(location)
        if known is not None:
            return known
        number = self._locations[location] = len(self._locations) + 1
        line = int_field(_FUNCTION_ID, self._function(location.function)) + int_field(
            _LINE_NUMBER, location.line
        )
        message = (
            int_field(_ID, number)
            + int_field(_MAPPING_ID, 1)
            + int_field(_ADDRESS, location.address)
            + bytes_field(_LINE, line)
        )
        self._tables.append(bytes_field(_LOCATION, message))
        return number

    def _function(self, function: Function) -> int:
        known = self._functions.get(function)
        if known is not None:
            return known
        number = self._functions[function] = len(self._functions) + 1
        message = (
            int_field(_ID, number)
            + int_field(_NAME, self._string(function.name))
            + int_field(_FUNCTION_FILENAME, self._string(function.filename))
            + int_field(_START_LINE, function.start_line)
        )
        self._tables.append(bytes_field(_FUNCTION, message))
        return number

    def _mapping(self) -> bytes:
        return (
            int_field(_ID, 1)
            + int_field(_FILENAME, self._string(sys.executable or "python"))
            + int_field(_HAS_FUNCTIONS, 1)
            + int_field(_HAS_FILENAMES, 1)
            + int_field(_HAS_LINE_NUMBERS, 1)
            + int_field(_HAS_INLINE_FRAMES, 1)
        )

    def _value_type(self, kind: ValueType) -> bytes:
        return int_field(_TYPE, self._string(kind.type)) + int_field(_UNIT, self._string(kind.unit))

    def _string(self, text: str) -> int:
        return self._strings.setdefault(text, len(self._strings))


def _utf8(text: str) -> bytes:
    # Names may contain lone surrogates (from file names that cannot be decoded). Strict
    # readers refuse a message with invalid UTF-8, so surrogates are written as \udcxx.
    return text.encode("utf-8", "backslashreplace")
