"""Text profiles are compared with texts of a real Go server (tests/golden/README.md)."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asgi_pprof.collectors.heap.sizes import scale_sampled
from asgi_pprof.encoders import text as encoders
from asgi_pprof.encoders.text import align, goroutine_dump
from asgi_pprof.profile import Function, Goroutine, Location, Profile, Sample, ValueType
from tests.gotool import go_pprof

pytestmark = pytest.mark.once

GOLDEN = Path(__file__).parent.parent / "golden"
ALIGNED = sorted(path.name for path in GOLDEN.glob("*.body") if "debug2" not in path.name)
DUMPS = sorted(path.name for path in GOLDEN.glob("*debug2*.body"))


def read(name):
    return (GOLDEN / name).read_bytes().decode("utf-8")


def count_text(name, profile):
    return "".join(encoders.count_text(name, profile))


def heap_text(profile, trailer, estimates=None):
    return "".join(encoders.heap_text(profile, estimates or profile, trailer))


def contention_text(name, profile):
    return "".join(encoders.contention_text(name, profile))


# Columns


def unaligned(text):
    """Return the text as it was before alignment: with one tab between cells."""
    return "\n".join(re.sub(r"(?<=[^\t])\t+", "\t", line) for line in text.split("\n"))


def test_there_are_golden_texts():
    """Without golden files the tests below would not run."""
    assert len(ALIGNED) >= 11
    assert len(DUMPS) == 4


@pytest.mark.parametrize("name", [name for name in ALIGNED if "index" not in name])
def test_columns_line_up_as_in_gos_own_texts(name):
    """Aligning one tab between cells gives as many tabs as Go wrote, byte for byte."""
    go = read(name)
    assert "\n#\t0x" in go
    assert align(unaligned(go)) == go


@pytest.mark.parametrize(
    ("text", "aligned"),
    [
        ("", ""),
        ("no tabs\n", "no tabs\n"),
        ("a\tb\n", "a\tb\n"),
        ("1234567\tb\n", "1234567\tb\n"),
        ("12345678\tb\n", "12345678\tb\n"),
        # a cell is as wide as the longest one plus one, in whole tabs
        ("a\tb\n1234567\tb\n", "a\tb\n1234567\tb\n"),
        ("a\tb\n12345678\tb\n", "a\t\tb\n12345678\tb\n"),
        ("a\tb\n123456789012345\tb\n", "a\t\tb\n123456789012345\tb\n"),
        ("a\tb\n1234567890123456\tb\n", "a\t\t\tb\n1234567890123456\tb\n"),
        # the last cell of a line is not padded, and does not widen its column
        ("a\n12345678\tb\n", "a\n12345678\tb\n"),
        ("a\tb\n1234567890\nc\td\n", "a\tb\n1234567890\nc\td\n"),
        # a line without a column ends the column
        ("a\tb\n\n12345678\tb\n", "a\tb\n\n12345678\tb\n"),
        ("#\ta\tb\n#\t12345678\n#\t12345678\tb\n", "#\ta\tb\n#\t12345678\n#\t12345678\tb\n"),
        ("#\ta\tb\n#\t12345678\tb\n", "#\ta\t\tb\n#\t12345678\tb\n"),
        # an empty cell counts as a cell
        ("\ta\n12345678\tb\n", "\t\ta\n12345678\tb\n"),
        ("a\t\tb\nc\t12345678\td\n", "a\t\t\tb\nc\t12345678\td\n"),
        # widths are counted in characters, not bytes
        ("ééééééé\tb\n", "ééééééé\tb\n"),
        ("a\tb\néééééééé\tb\n", "a\t\tb\néééééééé\tb\n"),
        # a trailing tab ends a cell too
        ("a\t\n12345678\t\n", "a\t\t\n12345678\t\n"),
        ("a\tb", "a\tb"),
    ],
)
def test_a_column_is_a_run_of_lines_as_wide_as_its_longest_cell(text, aligned):
    """The rules are text/tabwriter's, with minwidth 1, tabwidth 8, padding 1."""
    assert align(text) == aligned


@given(st.text("ab12345678\t\n", max_size=80))
def test_aligning_adds_nothing_but_tabs(text):
    """Aligning removes no tab either."""
    aligned = align(text)
    assert aligned.replace("\t", "") == text.replace("\t", "")
    assert aligned.count("\t") >= text.count("\t")


# Profiles


def place(name, line, filename="/srv/shop.py", start=1):
    return Location(Function(name, filename, start), line)


CART, PAGE, MAIN = (
    place("shop.build_cart", 12, start=10),
    place("shop.build_page", 5),
    place("m", 1),
)
COUNT = ValueType("goroutine", "count")


def counts(*samples, **changes):
    return Profile((COUNT,), samples, COUNT, 1, 1, **changes)


def collapsed(text):
    """Return the lines, cells separated by one tab."""
    return re.sub(r"\t+", "\t", text).splitlines()


def record_addresses(stack):
    return " ".join(f"{each.address + 1:#x}" for each in stack)


def frame_line(each, function, where):
    return f"#\t{each.address:#x}\t{function}\t{where}"


def test_a_record_is_a_line_of_return_addresses_and_a_line_for_each_frame():
    """Frame lines show the location's address, which is one lower, as in Go."""
    lines = collapsed(count_text("goroutine", counts(Sample((CART, MAIN), (3,)))))
    assert lines == [
        "goroutine profile: total 3",
        f"3 @ {record_addresses((CART, MAIN))}",
        frame_line(CART, "shop.build_cart+0x2", "/srv/shop.py:12"),
        frame_line(MAIN, "m+0x0", "/srv/shop.py:1"),
        "",
    ]


def test_the_columns_of_a_stack_line_up():
    """Each stack is aligned by itself."""
    text = count_text("goroutine", counts(Sample((CART, MAIN), (3,)), Sample((PAGE,), (1,))))
    assert text == align(unaligned(text))
    head, cart, main = text.splitlines()[1:4]
    assert cart.expandtabs().index("/srv") == main.expandtabs().index("/srv")


def test_records_are_sorted_by_count_then_by_text():
    """The most frequent stack comes first, and equal profiles look equal."""
    stacks = [(CART,), (PAGE,), (MAIN,), (CART, MAIN), (CART, PAGE)]
    samples = [Sample(stack, (5 if stack == (MAIN,) else 1,)) for stack in stacks]
    text = count_text("goroutine", counts(*samples))
    records = [line for line in text.splitlines() if " @ " in line]
    assert records[0] == f"5 @ {record_addresses((MAIN,))}"
    assert records[1:] == sorted(records[1:])
    assert text == count_text("goroutine", counts(*reversed(samples)))
    assert text.startswith("goroutine profile: total 9\n")


def test_a_delta_of_counts_begins_with_the_largest_growth():
    """It says so below the head, where there are comments; fewer than before come last."""
    samples = (Sample((CART,), (-700,)), Sample((PAGE,), (2,)), Sample((MAIN,), (12,)))
    text = count_text("goroutine", counts(*samples, duration_ns=2_500_000_000))
    lines = text.splitlines()
    assert lines[:2] == [
        "goroutine profile: total -686",
        "# difference of two snapshots, 2.500s apart",
    ]
    assert [line.split()[0] for line in lines if " @ " in line] == ["12", "2", "-700"]


@pytest.mark.go
@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("goroutine", (12, 2), ""),
        ("goroutine", (12, -2), "malformed profile format"),
        ("goroutine", (2, -12), "unrecognized profile format"),
        ("block", (12, 2), ""),
        ("mutex", (12, 2), ""),
    ],
)
def test_go_reads_the_delta_or_refuses_it(tmp_path, name, values, message):
    """Parsers know no negative counts. They skip the line with the duration."""
    profile = counts(*(Sample((CART,), (value,)) for value in values), duration_ns=10**9)
    saved = tmp_path / "delta.txt"
    if name == "goroutine":
        saved.write_text(count_text(name, profile))
    else:
        samples = [Sample((CART,), (1, value)) for value in values]
        saved.write_text(contention_text(name, replace(BLOCK, samples=samples, duration_ns=1)))
    report = go_pprof(tmp_path, "-raw", "-symbolize=none", saved, fails=bool(message))
    assert message in report.messages
    if not message:
        assert re.findall(r"^ +(?:1 +)?(\d+): [\d ]+$", report.text, re.MULTILINE) == ["12", "2"]


@pytest.mark.parametrize("name", ["goroutine", "threadcreate", "example.com/conns"])
def test_the_header_is_what_the_parser_expects(name):
    """The header is `NAME profile: total N`, and an empty profile has one too."""
    assert count_text(name, counts()) == f"{name} profile: total 0\n"


def test_labels_stand_between_the_record_and_its_frames():
    """Labels look like JSON without the space after a colon, sorted by key."""
    sample = Sample((MAIN,), (1,), (("bytes", 64), ("tenant", "acme")))
    lines = collapsed(count_text("goroutine", counts(sample)))
    assert lines[2] == '# labels: {"bytes":"64", "tenant":"acme"}'
    assert lines[3] == frame_line(MAIN, "m+0x0", "/srv/shop.py:1")


def test_labels_have_the_form_of_gos_labels():
    """One pattern matches Go's label lines and these."""
    pattern = re.compile(r'# labels: \{"[^"]+":"[^"]+"(, "[^"]+":"[^"]+")*\}')
    go = [line for line in read("goroutine_debug1.body").splitlines() if "# labels" in line]
    sample = Sample((MAIN,), (1,), (("endpoint", "/x"), ("tenant", "acme")))
    ours = count_text("goroutine", counts(sample)).splitlines()[2]
    assert len(go) == 2
    assert all(pattern.fullmatch(line) for line in [*go, ours])


# Checked with fmt.Printf("%q") of Go 1.27.3.
@pytest.mark.parametrize(
    ("value", "quoted"),
    [
        ("a\tb", r'"a\tb"'),
        ("a\nb\r", r'"a\nb\r"'),
        ("\a\b\f\v", r'"\a\b\f\v"'),
        ("\x00\x1f\x1b", r'"\x00\x1f\x1b"'),
        ("\x7f", r'"\x7f"'),
        ('say "hi"', r'"say \"hi\""'),
        ("back\\slash", r'"back\\slash"'),
        ("it's {a: b}, ok", '"it\'s {a: b}, ok"'),
        ("é 日本 😀", '"é 日本 😀"'),
        ("\u0085", r'"\u0085"'),
        ("\u00a0", r'"\u00a0"'),
        ("\u00ad", r'"\u00ad"'),
        ("\u2028", r'"\u2028"'),
        ("\U000e0001", r'"\U000e0001"'),
        ("\udcff", r'"\udcff"'),
    ],
)
def test_labels_are_quoted_as_go_quotes_them(value, quoted):
    """As with %q, printable characters are kept, not only ASCII ones."""
    for sample in (Sample((MAIN,), (1,), (("k", value),)), Sample((MAIN,), (1,), ((value, "v"),))):
        line = count_text("goroutine", counts(sample)).split("\n")[2]
        assert line in (f'# labels: {{"k":{quoted}}}', f'# labels: {{{quoted}:"v"}}')


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\tb", r"a\tb"),
        ("a\nb", r"a\nb"),
        ("a\r\nb", r"a\r\nb"),
        ("a\x0bb\x0cc", r"a\x0bb\x0cc"),
        ("a\x85b", r"a\u0085b"),
        ("a\u2028b", r"a\u2028b"),
        ("caf\udce9", r"caf\udce9"),
        ("<locals>.<lambda>", "<locals>.<lambda>"),
        ("é.日本", "é.日本"),
        ("with space", "with space"),
    ],
)
def test_a_name_adds_no_cell_and_no_line(text, shown):
    """Tabs, line breaks of every kind and surrogates are escaped; other characters are kept."""
    odd = place(text, 3, filename=f"/srv/{text}.py")
    profile = counts(Sample((odd,), (1,)))
    frame = count_text("goroutine", profile).split("\n")[2]
    assert re.split("\t+", frame) == [
        "#",
        f"{odd.address:#x}",
        f"{shown}+0x2",
        f"/srv/{shown}.py:3",
    ]
    assert goroutine_dump([Goroutine(1, "running", (odd,))]) == (
        f"goroutine 1 [running]:\n{shown}(...)\n\t/srv/{shown}.py:3 +0x2\n"
    )
    frame.encode("utf-8")


def test_an_unknown_start_gives_no_negative_offset():
    """Offsets are hexadecimal and not negative."""
    later = place("f", 3, start=9)
    assert "f+0x0\t" in count_text("goroutine", counts(Sample((later,), (1,))))
    far = place("f", 300, start=1)
    assert "f+0x12b\t" in count_text("goroutine", counts(Sample((far,), (1,))))


@pytest.mark.parametrize("comment", ["lost 3 samples", "two\nlines", "a\tb"])
def test_comments_come_last_and_are_comments_to_parsers(comment):
    """Each comment is one line, whatever it contains. Go has no comments."""
    profile = counts(Sample((MAIN,), (1,)), comments=(comment,))
    heap = replace(HEAP, samples=(), comments=(comment,))
    for text in (
        count_text("goroutine", profile),
        heap_text(heap, "# trailer\n"),
        contention_text("block", replace(BLOCK, comments=(comment,))),
    ):
        without_comment, _, last = text[:-1].rpartition("\n")
        assert last.startswith("# ")
        assert last.replace("\\n", "\n").replace("\\t", "\t") == f"# {comment}"


HEAP = Profile(
    (
        ValueType("alloc_objects", "count"),
        ValueType("alloc_space", "bytes"),
        ValueType("inuse_objects", "count"),
        ValueType("inuse_space", "bytes"),
    ),
    (
        Sample((CART, MAIN), (10, 640, 2, 128), (("bytes", 64),)),
        Sample((PAGE,), (3, 48, 3, 48), (("bytes", 16),)),
        Sample((MAIN,), (7, 112, 0, 0), (("bytes", 16),)),
    ),
    ValueType("space", "bytes"),
    512 * 1024,
    1,
)


def test_heap_records_show_what_is_in_use_and_what_was_allocated():
    """The most bytes in use come first; there are no labels; two blank lines end the records."""
    lines = collapsed(heap_text(HEAP, "# runtime.MemStats\n# Alloc = 1\n"))
    assert lines == [
        "heap profile: 5: 176 [20: 800] @ heap/1048576",
        f"2: 128 [10: 640] @ {record_addresses((CART, MAIN))}",
        frame_line(CART, "shop.build_cart+0x2", "/srv/shop.py:12"),
        frame_line(MAIN, "m+0x0", "/srv/shop.py:1"),
        "",
        f"3: 48 [3: 48] @ {record_addresses((PAGE,))}",
        frame_line(PAGE, "shop.build_page+0x4", "/srv/shop.py:5"),
        "",
        f"0: 0 [7: 112] @ {record_addresses((MAIN,))}",
        frame_line(MAIN, "m+0x0", "/srv/shop.py:1"),
        "",
        "",
        "# runtime.MemStats",
        "# Alloc = 1",
    ]


def record_heads(text):
    return [line.partition(" @ ")[0] for line in text.splitlines()[1:] if " @ " in line]


def test_allocs_begin_with_the_most_bytes_allocated():
    """They are in the order of the type that viewers show first."""
    text = heap_text(replace(HEAP, default_sample_type="alloc_space"), "")
    assert record_heads(text) == ["2: 128 [10: 640]", "0: 0 [7: 112]", "3: 48 [3: 48]"]


def test_records_are_in_the_order_of_what_they_stand_for():
    """A sample of 16 bytes stands for more than one of 64; both are in the text."""
    estimates = scale_sampled(HEAP)
    lines = heap_text(HEAP, "", estimates).splitlines()
    assert [line for line in lines if line and not line.startswith("#\t")] == [
        "heap profile: 5: 176 [20: 800] @ heap/1048576",
        "# estimate: 114690: 2621528 [409609: 10486160]",
        f"3: 48 [3: 48] @ {record_addresses((PAGE,))}",
        "# estimate: 98305: 1572888 [98305: 1572888]",
        f"2: 128 [10: 640] @ {record_addresses((CART, MAIN))}",
        "# estimate: 16385: 1048640 [81925: 5243200]",
        f"0: 0 [7: 112] @ {record_addresses((MAIN,))}",
        "# estimate: 0: 0 [229379: 3670072]",
    ]
    assert estimates.samples[1].values == (98305, 1572888, 98305, 1572888)


@pytest.mark.parametrize(("period", "rate"), [(524_288, "heap/1048576"), (1, "heap/2")])
def test_the_rate_is_twice_the_period(period, rate):
    """The parser divides it by 2."""
    assert heap_text(replace(HEAP, period=period), "").splitlines()[0].endswith(f" @ {rate}")


@pytest.mark.parametrize(
    ("samples", "totals"),
    [
        ((Sample((MAIN,), (1, 64, 1, 64)),), "1: 64 [1: 65]"),
        ((Sample((MAIN,), (1, 65, 1, 64)),), "1: 64 [1: 65]"),
        ((), "0: 0 [0: 1]"),
        (
            (Sample((MAIN,), (1, 64, 1, 0)), Sample((PAGE,), (1, 0, 1, 64))),
            "2: 64 [2: 65]",
        ),
    ],
)
def test_the_totals_are_never_equal(samples, totals):
    """Two equal pairs would be the old format, without allocations. Records may be equal."""
    text = heap_text(replace(HEAP, samples=samples), "")
    assert text.startswith(f"heap profile: {totals} @ ")


def test_only_the_header_is_changed_if_totals_are_equal():
    """The record shows the true values."""
    text = heap_text(replace(HEAP, samples=(Sample((MAIN,), (1, 64, 1, 64)),)), "")
    assert text.splitlines()[1].startswith("1: 64 [1: 64] @ ")


@pytest.mark.parametrize("name", [name for name in ALIGNED if name.startswith(("heap", "allocs"))])
def test_heap_lines_have_the_form_of_gos_lines(name):
    """The same patterns match every line of Go's text and of this one."""
    header = re.compile(r"heap profile: \d+: \d+ \[\d+: \d+\] @ heap/\d+")
    record = re.compile(r"\d+: \d+ \[\d+: \d+\] @( 0x[0-9a-f]+)+")
    frame = re.compile(r"#\t0x[0-9a-f]+\t+[^\t]+\+0x[0-9a-f]+\t+[^\t]+:\d+")
    trailer = "# runtime.MemStats\n# Alloc = 1\n"
    for text in (read(name), heap_text(HEAP, trailer)):
        records, _, rest = text.partition("\n\n\n# runtime.MemStats\n")
        head, *lines = records.split("\n")
        assert header.fullmatch(head)
        assert record.fullmatch(lines[0])
        assert all(record.fullmatch(line) or frame.fullmatch(line) or not line for line in lines)
        assert all(line.startswith("# ") for line in rest.splitlines())


BLOCK = Profile(
    (ValueType("contentions", "count"), ValueType("delay", "nanoseconds")),
    (Sample((PAGE,), (1, 70)), Sample((CART, MAIN), (3, 9_000)), Sample((MAIN,), (9, 70))),
    ValueType("contentions", "count"),
    1,
    1,
)


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("block", ["--- contention:", "cycles/second=1000000000"]),
        ("mutex", ["--- mutex:", "cycles/second=1000000000", "sampling period=1"]),
    ],
)
def test_contentions_are_sorted_by_delay(name, head):
    """A record has delay, count and addresses. A cycle is a nanosecond. The longest is first."""
    assert collapsed(contention_text(name, BLOCK)) == [
        *head,
        f"9000 3 @ {record_addresses((CART, MAIN))}",
        frame_line(CART, "shop.build_cart+0x2", "/srv/shop.py:12"),
        frame_line(MAIN, "m+0x0", "/srv/shop.py:1"),
        "",
        f"70 1 @ {record_addresses((PAGE,))}",
        frame_line(PAGE, "shop.build_page+0x4", "/srv/shop.py:5"),
        "",
        f"70 9 @ {record_addresses((MAIN,))}",
        frame_line(MAIN, "m+0x0", "/srv/shop.py:1"),
        "",
    ]
    assert contention_text(name, replace(BLOCK, samples=())) == "\n".join([*head, ""])


@pytest.mark.parametrize("name", ["block", "mutex"])
def test_the_head_of_contentions_has_the_form_of_gos_head(name):
    """The lines are equal except for the number of cycles."""

    def head(text):
        lines = text.split("\n")
        first = next(number for number, line in enumerate(lines) if " @ " in line)
        return [re.sub(r"\d+", "N", line) for line in lines[:first]]

    assert head(contention_text(name, BLOCK)) == head(read(f"{name}_debug1.body"))


# The dump

DUMP_STACK = re.compile(
    r"""
    goroutine\ (?P<id>\d+)\ \[(?P<state>[^\]\n]+)\](?:\ \{(?P<labels>[^\n]+)\})?:\n
    (?P<frames>(?:
        (?P<function>[^\t\n][^\n]*\([^\n]*\))\n\t[^\n]+:\d+(?:\ \+0x[0-9a-f]+)?\n
      | \.\.\.\d+\ frames\ elided\.\.\.\n
      | \tgoroutine\ running\ on\ other\ thread;\ stack\ unavailable\n
    )+)
    (?:created\ by\ [^\n]+(?:\ in\ goroutine\ \d+)?\n\t[^\n]+:\d+\ \+0x[0-9a-f]+\n)?
    """,
    re.VERBOSE,
)
LABEL_WORD = r'(?:[A-Za-z0-9./_]+|"(?:[ !#-\[\]-~]|\\[nrt\\"]|\\x..|\\u.{4}|\\U.{8})*")'
LABELS = re.compile(rf"{LABEL_WORD}: {LABEL_WORD}(?:, {LABEL_WORD}: {LABEL_WORD})*")


def parse_dump(text):
    """Return the matches of all stacks; check first that they make up the whole dump."""
    assert text.endswith("\n")
    found = [DUMP_STACK.fullmatch(f"{stack}\n") for stack in text[:-1].split("\n\n")]
    assert all(found)
    assert all(LABELS.fullmatch(each["labels"]) for each in found if each["labels"])
    return found


@pytest.mark.parametrize("name", DUMPS)
def test_the_grammar_is_that_of_gos_dumps(name):
    """The parser of these tests must accept Go's own dumps."""
    stacks = parse_dump(read(name))
    assert len(stacks) > 10
    assert stacks[0]["state"] == "running"


GOROUTINES = [
    Goroutine(7, "running", (CART, MAIN), (("tenant", "acme"), ("route", "/cart/{id}"))),
    Goroutine(1, "select", (PAGE,)),
    Goroutine(12, "chan receive", (MAIN,), (("bytes", 64),)),
]


def test_a_dump_shows_every_task_with_its_state_and_stack():
    """Tasks are in the given order, separated by blank lines."""
    assert goroutine_dump(GOROUTINES) == (
        'goroutine 7 [running] {tenant: acme, route: "/cart/{id}"}:\n'
        "shop.build_cart(...)\n"
        "\t/srv/shop.py:12 +0x2\n"
        "m(...)\n"
        "\t/srv/shop.py:1 +0x0\n"
        "\n"
        "goroutine 1 [select]:\n"
        "shop.build_page(...)\n"
        "\t/srv/shop.py:5 +0x4\n"
        "\n"
        "goroutine 12 [chan receive] {bytes: 64}:\n"
        "m(...)\n"
        "\t/srv/shop.py:1 +0x0\n"
    )


def test_a_dump_keeps_to_gos_grammar():
    """Tools that read Go's crash dumps can read ours."""
    found = parse_dump(goroutine_dump(GOROUTINES))
    assert [(each["id"], each["state"]) for each in found] == [
        ("7", "running"),
        ("1", "select"),
        ("12", "chan receive"),
    ]


@pytest.mark.parametrize(
    ("minutes", "leaked", "status"),
    [
        (0, False, "Lock.acquire"),
        (1, False, "Lock.acquire, 1 minutes"),
        (60 * 24, False, "Lock.acquire, 1440 minutes"),
        (0, True, "Lock.acquire (leaked)"),
    ],
)
def test_minutes_and_leaks_follow_the_state(minutes, leaked, status):
    """Minutes are always plural, as in Go, and left out if there are none."""
    goroutine = Goroutine(3, "Lock.acquire", (MAIN,), minutes=minutes, leaked=leaked)
    text = goroutine_dump([goroutine])
    assert text.split("\n")[0] == f"goroutine 3 [{status}]:"
    parse_dump(text)
    labelled = replace(goroutine, labels=(("tenant", "acme"),))
    assert goroutine_dump([labelled]).split("\n")[0] == (
        f"goroutine 3 [{status}] {{tenant: acme}}:"
    )


@pytest.mark.parametrize(
    ("creator", "by"), [(0, "created by shop.build_page"), (7, "shop.build_page in goroutine 7")]
)
def test_the_creator_of_a_task_comes_last(creator, by):
    """It has function, number and line; there is no number if no task created it."""
    goroutine = Goroutine(9, "sleep", (CART, MAIN), created_by=PAGE, creator=creator)
    lines = goroutine_dump([goroutine]).split("\n")
    assert lines[-3].startswith("created by ")
    assert lines[-3].endswith(by)
    assert lines[-2:] == ["\t/srv/shop.py:5 +0x4", ""]
    parse_dump(goroutine_dump([goroutine, *GOROUTINES]))


def test_the_creator_of_a_task_is_not_elided():
    """It is shown after the deepest stack, too."""
    stack = tuple(place(f"f{number}", number + 1) for number in range(128))
    text = goroutine_dump([Goroutine(1, "sleep", stack, created_by=PAGE, creator=2)])
    parse_dump(text)
    assert "...28 frames elided...\n" in text
    assert text.endswith("created by shop.build_page in goroutine 2\n\t/srv/shop.py:5 +0x4\n")


def test_a_task_without_a_known_creator_has_no_such_line():
    """The creator's number alone is not shown: it belongs to the line of the call."""
    assert "created by" not in goroutine_dump([Goroutine(1, "sleep", (MAIN,), creator=2)])


def test_minutes_and_creators_are_where_gos_dumps_have_them():
    """Header lines and last lines of Go's dumps have the form that is tested above."""
    blocks = [read(name) for name in DUMPS]
    minutes = [line for text in blocks for line in text.split("\n") if " minutes]" in line]
    created = [line for text in blocks for line in text.split("\n") if "created by" in line]
    assert created
    for line in minutes:
        assert re.match(r"goroutine \d+ \[[^,\]]+, \d+ minutes\]", line)
    for line in created:
        assert re.fullmatch(r"created by \S+( in goroutine \d+)?", line)


def test_a_dump_without_tasks_is_empty():
    """Without an event loop there are no tasks."""
    assert goroutine_dump([]) == ""


@pytest.mark.parametrize(
    ("depth", "elided"), [(1, None), (99, None), (100, None), (101, 1), (128, 28), (1_000, 900)]
)
def test_the_middle_of_a_deep_stack_is_elided(depth, elided):
    """50 frames at each end are kept. A line between gives the number of the others."""
    stack = tuple(place(f"f{number}", number + 1) for number in range(depth))
    text = goroutine_dump([Goroutine(1, "running", stack)])
    parse_dump(text)
    functions = re.findall(r"^f(\d+)\(\.\.\.\)$", text, re.MULTILINE)
    shown = [number for number in range(depth) if not elided or number < 50 or number >= depth - 50]
    assert functions == list(map(str, shown))
    assert re.findall(r"^\.\.\.(\d+) frames elided\.\.\.$", text, re.MULTILINE) == (
        [str(elided)] if elided else []
    )
    if elided:
        assert text.index("f49(") < text.index("elided") < text.index(f"f{depth - 50}(")


@pytest.mark.parametrize(
    ("value", "word"),
    [
        ("acme", "acme"),
        ("ACME_9", "ACME_9"),
        ("/cart/items", "/cart/items"),
        ("v1.2", "v1.2"),
        ("7", "7"),
        (64, "64"),
        (-1, '"-1"'),
        ("a-b", '"a-b"'),
        ("a b", '"a b"'),
        ("/cart/{id}", '"/cart/{id}"'),
        ("a:b", '"a:b"'),
        ("a,b", '"a,b"'),
        ("a=b", '"a=b"'),
        ("a\nb\r\t", r'"a\nb\r\t"'),
        ('a"b', r'"a\"b"'),
        ("a\\b", r'"a\\b"'),
        ("\a\x00\x7f", r'"\x07\x00\x7f"'),
        ("é", r'"\u00e9"'),
        ("日本", r'"\u65e5\u672c"'),
        ("😀", r'"\U0001f600"'),
        ("٣", r'"\u0663"'),
        ("a\n", r'"a\n"'),
        ("\udcff", r'"\udcff"'),
    ],
)
def test_words_of_labels_are_bare_or_quoted(value, word):
    """ASCII letters, digits, `.`, `/` and `_` need no quotes. Else printable ASCII is quoted."""
    text = goroutine_dump([Goroutine(1, "running", (MAIN,), (("k", value),))])
    assert text.split("\n")[0] == f"goroutine 1 [running] {{k: {word}}}:"
    parse_dump(text)
    if isinstance(value, str):
        text = goroutine_dump([Goroutine(1, "running", (MAIN,), ((value, "v"),))])
        assert text.split("\n")[0] == f"goroutine 1 [running] {{{word}: v}}:"


@given(st.text(max_size=8), st.text(max_size=8), st.text(max_size=8))
def test_no_name_or_label_breaks_a_text(name, filename, value):
    """Lines and cells follow the grammar whatever characters there are."""
    odd = place(name or "f", 3, filename=filename or "f.py")
    goroutine = Goroutine(1, "running", (odd,), (("k", value or "v"),))
    (found,) = parse_dump(goroutine_dump([goroutine]))
    assert found["frames"].count("\n") == 2
    text = count_text("goroutine", counts(Sample((odd,), (1,), goroutine.labels)))
    assert len(text.split("\n")) == len(text.splitlines()) + 1 == 6
    assert len(re.split("\t+", text.split("\n")[3])) == 4
    assert text.isascii() or text.encode("utf-8")
