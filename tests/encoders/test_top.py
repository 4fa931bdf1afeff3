"""The text of a CPU profile has Go's own figures by function, and shares by route."""

import itertools
import re

import pytest

from asgi_pprof.encoders.protobuf import encode
from asgi_pprof.encoders.text import align
from asgi_pprof.encoders.top import cpu_text
from asgi_pprof.profile import Function, Location, Profile, Sample, ValueType
from tests.gotool import go_pprof

pytestmark = pytest.mark.once

CPU = ValueType("cpu", "nanoseconds")
MS = 1_000_000
FUNCTIONS = "#       flat  flat%        cum   cum%  function"
ROUTES = "#        cpu   cpu%  route"


def place(name, line=1):
    return Location(Function(name, "/srv/shop.py", 1), line)


MAIN, CART, PRICE, HASH = (place(name) for name in ("m", "shop.cart", "shop.price", "shop.hash"))


def cpu(*samples, **changes):
    kinds = (ValueType("samples", "count"), CPU)
    return Profile(kinds, samples, CPU, 10 * MS, 1, duration_ns=2000 * MS, **changes)


def ran(periods, *stack, **labels):
    return Sample(stack, (periods, periods * 10 * MS), tuple(sorted(labels.items())))


SHOP = cpu(
    ran(70, HASH, PRICE, CART, MAIN, route="/cart/{id}", method="GET"),
    ran(20, PRICE, CART, MAIN, route="/cart/{id}", method="POST"),
    ran(5, place("shop.price", 9), PRICE, MAIN, route="/chat"),
    ran(5, MAIN),
    comments=("engine: native", "two\nlines"),
)


def rows(text, heading):
    """Return the cells of the rows below a heading; the last cell may have spaces."""
    lines = text.partition(f"{heading}\n")[2].splitlines()
    below = itertools.takewhile(lambda line: line.startswith("# "), lines)
    return [line.split(maxsplit=len(heading.split()) - 1)[1:] for line in below]


def functions(profile):
    return rows("".join(cpu_text(profile)), FUNCTIONS)


def test_the_text_begins_with_the_answer():
    """Totals and comments, functions by their own time, and routes; then the stacks."""
    head, blank, stacks = "".join(cpu_text(SHOP)).partition("\n\n")
    assert blank
    assert head == "\n".join(
        [
            "# 1.000s of CPU time in 2.000s, 50.0% of one CPU; 100 samples",
            "# engine: native",
            r"# two\nlines",
            "#",
            FUNCTIONS,
            "#     0.700s  70.0%     0.700s  70.0%  shop.hash",
            "#     0.250s  25.0%     0.950s  95.0%  shop.price",
            "#     0.050s   5.0%     1.000s 100.0%  m",
            "#     0.000s   0.0%     0.900s  90.0%  shop.cart",
            "#",
            ROUTES,
            "#     0.700s  70.0%  GET /cart/{id}",
            "#     0.200s  20.0%  POST /cart/{id}",
            "#     0.050s   5.0%  (no route)",
            "#     0.050s   5.0%  /chat",
        ]
    )
    lines = stacks.splitlines()
    assert lines[0] == "samples profile: total 100"
    records = [line for line in lines if " @ " in line]
    assert [record.split()[0] for record in records] == ["70", "20", "5", "5"]
    assert records[0].count(" 0x") == 4
    assert lines[2] == '# labels: {"method":"GET", "route":"/cart/{id}"}'
    assert lines[3] == align(f"#\t{HASH.address:#x}\tshop.hash+0x0\t/srv/shop.py:1")


@pytest.mark.go
def test_functions_are_those_of_go_tool_pprof(tmp_path):
    """-top of the protobuf has the same rows in the same order, with recursion counted once."""
    saved = tmp_path / "cpu.pb.gz"
    saved.write_bytes(encode(SHOP))
    top = go_pprof(tmp_path, "-top", "-unit=ms", "-nodefraction=0", saved).text
    go = [line.split() for line in top.partition("cum%\n")[2].splitlines()]
    ours = functions(SHOP)
    assert [row[4] for row in ours] == [row[5] for row in go]
    for row, (flat, flat_share, _, cumulative, share, _) in zip(ours, go, strict=True):
        for seconds, milliseconds in ((row[0], flat), (row[2], cumulative)):
            assert float(seconds[:-1]) * 1000 == float(milliseconds.removesuffix("ms"))
        for percent, percent_of_go in ((row[1], flat_share), (row[3], share)):
            assert float(percent[:-1]) == float(percent_of_go[:-1])


def test_what_has_no_row_is_added_up():
    """Beyond 50 functions and 50 routes there is one row with their number and time."""
    samples = [ran(100 - n, place(f"f{n}"), MAIN, route=f"/{n}", method="GET") for n in range(60)]
    text = "".join(cpu_text(cpu(*samples)))
    total = sum(range(41, 101))
    shown = rows(text, FUNCTIONS)
    assert [row[4] for row in shown[:50]] == [f"f{number}" for number in range(50)]
    rest = f"{sum(range(41, 51)) / 100:.3f}s {100 * sum(range(41, 51)) / total:.1f}%"
    assert " ".join(shown[50]) == f"{rest} (11 more functions)"
    routes = rows(text, ROUTES)
    assert [row[2] for row in routes[:50]] == [f"GET /{number}" for number in range(50)]
    assert " ".join(routes[50]) == f"{rest} (10 more routes)"


def test_without_routes_there_is_no_table_of_them():
    """Its only row would say that all the time has no route."""
    text = "".join(cpu_text(cpu(ran(1, CART, MAIN, tenant="acme"))))
    assert "route" not in text
    assert '# labels: {"tenant":"acme"}' in text


def test_an_idle_process_has_no_rows():
    """Nothing is divided by the time of no samples."""
    assert "".join(cpu_text(cpu())) == (
        "# 0.000s of CPU time in 2.000s, 0.0% of one CPU; 0 samples\n"
        "#\n"
        f"{FUNCTIONS}\n"
        "\n"
        "samples profile: total 0\n"
    )


@pytest.mark.parametrize("text", ["a\nb", "a\tb", "a\x85b", "caf\udce9"])
def test_names_and_routes_add_no_line(text):
    """A line break in a name would end the comment, and the parser would read the rest."""
    profile = cpu(ran(1, place(text), MAIN, route=text))
    head = "".join(cpu_text(profile)).partition("\nsamples profile:")[0]
    assert all(line.startswith("#") for line in head.splitlines())


@pytest.mark.go
@pytest.mark.parametrize("profile", [SHOP, cpu()], ids=["shop", "idle"])
def test_go_reads_the_stacks(tmp_path, profile):
    """Parsers skip the tables, and read each stack with its number of samples."""
    saved = tmp_path / "cpu.txt"
    saved.write_text("".join(cpu_text(profile)))
    raw = go_pprof(tmp_path, "-raw", "-symbolize=none", saved).text
    assert "samples/count" in raw
    samples = re.findall(r"^ +(\d+): [\d ]+$", raw, re.MULTILINE)
    assert samples == [str(sample.values[0]) for sample in profile.samples]
