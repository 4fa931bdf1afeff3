"""`go tool pprof` reads all profiles with names, files and lines, and without warnings."""

from __future__ import annotations

import re
import threading

import pytest

from asgi_pprof.native.core import native
from tests import apps
from tests.gotool import flat, go_pprof
from tests.servers import ask, leaving_client, until

pytestmark = [pytest.mark.server, pytest.mark.go, pytest.mark.once]


def test_the_cpu_profile_names_the_function_that_burns(any_shop, tmp_path):
    """-top lists the function first, with the duration of the profile."""
    with any_shop.load("/burn/100"):
        report = go_pprof(tmp_path, "-top", f"{any_shop.url}/profile?seconds=2")
    assert "tests.apps.burn_cpu_a" in flat(report.text)
    first = next(iter(flat(report.text)))
    assert first == "tests.apps.burn_cpu_a"
    assert re.search(r"^Type: cpu$", report.text, re.MULTILINE)
    assert re.search(r"^Duration: [2-9]", report.text, re.MULTILINE)
    assert f"engine: {'native' if native else 'signal'}" in report.text


def test_hostport_and_seconds_are_enough(any_shop, tmp_path):
    """`go tool pprof -seconds 1 http://host:port` finds the CPU profile."""
    report = go_pprof(tmp_path, "-top", "-seconds", "1", f"http://127.0.0.1:{any_shop.port}")
    assert "Type: cpu" in report.text


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("heap", "inuse_space"),
        ("allocs", "alloc_space"),
        ("goroutine", "goroutine"),
        ("goroutineleak", "goroutineleak"),
        ("thread", "thread"),
        ("threadcreate", "threadcreate"),
        ("block", "delay"),
        ("mutex", "delay"),
        ("stall", "delay"),
        ("example.com/conns", "example.com/conns"),
    ],
)
def test_every_profile_is_read(any_shop, tmp_path, name, kind):
    """pprof reads it as a snapshot, as a delta with -seconds, and with -base."""
    # pprof names the file that it saves by the sample type, including slashes.
    (tmp_path / "pprof" / "pprof.python.example.com").mkdir(parents=True)
    report = go_pprof(tmp_path, "-top", f"{any_shop.url}/{name}")
    assert f"Type: {kind}" in report.text
    raw = go_pprof(tmp_path, "-raw", f"{any_shop.url}/{name}")
    assert re.search(r"^1: .*\[FN\]?|^1: ", raw.text.partition("Mappings")[2], re.MULTILINE)
    if name != "example.com/conns":
        delta = go_pprof(tmp_path, "-raw", "-seconds", "1", f"{any_shop.url}/{name}")
        assert re.search(r"^Duration: [1-9]", delta.text, re.MULTILINE)
    saved = tmp_path / "before.pb.gz"
    saved.write_bytes(any_shop.get(name).body)
    go_pprof(tmp_path, "-top", "-base", saved, f"{any_shop.url}/{name}")


@pytest.mark.parametrize(
    "name",
    "heap allocs goroutine goroutineleak thread threadcreate block mutex stall".split(),
)
def test_text_profiles_are_read_and_symbolized(any_shop, tmp_path, name):
    """`go tool pprof URL?debug=1` works through our symbol endpoint."""
    report = go_pprof(tmp_path, "-top", f"{any_shop.url}/{name}?debug=1")
    if name in ("goroutine", "thread"):
        assert "asgi_pprof.app.PprofApp.answer" in report.text


def test_the_text_of_a_cpu_profile_is_read(any_shop, tmp_path):
    """Its stacks are samples/count, with names from our symbol endpoint."""
    with any_shop.load("/burn/100"):
        report = go_pprof(tmp_path, "-top", f"{any_shop.url}/profile?seconds=2&debug=1")
    assert "Type: samples" in report.text
    assert next(iter(flat(report.text))) == "tests.apps.burn_cpu_a"


def test_goroutine_profile_has_files_and_lines(any_shop, tmp_path):
    """-raw shows the line at which a task waits, with function and file."""
    with leaving_client(any_shop.port, "/wait/7"):
        until(lambda: "waiting-7" in any_shop.get("goroutine?debug=1").text)
        raw = go_pprof(tmp_path, "-raw", f"{any_shop.url}/goroutine").text
    any_shop.visit("/release")
    line = _line_of("await released.wait()")
    assert re.search(
        rf"tests\.apps\.wait_for_release {re.escape(apps.__file__)}:{line}:\d+ s=\d+", raw
    )
    assert re.search(r"asyncio\.locks\.Event\.wait /.*locks\.py:\d+", raw)
    assert "tenant:[waiting-7]" in raw
    assert "state:[Event.wait]" in raw


def test_goroutine_tags_say_what_tasks_wait_for(any_shop, tmp_path):
    """-tags counts tasks by what they wait for, and -tagfocus keeps some of them."""
    with leaving_client(any_shop.port, "/wait/8"), leaving_client(any_shop.port, "/wait/9"):
        until(lambda: any_shop.get("goroutine?debug=1").text.count("wait_for_release") == 2)
        saved = tmp_path / "goroutine.pb.gz"
        saved.write_bytes(any_shop.get("goroutine").body)
    any_shop.visit("/release")
    tags = go_pprof(tmp_path, "-tags", saved).text
    assert re.search(r"state: Total \d+", tags)
    assert re.search(r"\b2 \(.*\): Event\.wait", tags)
    focused = go_pprof(tmp_path, "-top", "-cum", "-tagfocus", "state=Event.wait", saved).text
    assert "tests.apps.wait_for_release" in focused
    assert "asgi_pprof.app.PprofApp.answer" not in focused


def test_contention_of_a_window_has_waiters_and_holders(any_shop, tmp_path):
    """While block and mutex are off, ?seconds=N records only for that long."""
    with any_shop.load("/queue", clients=4):
        waited = go_pprof(tmp_path, "-top", "-cum", f"{any_shop.url}/block?seconds=1").text
        held = go_pprof(tmp_path, "-top", "-cum", f"{any_shop.url}/mutex?seconds=1").text
    assert "Type: delay" in waited
    assert "asyncio.locks.Lock.acquire" in waited
    assert "tests.apps.queue_on_a_lock" in waited
    assert "asyncio.locks.Lock.release" in held
    assert "tests.apps.queue_on_a_lock" in held
    assert "switched on for this request only" in waited
    page = any_shop.get("").text
    assert len(re.findall(r"(?:block|mutex): </div>.*\(off: ", page)) == 2
    text = go_pprof(tmp_path, "-top", "-cum", f"{any_shop.url}/block?debug=1").text
    assert "tests.apps.queue_on_a_lock" in text  # what was recorded stays


def test_labels_reach_tags_and_focus(any_shop, tmp_path):
    """-tags lists method, route and tenant; -tagfocus keeps one tenant's samples."""
    with any_shop.load("/tenant/acme", clients=1), any_shop.load("/v1/items/5", clients=1):
        saved = tmp_path / "cpu.pb.gz"
        saved.write_bytes(any_shop.get("profile?seconds=2").body)
    tags = go_pprof(tmp_path, "-tags", saved).text
    assert re.search(r"route: Total", tags)
    assert "/tenant/{name}" in tags
    assert "/v1/items/{item_id}" in tags
    assert "/v1/items/5" not in tags
    assert re.search(r"tenant: Total.*\n.*: acme", tags)
    focused = go_pprof(tmp_path, "-top", "-cum", "-tagfocus", "tenant=acme", saved).text
    assert "tests.apps.burn_for_a_tenant" in focused
    assert "tests.apps.item" not in focused
    by_route = go_pprof(tmp_path, "-top", "-cum", "-tagfocus", "route=/v1/items", saved).text
    assert "tests.apps.item" in by_route


def test_a_heap_window_shows_the_memory_that_is_kept(pure_shop, tmp_path):
    """heap?seconds=N shows ten megabytes that were kept in the window; tracing ends with it."""
    traced = []

    def keep():
        traced.append(pure_shop.state()["tracing"])
        pure_shop.visit("/keep")

    saved = tmp_path / "heap.pb.gz"
    answer = pure_shop.window("heap", keep, undo=lambda: pure_shop.visit("/forget"))
    saved.write_bytes(answer.body)
    assert traced[-1]
    assert not pure_shop.state()["tracing"]
    top = go_pprof(tmp_path, "-top", "-unit=MB", saved).text
    assert flat(top)["tests.apps.keep_ten_megabytes"] == "10MB"
    line = _line_of("kept.append(bytearray(1024 * 1024))")
    raw = go_pprof(tmp_path, "-raw", saved).text
    assert re.search(rf"tests\.apps\.keep_ten_megabytes {re.escape(apps.__file__)}:{line}:", raw)
    allocs = go_pprof(tmp_path, "-top", "-sample_index=alloc_space", "-unit=MB", saved).text
    assert flat(allocs)["tests.apps.keep_ten_megabytes"] == "10MB"
    assert "lower bounds" in top


def test_errors_are_shown_to_the_user(any_shop, tmp_path):
    """go tool pprof prints the server's message to its user."""
    report = go_pprof(tmp_path, "-top", f"{any_shop.url}/nosuch", fails=True)
    assert "404 Not Found - Unknown profile" in report.messages
    report = go_pprof(tmp_path, "-top", f"{any_shop.url}/heap?seconds=1&debug=2", fails=True)
    assert "seconds and debug params are incompatible" in report.messages


def test_a_second_cpu_profile_is_refused_in_gos_words(any_shop):
    """It fails at once, and the first profile goes on."""
    first = []
    reader = threading.Thread(target=lambda: first.append(any_shop.get("profile?seconds=2")))
    reader.start()
    until(any_shop.is_sampling)
    second = ask(any_shop.port, "/debug/pprof/profile?seconds=1")
    reader.join()
    assert second.status == 500
    assert second.text == "Could not enable CPU profiling: cpu profiling already in use\n"
    assert second.headers["x-go-pprof"] == "1"
    assert first[0].status == 200


def _line_of(text: str) -> int:
    with open(apps.__file__) as source:
        return next(number for number, line in enumerate(source, 1) if text in line)
