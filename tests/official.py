"""
Builds profile.proto for Google's protobuf runtime, from field tables.

No generated code is needed.

Source: google/pprof, proto/profile.proto.
"""

import gzip

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

_PACKAGE = "perftools.profiles"

# name, number, type; a type with * is repeated, and one that is not a scalar is a message.
_MESSAGES = {
    "Profile": """
        sample_type 1 ValueType*
        sample 2 Sample*
        mapping 3 Mapping*
        location 4 Location*
        function 5 Function*
        string_table 6 string*
        drop_frames 7 int64
        keep_frames 8 int64
        time_nanos 9 int64
        duration_nanos 10 int64
        period_type 11 ValueType
        period 12 int64
        comment 13 int64*
        default_sample_type 14 int64
        doc_url 15 int64
    """,
    "ValueType": "type 1 int64 \n unit 2 int64",
    "Sample": "location_id 1 uint64* \n value 2 int64* \n label 3 Label*",
    "Label": "key 1 int64 \n str 2 int64 \n num 3 int64 \n num_unit 4 int64",
    "Mapping": """
        id 1 uint64
        memory_start 2 uint64
        memory_limit 3 uint64
        file_offset 4 uint64
        filename 5 int64
        build_id 6 int64
        has_functions 7 bool
        has_filenames 8 bool
        has_line_numbers 9 bool
        has_inline_frames 10 bool
    """,
    "Location": """
        id 1 uint64
        mapping_id 2 uint64
        address 3 uint64
        line 4 Line*
        is_folded 5 bool
    """,
    "Line": "function_id 1 uint64 \n line 2 int64 \n column 3 int64",
    "Function": """
        id 1 uint64
        name 2 int64
        system_name 3 int64
        filename 4 int64
        start_line 5 int64
    """,
}


def _profile_class():
    file = descriptor_pb2.FileDescriptorProto(
        name="profile.proto", package=_PACKAGE, syntax="proto3"
    )
    for message_name, table in _MESSAGES.items():
        message = file.message_type.add(name=message_name)
        for line in table.strip().splitlines():
            name, number, kind = line.split()
            field = message.field.add(name=name, number=int(number))
            field.label = field.LABEL_REPEATED if kind.endswith("*") else field.LABEL_OPTIONAL
            kind = kind.rstrip("*")
            if kind in _MESSAGES:
                field.type = field.TYPE_MESSAGE
                field.type_name = f".{_PACKAGE}.{kind}"
            else:
                field.type = getattr(field, f"TYPE_{kind.upper()}")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{_PACKAGE}.Profile"))


Profile = _profile_class()


def parse(body):
    """Return the official message of a gzipped profile; bad wire format or UTF-8 raises."""
    return Profile.FromString(gzip.decompress(body))
