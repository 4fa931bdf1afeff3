"""
Decodes profile.proto by hand, to check the encoder with other code.

It was written from the specification, without `asgi_pprof/encoders`. The results are
plain dicts, tuples and strings.

Source: protobuf.dev/programming-guides/encoding; google/pprof, proto/profile.proto.
"""

import gzip

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def fields(message):
    """Return a message as a list of (field number, int or bytes), in wire order."""
    found, position = [], 0
    while position < len(message):
        tag, position = _read_varint(message, position)
        number, wire_type = divmod(tag, 8)
        if wire_type == _VARINT:
            value, position = _read_varint(message, position)
        elif wire_type == _BYTES:
            length, position = _read_varint(message, position)
            value, position = message[position : position + length], position + length
            if len(value) != length:
                raise ValueError(f"field {number} is cut off")
        elif wire_type in (_FIXED64, _FIXED32):
            length = 8 if wire_type == _FIXED64 else 4
            value = int.from_bytes(message[position : position + length], "little")
            position += length
        else:
            raise ValueError(f"wire type {wire_type} of field {number} is unknown")
        found.append((number, value))
    return found


def _read_varint(data, position):
    number, shift = 0, 0
    while True:
        byte = data[position]
        position += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, position
        shift += 7


def _signed(number):
    return number - 2**64 if number >= 2**63 else number


class _Message:
    """The fields of one message: a number is 0 and a list empty if the field is missing."""

    def __init__(self, data):
        self._fields = fields(data)

    def all(self, number):
        return [value for field, value in self._fields if field == number]

    def one(self, number):
        return _signed((self.all(number) or [0])[-1])

    def numbers(self, number):
        unpacked = []
        for value in self.all(number):
            if isinstance(value, int):
                unpacked.append(_signed(value))
            else:
                position = 0
                while position < len(value):
                    item, position = _read_varint(value, position)
                    unpacked.append(_signed(item))
        return tuple(unpacked)

    def messages(self, number):
        return [_Message(value) for value in self.all(number)]


def tables(body):
    """
    Return the message as it stands: ids, addresses, mappings and the string table.

    Args:
        body: The profile, gzipped or not.
    """
    profile = _Message(_bare(body))
    strings = [value.decode("utf-8", "strict") for value in profile.all(6)]
    return {
        "strings": strings,
        "mappings": [
            {
                "id": mapping.one(1),
                "start": mapping.one(2),
                "limit": mapping.one(3),
                "offset": mapping.one(4),
                "filename": strings[mapping.one(5)],
                "build_id": strings[mapping.one(6)],
                "flags": tuple(bool(mapping.one(number)) for number in (7, 8, 9, 10)),
            }
            for mapping in profile.messages(3)
        ],
        "locations": [
            {
                "id": location.one(1),
                "mapping_id": location.one(2),
                "address": location.one(3),
                "lines": [(line.one(1), line.one(2), line.one(3)) for line in location.messages(4)],
                "is_folded": bool(location.one(5)),
            }
            for location in profile.messages(4)
        ],
        "functions": [
            {
                "id": function.one(1),
                "name": strings[function.one(2)],
                "system_name": strings[function.one(3)],
                "filename": strings[function.one(4)],
                "start_line": function.one(5),
            }
            for function in profile.messages(5)
        ],
        "sample_location_ids": [sample.numbers(1) for sample in profile.messages(2)],
    }


def decode(body):
    """
    Return what a profile says, references followed.

    A stack is a tuple of (name, filename, start line, line), leaf first; a
    sample is (stack, values, labels); a label is (key, string or number).

    Args:
        body: The profile, gzipped or not.
    """
    profile, raw = _Message(_bare(body)), tables(body)
    strings = raw["strings"]
    functions = {
        function["id"]: (function["name"], function["filename"], function["start_line"])
        for function in raw["functions"]
    }
    places = {
        location["id"]: tuple(
            (*functions[function_id], line) for function_id, line, _ in location["lines"]
        )
        for location in raw["locations"]
    }

    def label(message):
        key, text, number = strings[message.one(1)], message.one(2), message.one(3)
        return key, strings[text] if text else number

    def value_type(message):
        return strings[message.one(1)], strings[message.one(2)]

    return {
        "sample_types": tuple(map(value_type, profile.messages(1))),
        "samples": tuple(
            (
                tuple(place for number in sample.numbers(1) for place in places[number]),
                sample.numbers(2),
                tuple(map(label, sample.messages(3))),
            )
            for sample in profile.messages(2)
        ),
        "period_type": value_type((profile.messages(11) or [_Message(b"")])[-1]),
        "period": profile.one(12),
        "time_nanos": profile.one(9),
        "duration_nanos": profile.one(10),
        "default_sample_type": strings[profile.one(14)],
        "comments": tuple(strings[number] for number in profile.numbers(13)),
    }


def _bare(body):
    return gzip.decompress(body) if body[:2] == b"\x1f\x8b" else body
