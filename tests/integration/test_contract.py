"""
The HTTP contract is compared, request by request, with a real Go server's answers.

For each request tests/golden/http has the curl command, the response's headers, and
the body if it is small.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from asgi_pprof.native.core import native
from tests.servers import PROFILES, ask, leaving_client, until

pytestmark = [pytest.mark.server, pytest.mark.once]

GOLDEN = Path(__file__).parent.parent / "golden" / "http"
INCOMPATIBLE = "seconds and debug params are incompatible\n"
COMPARED = [
    "content-type",
    "content-disposition",
    "content-encoding",
    "x-content-type-options",
    "x-go-pprof",
    "allow",
    "location",
]


def golden_requests():
    """Yield (name, method, path, headers, body, status, headers expected, body expected)."""
    for file in sorted(GOLDEN.glob("*.hdr")):
        command, answer = file.read_text().split("\n", 1)
        arguments = shlex.split(command.removeprefix("# curl "))
        url = next(each for each in arguments if each.startswith("http"))
        parts = urlsplit(url)
        path = parts.path + (f"?{parts.query}" if parts.query else "")
        options = dict(zip(arguments, [*arguments[1:], ""], strict=True))
        body = options.get("-d", options.get("--data-binary"))
        head = answer.partition("\ncurl")[0].strip().splitlines()
        status = int(head[0].split()[1])
        expected = dict(line.lower().split(": ", 1) for line in head[1:] if ": " in line)
        text = file.with_suffix(".body")
        yield pytest.param(
            options["-X"],
            path,
            body.encode() if body is not None else None,
            status,
            expected,
            text.read_bytes() if text.exists() and status != 200 else None,
            id=file.stem,
        )


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "expected", "text"), list(golden_requests())
)
def test_answers_are_gos(any_shop, method, path, body, status, expected, text):
    """Status, pprof's headers and the texts of errors equal those of a Go server."""
    answer = ask(any_shop.port, path, method, body=body)
    assert answer.status == status
    for name in COMPARED:
        ours = answer.headers.get(name)
        assert (ours.lower() if ours else None) == expected.get(name), name
    if text is not None and method != "HEAD":
        assert answer.body == text
    if method == "HEAD":
        assert answer.body == b""


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "text"),
    [
        ("GET", "nosuch?seconds=x", None, 404, "Unknown profile\n"),
        ("GET", "trace", None, 404, "Unknown profile\n"),
        ("GET", "goroutineleaks", None, 404, "Unknown profile\n"),
        ("GET", "heap?seconds=x&debug=1", None, 400, None),
        ("GET", "example.com/conns?seconds=x", None, 400, None),
        (
            "GET",
            "example.com/conns?seconds=1&debug=1",
            None,
            400,
            '"seconds" parameter is not supported for this profile type\n',
        ),
        *(
            ("GET", f"{name}?seconds=1&debug={debug}", None, 400, INCOMPATIBLE)
            for name, debug in [("heap", 2), ("heap", -1), ("goroutine", 2), ("block", 99)]
        ),
        ("GET", "heap?seconds=9223372036854775808", None, 400, None),
        ("GET", "heap?seconds=+1", None, 400, None),
        ("GET", "heap?seconds=%FF%FE", None, 400, None),
        ("GET", "heap?seconds=1_0", None, 400, None),
        ("GET", "%FF%FE?debug=1", None, 404, "Unknown profile\n"),
        ("GET", "%00", None, 404, "Unknown profile\n"),
        ("GET", "index.html", None, 404, "Unknown profile\n"),
        ("GET", "heap%2f", None, 404, "Unknown profile\n"),
        ("PUT", "heap", b"", 405, "Method Not Allowed\n"),
        ("DELETE", "nosuch", b"", 405, "Method Not Allowed\n"),
        ("PROPFIND", "profile", b"", 405, "Method Not Allowed\n"),
        ("PUT", "symbol", b"", 405, "Method Not Allowed\n"),
    ],
)
def test_bad_requests_get_a_clear_error(any_shop, method, path, body, status, text):
    """No parameter, name or method leads to a 500 or a hanging request."""
    answer = any_shop.get(path, method=method, body=body)
    assert answer.status == status
    assert text is None or answer.text == text
    assert answer.headers["content-type"] == "text/plain; charset=utf-8"
    assert (answer.headers.get("x-go-pprof") == "1") is (status != 405)


@pytest.mark.parametrize(
    "query",
    [
        "debug=-99999999999999999999",
        "debug=" + "9" * 5000,
        "debug=2&debug=0",
        "gc=abc&debug=1",
        "gc=1&debug=2",
        "debug=1&%zz=1&;=;",
        "debug=1&seconds=",
    ],
)
def test_odd_parameters_still_get_text(any_shop, query):
    """Values are parsed as in Go: all of these request text."""
    answer = any_shop.get(f"heap?{query}")
    assert answer.status == 200
    assert answer.headers["content-type"] == "text/plain; charset=utf-8"
    assert answer.text.startswith("heap profile: ")


def test_index_has_gos_rows(any_shop):
    """The page is Go's, with a sorted row for each profile; it says what is off."""
    page = any_shop.get("").text
    rows = re.findall(r"<tr><td>(\d+)</td><td><a href='([^']+)'>([^<]+)</a></td></tr>", page)
    names = [name for _, _, name in rows]
    assert names == sorted(
        "allocs block cmdline example.com/conns goroutine goroutineleak heap mutex profile stall"
        " stats symbol thread threadcreate".split()
    )
    assert all(href == f"{name}?debug=1" for _, href, name in rows)
    counts = {name: int(count) for count, _, name in rows}
    assert counts["goroutine"] >= 1
    assert counts["thread"] >= 1
    assert counts["example.com/conns"] == 2
    assert counts["profile"] == counts["cmdline"] == counts["symbol"] == counts["stats"] == 0
    assert '<a href="goroutine?debug=2">full goroutine stack dump</a>' in page
    for name in ("block", "mutex") if native else ("heap", "allocs", "block", "mutex"):
        assert re.search(rf"{name}: </div>.*\(off: ", page), name
    go_page = (GOLDEN / "index.body").read_text()
    go_frame = re.sub(r"(?s)(<tr>.*</tr>\n|<li>.*</li>\n)", "", go_page)
    our_frame = re.sub(r"(?s)(<tr>.*</tr>\n|<li>.*</li>\n)", "", page)
    stats = r"<p><a href='stats'>stats</a>:</p>\n<pre>\n[^<>]+\n</pre>\n(?=</body>\n</html>$)"
    ours_alone, found = re.subn(stats, "", our_frame)
    assert found == 1
    assert ours_alone == go_frame


@pytest.mark.parametrize("name", ["heap", "allocs"])
def test_texts_of_memory_end_with_mem_stats(any_shop, name):
    """As in Go, both have them, behind an empty line."""
    trailer = any_shop.get(f"{name}?debug=1").text.partition("\n\n# runtime.MemStats\n")[2]
    lines = trailer.splitlines()
    assert re.fullmatch(r"# Alloc = \d+", lines[0])
    assert any(re.fullmatch(r"# HeapAlloc = \d+", line) for line in lines)
    assert all(line.startswith("# ") for line in lines)


@pytest.mark.parametrize("query", ["debug=1", "debug=2", "debug=-1", "hz=200&debug=1"])
def test_a_cpu_profile_is_text_if_asked_for(any_shop, query):
    """Go ignores `debug` here. The text begins with the answer, and names the route."""
    with any_shop.load("/burn/100", clients=1):
        answer = any_shop.get(f"profile?seconds=1&{query}")
    assert answer.status == 200
    assert answer.headers["content-type"] == "text/plain; charset=utf-8"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "content-disposition" not in answer.headers
    head, _, stacks = answer.text.partition("\nsamples profile: total ")
    seconds, percent = r"\d+\.\d{3}s", r"\d+\.\d%"
    total = rf"# {seconds} of CPU time in {seconds}, {percent} of one CPU; \d+ samples\n"
    assert re.match(total, head)
    function = rf"^# +{seconds} +{percent} +{seconds} +{percent}  tests\.apps\.burn_cpu_a$"
    assert re.search(function, head, re.MULTILINE)
    assert re.search(rf"^# +{seconds} +{percent}  GET /burn/\{{share\}}$", head, re.MULTILINE)
    assert re.search(r"^#\t0x[0-9a-f]+\ttests\.apps\.burn_cpu_a\+0x", stacks, re.MULTILINE)


def test_a_failed_cpu_profile_has_the_same_error_with_debug(any_shop):
    """No text is sent before there is a profile."""
    with leaving_client(any_shop.port, f"{PROFILES}/profile?seconds=60&debug=1"):
        until(any_shop.is_sampling)
        answer = any_shop.get("profile?seconds=1&debug=1")
    until(lambda: not any_shop.is_sampling())
    assert answer.status == 500
    assert answer.text == "Could not enable CPU profiling: cpu profiling already in use\n"
    assert answer.headers["x-go-pprof"] == "1"


def test_cmdline_is_the_command_line(any_shop):
    """The body is argv joined by NUL, without a NUL at the end."""
    arguments = any_shop.get("cmdline").body.split(b"\0")
    assert arguments[-4:] == [b"-m", b"tests.launch", b"tests.apps:app", b"asyncio"]


def test_small_bodies_have_a_length_and_large_ones_are_chunked(any_shop):
    """As in net/http, only bodies below 2,048 bytes have a Content-Length, HEAD included."""
    small, large = any_shop.get("symbol"), any_shop.get("")
    assert small.headers["content-length"] == str(len(small.body))
    assert len(large.body) >= 2048
    assert "content-length" not in large.headers
    head = any_shop.get("symbol", method="HEAD")
    assert head.headers["content-length"] == str(len(small.body))
    assert head.body == b""
    assert "content-length" not in any_shop.get("", method="HEAD").headers


def test_other_requests_reach_the_application(any_shop):
    """Paths outside the prefix are the application's, also those that resemble it."""
    assert any_shop.visit("/quick").body == b'"quick"'
    for path in ("/debug/pprofx", "/debug", "/debug/pprof/../quick", "/x/debug/pprof/heap"):
        assert any_shop.visit(path).body == b'{"detail":"Not Found"}', path
    encoded = any_shop.visit("/debug%2fpprof/heap")
    assert encoded.body == b'{"detail":"Not Found"}'


@pytest.mark.parametrize(
    "path", ["//debug/pprof/heap", "/debug//pprof/heap", "/debug/pprof/./heap"]
)
def test_unclean_paths_are_never_served(any_shop, path):
    """They are redirected to the clean path, or left to the application."""
    answer = ask(any_shop.port, path)
    assert answer.status in (307, 404)
    if answer.status == 307:
        assert answer.headers["location"] == f"{PROFILES}/heap"


def test_redirect_keeps_the_query(any_shop):
    """`/debug/pprof?debug=1` redirects to `/debug/pprof/?debug=1`."""
    answer = ask(any_shop.port, f"{PROFILES}?debug=1")
    assert answer.headers["location"] == f"{PROFILES}/?debug=1"


def test_symbol_resolves_the_addresses_of_a_text_profile(any_shop):
    """POST (as go tool pprof sends it) and GET resolve record and frame addresses."""
    text = any_shop.get("goroutine?debug=1").text
    frames = re.findall(r"^#\t(0x[0-9a-f]+)\t+(\S+)\+0x[0-9a-f]+\t", text, re.MULTILINE)
    assert frames
    addresses = "+".join(address for address, _ in frames)
    expected = "num_symbols: 1\n" + "".join(f"{address} {name}\n" for address, name in frames)
    assert any_shop.get("symbol", method="POST", body=addresses.encode()).text == expected
    assert any_shop.get(f"symbol?{addresses}").text == expected
    record = re.search(r"^\d+ @ (0x[0-9a-f]+)", text, re.MULTILINE)
    assert record is not None
    assert record[1] in any_shop.get(f"symbol?{record[1]}").text
    assert any_shop.get("symbol?1+x+0x7").text == "num_symbols: 1\n"
