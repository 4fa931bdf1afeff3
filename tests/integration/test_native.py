"""The native engines in a real server charge CPU and memory to functions and labels."""

from __future__ import annotations

import contextlib
import functools
import re
import threading

import pytest

from asgi_pprof.native.core import native
from tests import apps, official
from tests.gotool import go_pprof
from tests.integration.native_apps import FREQUENT
from tests.integration.test_profiles import samples
from tests.servers import ask, serve, serve_process, until

needs_native = pytest.mark.skipif(not native, reason="needs the C core")
pytestmark = pytest.mark.server

ROUTES = {
    "/in-coroutine": {},
    "/in-def": {},
    "/in-task": {},
    "/in-to-thread": {},
    "/in-copied-context": {},
    "/in-task-that-lasts": {},
    "/with-own-labels": {"tenant": "tenant-1"},
}


@pytest.fixture(scope="module")
def servers():
    """The service whose memory is sampled often, by kind of loop."""
    with contextlib.ExitStack() as stack:

        @functools.cache
        def server(loop):
            return stack.enter_context(
                serve_process("tests.integration.native_apps:frequent", loop=loop)
            )

        yield server


@pytest.fixture
def service(servers, loop_name):
    return servers(loop_name)


@pytest.fixture
def any_service(servers):
    return servers("asyncio")


def comments(message):
    return [message.string_table[each] for each in message.comment]


def values_of(message, function, index):
    """Return [(value, labels)] of samples with a function on the stack."""
    return [
        (values[index], {key: value for key, value in labels.items() if key != "bytes"})
        for stack, values, labels in samples(message)
        if any(name.endswith(f".{function}") for name in stack)
    ]


def work_of(route):
    """Return the name of the function that works for a route."""
    return f"work_{route[1:].replace('-', '_')}"


def labels_of(route):
    return {"method": "GET", "route": f"{route}/{{number}}", **ROUTES[route]}


@needs_native
@pytest.mark.oldest_and_newest
def test_cpu_is_charged_under_the_labels_of_its_request(service):
    """Requests of all routes run at once; each route's work has its labels in any thread."""
    for seconds in (3, 9, 27):  # a busy machine needs the longer profiles
        with contextlib.ExitStack() as load:
            for route in ROUTES:
                load.enter_context(service.load(f"{route}/1", clients=1))
            message = official.parse(service.get(f"profile?seconds={seconds}&hz=500").body)
        service.visit("/rest")
        found = {route: values_of(message, work_of(route), 1) for route in ROUTES}
        if all(sum(cpu for cpu, _ in of_route) > 0.1e9 for of_route in found.values()):
            break
    for route, of_route in found.items():
        total = sum(cpu for cpu, _ in of_route)
        assert total > 0.1e9, route
        own = sum(cpu for cpu, labels in of_route if labels == labels_of(route))
        assert own > 0.95 * total, route
    assert comments(message)[0] == "engine: native, every thread at 500 Hz of its CPU time"
    # New threads are sampled only after some milliseconds.
    burnt = sum(cpu for cpu, _ in values_of(message, "burn", 1))
    unseen = sum(values[1] for stack, values, _ in samples(message) if "not sampled" in stack[0])
    assert unseen < 0.3 * burnt


@needs_native
@pytest.mark.oldest_and_newest
def test_memory_is_charged_under_the_labels_of_its_request(service):
    """The labels stay after the request has ended, and tracemalloc is off."""
    service.visit("/forget")
    for route in ROUTES:
        for _ in range(10):
            service.visit(f"{route}/1")
    service.visit("/rest")

    def live():
        message = official.parse(service.get("heap").body)
        found = {route: values_of(message, work_of(route), 3) for route in ROUTES}
        return {
            route: [(size, labels) for size, labels in blocks if size]
            for route, blocks in found.items()
        }

    for route, found in live().items():
        assert 0.7 < sum(size for size, _ in found) / (500 * 10_033) < 1.4, route
        assert {tuple(labels.items()) for _, labels in found} == {tuple(labels_of(route).items())}
    assert service.state()["tracing"] is False
    service.visit("/forget")
    for route, found in live().items():
        # Our own records of labels are made there as well, some hundred bytes in all, of
        # which a sample may stand for a few KB.
        assert sum(size for size, _ in found) < 0.01 * 500 * 10_033, route


@needs_native
def test_a_delta_of_the_heap_needs_no_tracing(any_service):
    """The delta is the memory kept in the window, and tracemalloc stays off."""
    any_service.visit("/in-coroutine/1")
    traced = []

    def work():
        for _ in range(10):
            any_service.visit("/with-own-labels/1")
            traced.append(any_service.state()["tracing"])

    answer = any_service.window("heap", work, undo=lambda: any_service.visit("/forget"))
    message = official.parse(answer.body)
    grown = sum(size for size, _ in values_of(message, "work_with_own_labels", 3))
    assert grown == pytest.approx(500 * 10_033, rel=0.3)
    assert not any(traced)
    assert comments(message)[0].startswith(f"engine: native, one sample in {FREQUENT} bytes")


@needs_native
def test_counters_of_the_text_are_exact_and_rise(any_service):
    """Mallocs, Frees and TotalAlloc count every block since the sampler began."""

    def read():
        text = any_service.get("heap?debug=1").text
        return {
            name: int(re.search(rf"^# {name} = (\d+)$", text, re.MULTILINE)[1])
            for name in ("Mallocs", "TotalAlloc", "Frees")
        }

    before = read()
    for _ in range(20):
        any_service.visit("/in-def/1")
    between = read()
    assert between["Mallocs"] - before["Mallocs"] >= 20 * 50
    assert between["TotalAlloc"] - before["TotalAlloc"] >= 20 * 50 * 10_033
    assert between["Frees"] >= before["Frees"]
    any_service.visit("/forget")
    assert read()["Frees"] - between["Frees"] >= 20 * 50


@needs_native
@pytest.mark.parametrize(("name", "column"), [("heap", 1), ("allocs", 3)])
def test_the_largest_memory_comes_first_in_text(any_service, name, column):
    """Each record has an estimate; heap is in the order of live bytes, allocs of allocated ones."""
    for _ in range(10):
        any_service.visit("/in-coroutine/1")
    text = any_service.get(f"{name}?debug=1").text
    any_service.visit("/forget")
    values = re.compile(r"^# estimate: (\d+): (\d+) \[(\d+): (\d+)\]$", re.MULTILINE)
    total, *estimates = [[int(value) for value in row] for row in values.findall(text)]
    assert len(estimates) == text.count(" @ 0x") > 10
    assert [sum(values) for values in zip(*estimates, strict=True)] == total
    largest = [row[column] for row in estimates]
    assert largest == sorted(largest, reverse=True)


@needs_native
@pytest.mark.go
def test_go_tool_reads_the_same_from_text_and_protobuf(any_service, tmp_path):
    """pprof scales the text's raw samples; we scale the protobuf's."""
    for _ in range(10):
        any_service.visit("/in-coroutine/1")

    def live_bytes(query):
        raw = go_pprof(tmp_path, "-raw", f"{any_service.url}/{query}").text
        rows = re.findall(r"^ +\d+ +\d+ +\d+ +(\d+): ", raw, re.MULTILINE)
        return sum(map(int, rows))

    for _ in range(20):  # live memory grows with each of the first profiles
        text, protobuf = live_bytes("heap?debug=1"), live_bytes("heap")
        if text == pytest.approx(protobuf, rel=0.05):
            break
    any_service.visit("/forget")
    assert text > 500 * 8000
    assert text == pytest.approx(protobuf, rel=0.05)


@pytest.mark.parametrize("query", ["hz=0", "hz=1001", "hz=abc", "hz=-5", "hz=1.5", "hz=%20"])
def test_invalid_frequencies_are_refused(any_shop, query):
    """The answer is 400 with the reason, and no profile starts."""
    answer = any_shop.get(f"profile?seconds=1&{query}")
    assert answer.status == 400
    assert answer.text == 'invalid value for "hz" - must be an integer from 1 to 1000\n'
    assert answer.headers["x-go-pprof"] == "1"
    assert not any_shop.is_sampling()


@pytest.mark.parametrize("hz", [1, 10, 250, 1000])
def test_the_frequency_is_the_requested_one(any_shop, hz):
    """The period and the comment have it, with either engine."""
    with any_shop.load("/burn/50", clients=1):
        message = official.parse(any_shop.get(f"profile?seconds=1&hz={hz}").body)
    assert message.period == 10**9 // hz
    assert f" at {hz} Hz of " in comments(message)[0]


@needs_native
def test_a_loop_outside_the_main_thread_can_be_profiled(loop_name):
    """The native engine does not need Python's signal handling."""
    with serve(apps.app, loop=loop_name) as port:
        answers = []
        reader = threading.Thread(
            target=lambda: answers.append(ask(port, "/debug/pprof/profile?seconds=1"))
        )
        reader.start()
        while reader.is_alive():
            ask(port, "/burn/100")
        reader.join()
    assert answers[0].status == 200
    message = official.parse(answers[0].body)
    assert comments(message)[0].startswith("engine: native")
    assert sum(cpu for cpu, _ in values_of(message, "burn_cpu_a", 1)) > 0


@needs_native
def test_worker_threads_have_stacks(shop):
    """The CPU time of a `def` endpoint is charged to its function."""
    with shop.load("/thread/x"):
        message = official.parse(shop.get("profile?seconds=2").body)
    found = values_of(message, "burn_in_a_thread", 1)
    total = sum(values[1] for _, values, _ in samples(message))
    assert sum(cpu for cpu, _ in found) > total / 3
    assert {labels.get("route") for _, labels in found} == {"/thread/{kind}"}


def test_the_index_names_the_engines_or_says_why_they_are_off(any_shop, pure_shop):
    """It names the native engines. With ASGI_PPROF_NATIVE=0 it gives the reason."""
    if native:
        assert any_shop.get("").text.count("engine: native") == 3  # allocs, heap, profile
    page = pure_shop.get("").text
    assert "engine: signal" in page
    assert page.count("switched off by ASGI_PPROF_NATIVE=0") == 3


@needs_native
def test_the_index_says_that_the_rate_is_0():
    """A delta then uses tracemalloc, as without the native engine."""
    with serve_process("tests.integration.native_apps:never") as server:
        page = server.get("").text
        assert page.count("memory_profile_rate is 0") == 2
        assert "engine: native" in page  # the CPU engine
        assert server.state()["heap rate"] == 0
        assert server.get("heap?seconds=1").status == 200


@needs_native
@pytest.mark.oldest_and_newest
def test_every_block_of_a_service_can_be_sampled(loop_name):
    """At rate 1 the numbers are exact."""
    with serve_process("tests.integration.native_apps:every_block", loop=loop_name) as server:
        with server.load("/with-own-labels/1"):
            assert server.get("profile?seconds=1&hz=1000").status == 200
        server.visit("/forget")
        for _ in range(3):
            server.visit("/in-def/1")
        message = official.parse(server.get("heap?gc=1").body)
        blocks = [
            (values[2:], labels)
            for stack, values, labels in samples(message)
            if ".keep_blocks" in stack[0] and labels["bytes"] == 10_240 and values[2]
        ]
        assert blocks == [
            ([150, 150 * 10_033], {"method": "GET", "route": "/in-def/{number}", "bytes": 10_240})
        ]
        assert message.period == 1


@needs_native
def test_shutdown_removes_the_hooks(loop_name):
    """The server ends without messages while it samples and works; see serve_process."""
    server = serve_process("tests.integration.native_apps:every_block", loop=loop_name)
    with server:
        assert server.state()["heap rate"] == 1
        answers = []
        reader = threading.Thread(target=lambda: answers.append(server.get("profile?seconds=1")))
        reader.start()
        until(server.is_sampling)
        for route in ROUTES:
            server.visit(f"{route}/1")
        reader.join()
        assert answers[0].status == 200
    assert server.process.returncode in (0, -15)
