"""The `symbol` endpoint names the addresses of debug=1 texts; checked against Go 1.27.3."""

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asgi_pprof import address_book as symbols
from asgi_pprof.address_book import AddressBook
from asgi_pprof.profile import Function, Location, Profile, Sample, ValueType

pytestmark = pytest.mark.once

TASKS = ValueType("goroutine", "count")
FULL = "reading request: bufio: buffer full\n"


def place(name, line=1):
    return Location(Function(name, "/srv/shop.py", 1), line)


def profile(*places):
    return Profile((TASKS,), (Sample(tuple(places), (1,)),), TASKS, 1, 1)


class FixedBook(AddressBook):
    """A book with given addresses, to test the syntax of numbers."""

    def __init__(self, names):
        super().__init__()
        self._names.update(names)


def answer(book, *chunks):
    """Return the lines after the first that answer a body of these chunks."""

    async def body():
        for chunk in chunks:
            yield chunk

    head, *lines = asyncio.run(book.answer(body())).splitlines(keepends=True)
    assert head == "num_symbols: 1\n"
    return lines


CART, PAGE = place("build_cart"), place("build_page", 7)
KNOWN = AddressBook()
KNOWN.remember(profile(CART, PAGE))


def line(location, address=None):
    return f"{location.address if address is None else address:#x} {location.function.name}\n"


def test_an_address_is_answered_with_its_functions_name():
    """The address is in lower-case hexadecimal, one per line."""
    assert answer(KNOWN, hex(CART.address).encode()) == [line(CART)]


def test_order_and_duplicates_follow_the_list():
    """Unknown addresses are left out."""
    asked = [PAGE.address, CART.address, 12_345, PAGE.address]
    assert answer(KNOWN, "+".join(map(hex, asked)).encode()) == [
        line(PAGE),
        line(CART),
        line(PAGE),
    ]


def test_a_return_address_is_answered_as_it_was_asked():
    """Record lines of the texts show return addresses, which are one higher than locations."""
    asked = [CART.address + 1, CART.address + 2, CART.address - 1]
    assert answer(KNOWN, "+".join(map(str, asked)).encode()) == [line(CART, CART.address + 1)]


def test_an_address_goes_before_the_one_below():
    """Two functions with adjacent addresses keep their own."""
    book = FixedBook({0x10: "below", 0x11: "above"})
    assert answer(book, b"0x10+0x11+0x12") == ["0x10 below\n", "0x11 above\n", "0x12 above\n"]


@pytest.mark.parametrize(
    "chunks", [(), (b"",), (b"+",), (b"+++",), (b"", b"+", b"")], ids=lambda chunks: repr(chunks)
)
def test_an_empty_list_has_no_lines(chunks):
    """The first line only says that there are symbols."""
    assert answer(KNOWN, *chunks) == []


@pytest.mark.parametrize(
    ("item", "number"),
    [
        (b"255", 0xFF),
        (b"0xff", 0xFF),
        (b"0xFF", 0xFF),
        (b"0XfF", 0xFF),
        (b"0x00ff", 0xFF),
        (b"0b11111111", 0xFF),
        (b"0B1111_1111", 0xFF),
        (b"0o377", 0xFF),
        (b"0O377", 0xFF),
        (b"0377", 0xFF),
        (b"0_377", 0xFF),
        (b"00377", 0xFF),
        (b"2_5_5", 0xFF),
        (b"0x_ff", 0xFF),
        (b"0xf_f", 0xFF),
        (b"0o_377", 0xFF),
        (b"0b_11111111", 0xFF),
        (b"0x" + b"0" * 200 + b"ff", 0xFF),
        (b"0" * 200 + b"377", 0xFF),
        (b"18446744073709551615", 2**64 - 1),
        (b"0xffffffffffffffff", 2**64 - 1),
        (b"01777777777777777777777", 2**64 - 1),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_numbers_are_read_as_go_literals(item, number):
    """Prefixes give the base, digits may be separated by underscores, a leading 0 means octal."""
    book = FixedBook({number: "build_cart"})
    assert answer(book, item) == [f"{number:#x} build_cart\n"]


@pytest.mark.parametrize(
    "item",
    [
        b"0",
        b"00",
        b"0x0",
        b"-255",
        b"-1",
        b" 255",
        b"255 ",
        b"255\n",
        b"255.0",
        b"2e2",
        b"0x1p3",
        b"ff",
        b"x",
        b"0x",
        b"0b",
        b"0o",
        b"0xgg",
        b"0b2",
        b"08",
        b"0_8",
        b"0o8",
        b"_255",
        b"255_",
        b"2__55",
        b"0x__ff",
        b"0xff_",
        b"0__377",
        b"0_",
        b"_",
        b"0x1_0000_0000_0000_0000",
        b"18446744073709551616",
        b"18446744073709551871",
        b"0x10000000000000ff",
        b"9" * 4_000,
        b"0x" + b"f" * 4_000,
        b"\xff\xfe",
        "２５５".encode(),
        "٢٥٥".encode(),
        b"255%2B255",
        b"255,255",
        b"0xff&debug=1",
    ],
    ids=lambda value: repr(value)[:30],
)
def test_what_is_no_address_is_skipped(item):
    """There is no error, and the items around it are answered."""
    book = FixedBook({255: "build_cart", 8: "eight", 2: "two", 0x10: "sixteen"})
    assert answer(book, item) == []
    assert answer(book, b"255+" + item + b"+0x10") == ["0xff build_cart\n", "0x10 sixteen\n"]


@pytest.mark.parametrize("filler", [b"x", b"1", b"%2B"])
def test_an_item_that_fits_gos_buffer_is_only_skipped(filler):
    """The buffer holds 4,095 bytes and the separator."""
    item = (filler * 4_095)[:4_095]
    asked = hex(CART.address).encode()
    assert answer(KNOWN, b"+".join([asked, item, asked])) == [line(CART)] * 2
    assert answer(KNOWN, item) == []


@pytest.mark.parametrize("length", [4_096, 4_097, 100_000])
@pytest.mark.parametrize("rest", [b"", b"+", b"+255", b"+255+255"])
def test_an_item_that_does_not_fit_gos_buffer_ends_the_answer(length, rest):
    """The message is Go's; the rest of the body is not read."""
    book = FixedBook({255: "build_cart"})
    assert answer(book, b"255+" + b"x" * length + rest) == ["0xff build_cart\n", FULL]


def test_an_item_that_never_ends_is_not_read_to_its_end():
    """The answer comes as soon as the item is too long."""

    async def endless():
        while True:
            yield b"x" * 1_000

    assert asyncio.run(KNOWN.answer(endless())) == "num_symbols: 1\n" + FULL


def test_a_body_that_is_too_large_ends_the_answer(monkeypatch):
    """A client must not keep a worker busy for ever; the lines found so far are sent."""
    monkeypatch.setattr(symbols, "_MAX_BODY", 2**20)

    async def endless():
        while True:
            yield b"1+" * 500_000

    text = asyncio.run(FixedBook({1: "one"}).answer(endless()))
    assert text.endswith("0x1 one\nreading request: http: request body too large\n")


def test_chunks_may_end_in_the_middle_of_an_item():
    """Chunks of one byte give the same answer."""
    body = f"{CART.address:#x}+{PAGE.address}".encode()
    whole = [line(CART), line(PAGE)]
    assert answer(KNOWN, body) == whole
    assert answer(KNOWN, *(bytes([byte]) for byte in body)) == whole
    for end in range(len(body)):
        assert answer(KNOWN, body[:end], body[end:]) == whole


@settings(deadline=None)
@given(
    st.lists(st.sampled_from([b"255", b"", b"7", b"x" * 4_095, b"x" * 4_100]), max_size=6),
    st.lists(st.tuples(st.integers(0, 6), st.integers(-2, 3)), max_size=5),
)
def test_the_answer_does_not_depend_on_where_chunks_end(items, cuts):
    """The network may divide the body anywhere."""
    book = FixedBook({255: "build_cart"})
    body = b"+".join(items)
    ends = [len(b"+".join(items[:number])) + offset for number, offset in cuts]
    edges = [0, *sorted(min(max(end, 0), len(body)) for end in ends), len(body)]
    chunks = [body[start:end] for start, end in zip(edges, edges[1:], strict=False)]
    assert answer(book, *chunks) == answer(book, body)


def test_the_oldest_places_are_forgotten(monkeypatch):
    """A location that is served again counts as new."""
    monkeypatch.setattr(symbols, "_MAX_NAMES", 3)
    book = AddressBook()
    places = [place(f"build_{number}") for number in range(5)]
    for number in (0, 1, 2, 0, 3, 4):
        book.remember(profile(places[number]))
    asked = "+".join(hex(each.address) for each in places).encode()
    assert answer(book, asked) == [line(places[0]), line(places[3]), line(places[4])]


def test_books_do_not_know_of_one_another():
    """Each application answers for its own texts only."""
    assert answer(AddressBook(), hex(CART.address).encode()) == []
