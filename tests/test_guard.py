"""Local requests are allowed by default, and others are refused with a reason."""

import pytest

from asgi_pprof.errors import AccessDenied
from asgi_pprof.guard import allow_loopback

pytestmark = pytest.mark.once

LOCAL = ("127.0.0.1", 50_000)


def scope(client=LOCAL, headers=(), host="localhost:8000"):
    """Return the scope of a request; headers are pairs (name, value)."""
    fields = [*((("host", host),) if host is not None else ()), *headers]
    return {
        "type": "http",
        "client": client,
        "headers": [(name.encode("latin-1"), value.encode("latin-1")) for name, value in fields],
    }


def denial(request):
    """Return the reason for which a request is refused."""
    with pytest.raises(AccessDenied) as caught:
        allow_loopback(request)
    assert caught.value.status == 403
    return str(caught.value)


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "127.0.0.2",
        "127.255.255.254",
        "::1",
        "0:0:0:0:0:0:0:1",
        "::1%lo",
        "::ffff:127.0.0.1",
        "::ffff:7f00:1",
    ],
)
def test_a_peer_on_this_machine_is_allowed(address):
    """All of 127.0.0.0/8 is loopback, and so is its mapping into IPv6."""
    allow_loopback(scope((address, 50_000)))


@pytest.mark.parametrize(
    "address",
    [
        "10.0.0.1",
        "192.168.0.1",
        "169.254.169.254",
        "0.0.0.0",
        "128.0.0.1",
        "8.8.8.8",
        "::",
        "::2",
        "fe80::1%eth0",
        "2001:db8::1",
        "::ffff:10.0.0.1",
        "::ffff:8.8.8.8",
        "64:ff9b::7f00:1",
        "localhost",
        "testclient",
        "127.1",
        "2130706433",
        "0x7f000001",
        "127.0.0.1 ",
        "",
    ],
)
def test_a_peer_elsewhere_is_refused(address):
    """Private networks, names and malformed addresses are not loopback either."""
    assert f"{address} is not one" in denial(scope((address, 50_000)))


@pytest.mark.parametrize("request_scope", [scope(None), scope(()), {"type": "http", "headers": []}])
def test_a_peer_without_an_address_is_refused(request_scope):
    """A Unix socket has no peer address, and there is probably a proxy at its other end."""
    assert "no peer address" in denial(request_scope)


@pytest.mark.parametrize(
    "name",
    [
        "Forwarded",
        "Via",
        "X-Forwarded-For",
        "X-Forwarded-Host",
        "X-Forwarded-Proto",
        "X-Forwarded-Port",
        "X-Forwarded-Server",
        "X-Forwarded",
        "X-Forwarded-Something-New",
        "X-Real-IP",
        "X-Client-IP",
        "X-Cluster-Client-IP",
        "X-Original-Forwarded-For",
        "X-Envoy-External-Address",
        "X-AppEngine-User-IP",
        "X-Azure-ClientIP",
        "True-Client-IP",
        "CF-Connecting-IP",
        "Fastly-Client-IP",
        "Fly-Client-IP",
    ],
)
@pytest.mark.parametrize("value", ["127.0.0.1", ""])
def test_a_forwarded_request_is_refused(name, value):
    """Behind a proxy on this machine every client looks local, whatever the header's value."""
    assert f"forwarded ({name.lower()})" in denial(scope(headers=[(name.lower(), value)]))


@pytest.mark.parametrize(
    "header",
    [
        ("accept-encoding", "gzip"),
        ("user-agent", "Go-http-client/1.1"),
        ("x-request-id", "7"),
        ("authorization", "Bearer secret"),
        ("forward", "127.0.0.1"),
    ],
)
def test_headers_of_an_ordinary_request_make_no_difference(header):
    """Only headers that a proxy or a browser adds are checked."""
    allow_loopback(scope(headers=[header]))


@pytest.mark.parametrize(
    "host",
    [
        None,
        "localhost",
        "localhost:8000",
        "LocalHost:8000",
        "127.0.0.1",
        "127.0.0.1:8000",
        "[::1]",
        "[::1]:8000",
        "[::ffff:127.0.0.1]:8000",
        "192.168.0.7:8000",
    ],
)
def test_a_host_that_is_an_address_or_localhost_is_allowed(host):
    """An address cannot be rebound, and HTTP/1.0 has no Host."""
    allow_loopback(scope(host=host))


@pytest.mark.parametrize(
    "host",
    [
        "",
        "evil.example",
        "evil.example:8000",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "127.0.0.1.nip.io:8000",
        "evil.localhost",
        "localhost.",
        "127.1",
        "2130706433",
        "::1",
        "[::1",
        "[localhost]",
        "localhost:port",
        "localhost:99999",
        "user@localhost",
        "evil.example:80@localhost",
        "localhost/x",
        "localhost\\x",
        "localhost#x",
        "localhost?x",
        "localhost,evil.example",
        "[::1]evil.example",
        "127.0.0.1:8000:8000",
        "\xff",
    ],
)
def test_a_host_that_is_another_name_is_refused(host):
    """Any name but localhost may have been rebound to 127.0.0.1 by its owner."""
    assert "Host" in denial(scope(host=host))


@pytest.mark.parametrize(
    "host",
    [
        "0.0.0.0",
        "0.0.0.0:8000",
        "[::]:8000",
        "[0:0:0:0:0:0:0:0]:8000",
        "[::%eth0]",
        "[::ffff:0.0.0.0]:8000",
        "[::ffff:0:0]",
        "0",
        "0:8000",
        "0x7f000001",
        "0x0",
        "017700000001",
        "127.0.0.1.",
    ],
)
def test_a_host_that_reaches_this_machine_unmarked_is_refused(host):
    """Browsers connect to 0.0.0.0 by loopback, and do not mark requests of other sites' pages."""
    assert "Host" in denial(scope(host=host))


@pytest.mark.parametrize(
    "referer", ["http://127.0.0.1:8000/debug/pprof/?x=http://evil.example", "about:blank", ""]
)
def test_a_referer_of_this_site_or_none_is_allowed(referer):
    allow_loopback(scope(headers=[("referer", referer)], host="127.0.0.1:8000"))


@pytest.mark.parametrize(
    "referer",
    [
        "http://evil.example/",
        "http://evil.example?://127.0.0.1:8000",
        "http://127.0.0.1:9000/",
        "http://127.0.0.1:8000@evil.example/",
        "//127.0.0.1:8000/",
    ],
)
def test_a_referer_of_another_site_is_refused(referer):
    """Requests for images, frames and scripts have no Origin, but a Referer."""
    assert "Referer" in denial(scope(headers=[("referer", referer)], host="127.0.0.1:8000"))


def test_every_one_of_several_hosts_must_be_local():
    """Servers differ in which Host they use."""
    allow_loopback(scope(headers=[("host", "127.0.0.1")]))
    assert "Host" in denial(scope(headers=[("host", "evil.example")]))
    assert "Host" in denial(scope(host="evil.example", headers=[("host", "localhost")]))


@pytest.mark.parametrize("site", ["none", "same-origin"])
def test_a_browser_on_this_site_is_allowed(site):
    """The user has typed the address or followed a link on the index page."""
    allow_loopback(scope(headers=[("sec-fetch-site", site)]))


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_a_page_of_another_site_or_port_is_refused(site):
    """Such a page could not read the answer, but it could start profiles."""
    assert "Sec-Fetch-Site" in denial(scope(headers=[("sec-fetch-site", site)]))


@pytest.mark.parametrize(
    ("origin", "host"),
    [
        ("http://localhost:8000", "localhost:8000"),
        ("https://localhost:8000", "localhost:8000"),
        ("http://LOCALHOST:8000", "LocalHost:8000"),
        ("http://127.0.0.1", "127.0.0.1"),
        ("http://[::1]:8000", "[::1]:8000"),
    ],
)
def test_an_origin_that_is_the_host_is_allowed(origin, host):
    """Pages of the service itself may post to `symbol`."""
    allow_loopback(scope(headers=[("origin", origin)], host=host))


@pytest.mark.parametrize(
    ("origin", "host"),
    [
        ("http://evil.example", "localhost:8000"),
        ("http://localhost:9000", "localhost:8000"),
        ("http://localhost", "localhost:8000"),
        ("http://127.0.0.1:8000", "localhost:8000"),
        ("http://localhost:8000.evil.example", "localhost:8000"),
        ("localhost:8000", "localhost:8000"),
        ("null", "localhost:8000"),
        ("", "localhost:8000"),
        ("http://", "localhost:8000"),
        ("http://localhost:8000", None),
        ("null", None),
        ("", None),
    ],
)
def test_an_origin_that_is_not_the_host_is_refused(origin, host):
    """The port must be equal as well, and a request without a Host has no valid origin."""
    assert "Origin" in denial(scope(headers=[("origin", origin)], host=host))


def test_the_peers_address_is_checked_first():
    """A remote client learns nothing about the other rules."""
    request = scope(
        ("8.8.8.8", 1), [("via", "x"), ("sec-fetch-site", "cross-site")], host="evil.example"
    )
    assert "8.8.8.8 is not one" in denial(request)


def test_a_reason_contains_no_value_of_a_header():
    """Reasons are logged and shown; headers may hold secrets."""
    for headers in ([("via", "s3cret")], [("origin", "http://s3cret")], [("host", "s3cret")]):
        assert "s3cret" not in denial(scope(headers=headers))
