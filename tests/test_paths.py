"""A request's path says whether it is for a profile, and for which one."""

from urllib.parse import unquote, urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asgi_pprof.paths import Target, locate

pytestmark = pytest.mark.once

PREFIX = "/debug/pprof"


def request(target, root_path="", raw=True):
    """Return the scope that a server makes of a request target, with decoded and raw path."""
    path, _, query = target.partition("?")
    return {
        "type": "http",
        "path": unquote(path),
        "raw_path": path.encode() if raw else None,
        "root_path": root_path,
        "query_string": query.encode(),
    }


def named(name):
    return Target(name)


def redirected(location):
    """Return what `check` takes for a target with that redirect and any name."""
    return location


def check(scope, prefix, expected):
    target = locate(scope, prefix)
    if isinstance(expected, str):
        assert target is not None
        assert target.redirect == expected
    else:
        assert target == expected


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        # the index
        ("/debug/pprof/", named("")),
        ("/debug/pprof/?debug=1", named("")),
        ("/debug/pprof", redirected("/debug/pprof/")),
        # names
        ("/debug/pprof/heap", named("heap")),
        ("/debug/pprof/heap?seconds=1", named("heap")),
        ("/debug/pprof/HEAP", named("HEAP")),
        ("/debug/pprof/example.com/conns", named("example.com/conns")),
        ("/debug/pprof/db:pool", named("db:pool")),
        ("/debug/pprof/...", named("...")),
        ("/debug/pprof/.hidden", named(".hidden")),
        # a trailing slash is part of the name
        ("/debug/pprof/heap/", named("heap/")),
        ("/debug/pprof/example.com/conns/", named("example.com/conns/")),
        # escapes are decoded first, once
        ("/debug/pprof/%68eap", named("heap")),
        ("/%64ebug/pprof/heap", named("heap")),
        ("/debug/pprof/a%20b", named("a b")),
        ("/debug/pprof/a%25b", named("a%b")),
        ("/debug/pprof/a%2Bb", named("a+b")),
        ("/debug/pprof/a+b", named("a+b")),
        ("/debug/pprof/caf%C3%A9", named("café")),
        ("/debug/pprof/a%3Fb", named("a?b")),
        # an encoded slash is not a separator, in either case
        ("/debug/pprof/example.com%2Fconns", named("example.com/conns")),
        ("/debug/pprof/example.com%2fconns", named("example.com/conns")),
        ("/debug/pprof/example.com%2f%68eap%2F", named("example.com/heap/")),
        ("/debug/pprof/%2fheap", named("/heap")),
        ("/debug/pprof/x%2f..%2fheap", named("x/../heap")),
        ("/debug%2fpprof/heap", None),
        ("/debug/pprof%2fheap", None),
        ("/debug%2Fpprof%2F", None),
        # escapes are decoded once only
        ("/debug/pprof/a%252Fb", named("a%2Fb")),
        ("/debug/pprof/a%252fb", named("a%2fb")),
        ("/debug/pprof/a%252Fb%2Fc", named("a%2Fb/c")),
        # a path that is not clean is redirected to the clean one
        ("/debug/pprof//heap", redirected("/debug/pprof/heap")),
        ("/debug/pprof//", redirected("/debug/pprof/")),
        ("//debug/pprof/heap", redirected("/debug/pprof/heap")),
        ("///debug//pprof///heap", redirected("/debug/pprof/heap")),
        ("/debug/pprof/./heap", redirected("/debug/pprof/heap")),
        ("/debug/pprof/x/../heap", redirected("/debug/pprof/heap")),
        ("/debug/pprof/../pprof/heap", redirected("/debug/pprof/heap")),
        ("/x/../debug/pprof/heap", redirected("/debug/pprof/heap")),
        ("/../debug/pprof/heap", redirected("/debug/pprof/heap")),
        ("/debug/pprof/.", redirected("/debug/pprof/")),
        ("/debug/pprof/x/..", redirected("/debug/pprof/")),
        ("/debug/pprof/x/../", redirected("/debug/pprof/")),
        ("/debug/pprof//heap/", redirected("/debug/pprof/heap/")),
        ("/debug/pprof//example.com%2fconns", redirected("/debug/pprof/example.com%2Fconns")),
        ("/debug/pprof//caf%C3%A9", redirected("/debug/pprof/caf%C3%A9")),
        ("/debug/pprof//a%25b", redirected("/debug/pprof/a%25b")),
        ("/debug/pprof//a%3Fb", redirected("/debug/pprof/a%3Fb")),
        ("/debug/pprof//a%23b", redirected("/debug/pprof/a%23b")),
        # the query is kept
        ("/debug/pprof?debug=1", redirected("/debug/pprof/?debug=1")),
        ("/debug/pprof//heap?a=%2F&a;b=%zz", redirected("/debug/pprof/heap?a=%2F&a;b=%zz")),
        # the Location never names another host
        ("//evil.example/../debug/pprof", redirected("/debug/pprof/")),
        ("//evil.example//../debug/pprof/heap", redirected("/debug/pprof/heap")),
        # paths for the application
        ("/", None),
        ("", None),
        ("/debug", None),
        ("/debug/", None),
        ("/debug/pprofile", None),
        ("/debug/pprof2/heap", None),
        ("/DEBUG/pprof/heap", None),
        ("/api/debug/pprof/heap", None),
        ("/debug/pprof/..", None),
        ("/debug/pprof/../heap", None),
        ("/debug/pprof/../../debug", None),
        ("*", None),
    ],
)
def test_paths_are_taken_as_gos_mux_takes_them(target, expected):
    """Decoded and clean paths below the prefix are ours, all others the application's."""
    check(request(target), PREFIX, expected)


@pytest.mark.parametrize(
    ("target", "root_path", "expected"),
    [
        # the server or a mount has left the root path in the path
        ("/api/debug/pprof/heap", "/api", named("heap")),
        ("/api/debug/pprof", "/api", redirected("/api/debug/pprof/")),
        ("/api/debug/pprof//heap?debug=1", "/api", redirected("/api/debug/pprof/heap?debug=1")),
        ("/api/debug/pprof/heap", "/api/", named("heap")),
        ("/a%70i/debug/pprof/heap", "/api", named("heap")),
        ("/api/debug/pprof/a%2fb", "/api", named("a/b")),
        # a proxy has removed the root path; the client still needs it
        ("/debug/pprof/heap", "/api", named("heap")),
        ("/debug/pprof", "/api", redirected("/api/debug/pprof/")),
        ("/debug/pprof//heap", "/api", redirected("/api/debug/pprof/heap")),
        ("/debug/pprof//heap", "/my api", redirected("/my%20api/debug/pprof/heap")),
        # the path does not start with the root path
        ("/apiary/debug/pprof/heap", "/api", None),
        ("/debug/pprof/debug/pprof/heap", "/debug/pprof", named("heap")),
        ("/debug/pprof/heap", "/debug", None),  # the application's path is /pprof/heap
        # the Location never names another host, whatever the root path is
        ("/debug/pprof", "//evil.example", redirected("/evil.example/debug/pprof/")),
        ("/debug/pprof", "/\\evil.example", redirected("/%5Cevil.example/debug/pprof/")),
    ],
)
def test_the_root_path_may_or_may_not_be_in_the_path(target, root_path, expected):
    """Servers, proxies and mounts differ; a redirect always includes the root path."""
    check(request(target, root_path), PREFIX, expected)


@pytest.mark.parametrize(
    ("target", "root_path", "expected"),
    [
        ("/debug/pprof/heap", "/debug/pprof", named("heap")),
        ("/debug/pprof/", "/debug/pprof", named("")),
        ("/debug/pprof", "/debug/pprof", redirected("/debug/pprof/")),
        ("/debug/pprof?debug=1", "/debug/pprof", redirected("/debug/pprof/?debug=1")),
        ("/debug/pprof//heap", "/debug/pprof", redirected("/debug/pprof/heap")),
        ("/debug/pprof//", "/debug/pprof", redirected("/debug/pprof/")),
        ("/debug/pprof/heap/", "/debug/pprof", named("heap/")),
        ("/debug/pprof/example.com%2fconns", "/debug/pprof", named("example.com/conns")),
        ("/tenants/a%2fb/pprof/heap", "/tenants/a/b/pprof", named("heap")),
        # at the top of a server
        ("/heap", "", named("heap")),
        ("/", "", named("")),
        ("", "", redirected("/")),
        ("//evil.example/heap", "", redirected("/evil.example/heap")),
        ("//evil.example", "", redirected("/evil.example")),
        ("///", "", redirected("/")),
    ],
)
def test_a_mounted_app_has_no_prefix_of_its_own(target, root_path, expected):
    """With the prefix "" all paths below the root path are ours."""
    check(request(target, root_path), "", expected)


def test_a_server_without_raw_paths_is_served_all_the_same():
    """`raw_path` is optional in ASGI; without it the decoded path is used."""
    scope = request("/debug/pprof/%68eap", raw=False)
    assert locate(scope, PREFIX) == named("heap")
    del scope["raw_path"], scope["root_path"], scope["query_string"]
    assert locate(scope, PREFIX) == named("heap")
    scope["path"] = "/debug/pprof"
    check(scope, PREFIX, redirected("/debug/pprof/"))


def test_a_path_that_a_middleware_has_rewritten_counts_more_than_the_raw_one():
    """Middlewares that rewrite paths leave `raw_path` unchanged."""
    scope = request("/v2/debug/pprof/a%2fb")
    scope["path"] = "/debug/pprof/heap"
    assert locate(scope, PREFIX) == named("heap")


def test_a_raw_path_with_a_query_is_understood():
    """Some test clients include the query in `raw_path`."""
    scope = request("/debug/pprof/a%2fb")
    scope["raw_path"] += b"?x=%2f"
    assert locate(scope, PREFIX) == named("a/b")


segments = st.sampled_from(
    ["", ".", "..", "debug", "pprof", "heap", "evil.example", "%2f", "%2F", "a%2fb", "%25", "%252f"]
    + ["a%25b", "%3f", "%23", "%5c", "%2e%2e", "caf%c3%a9", "%ff", "%0d%0a"]
)
targets = st.lists(segments, max_size=6).map(lambda parts: "/" + "/".join(parts))


@given(
    targets, st.sampled_from(["", "/api", "//evil.example", "/a b"]), st.sampled_from(["", PREFIX])
)
def test_a_redirect_stays_on_this_host_and_below_the_root_path(target, root_path, prefix):
    """The Location is a path, never `//host`, and cannot end the header line."""
    found = locate(request(target, root_path), prefix)
    if found and found.redirect:
        parts = urlsplit(found.redirect)
        assert (parts.scheme, parts.netloc, parts.query, parts.fragment) == ("", "", "", "")
        assert found.redirect.startswith("/")
        assert not found.redirect.startswith("//")
        assert found.redirect.isascii()
        assert found.redirect.isprintable()
        assert "\\" not in found.redirect


@given(st.lists(segments, max_size=4).map(lambda parts: "/".join(["/debug/pprof", *parts])))
def test_a_redirect_leads_to_an_answer_under_the_same_name(target):
    """One redirect is enough, and leads to the requested name."""
    found = locate(request(target), PREFIX)
    if found and found.redirect:
        answered = locate(request(found.redirect), PREFIX)
        assert answered is not None
        assert answered.redirect == ""
        assert answered.name == found.name.replace("%2F", "/")
