"""Profiles of a real service's CPU, heap, threads and tasks are true and end cleanly."""

from __future__ import annotations

import contextlib
import re
import socket
import threading
import time

import pytest

from asgi_pprof.collectors.cpu import native_engine as cpu_native
from tests import apps, official
from tests.programs import run_program
from tests.servers import ask, leaving_client, serve, serve_process, until

pytestmark = pytest.mark.server

IDLE_TIMER = [0.0, 0.0]


def samples(message):
    """Return [(function names leaf first, values, labels)] of an official Profile message."""
    strings = message.string_table
    functions = {each.id: strings[each.name] for each in message.function}
    locations = {each.id: functions[each.line[0].function_id] for each in message.location}
    return [
        (
            [locations[number] for number in sample.location_id],
            list(sample.value),
            {strings[each.key]: strings[each.str] or each.num for each in sample.label},
        )
        for sample in message.sample
    ]


def test_a_client_that_leaves_stops_the_sampler_at_once(shop):
    """Timer and handler are restored long before the 30 s end; the next profile can start."""
    before = shop.state()
    with leaving_client(shop.port, "/debug/pprof/profile"):
        until(lambda: shop.is_sampling())
    until(lambda: not shop.is_sampling(), seconds=5)
    until(lambda: shop.state() == before, seconds=5)
    assert shop.get("profile?seconds=1").status == 200


def test_a_client_that_leaves_a_heap_window_stops_tracing(pure_shop):
    """tracemalloc is switched off when the client of the delta has left."""
    with leaving_client(pure_shop.port, "/debug/pprof/heap?seconds=30"):
        until(lambda: pure_shop.state()["tracing"])
    until(lambda: not pure_shop.state()["tracing"], seconds=5)


def test_overlapping_heap_windows_share_the_tracing(pure_shop):
    """The end of the first window does not stop tracing for the second."""
    answers = []

    def window(seconds):
        answers.append(pure_shop.get(f"heap?seconds={seconds}"))

    for seconds in (3, 12):  # a busy machine needs the longer window
        long = threading.Thread(target=window, args=(seconds,))
        long.start()
        until(lambda: pure_shop.state()["tracing"])
        assert pure_shop.get("allocs?seconds=1").status == 200
        still_tracing = pure_shop.state()["tracing"]
        pure_shop.visit("/keep")
        long.join()
        pure_shop.visit("/forget")
        if still_tracing:
            break
    assert still_tracing
    assert not pure_shop.state()["tracing"]
    kept = [
        values
        for stack, values, _ in samples(official.parse(answers[-1].body))
        if stack[0] == "tests.apps.keep_ten_megabytes"
    ]
    assert sum(values[3] for values in kept) >= 10 * 2**20


def test_the_cpu_time_of_worker_threads_is_counted_without_stacks(pure_shop):
    """The CPU of `def` endpoints is counted in full, under a pseudo-frame for each thread."""
    with pure_shop.load("/thread/x"):
        message = official.parse(pure_shop.get("profile?seconds=3").body)
    threads = [
        (stack, values, labels)
        for stack, values, labels in samples(message)
        if "AnyIO worker thread" in stack[0]
    ]
    assert threads
    assert all("stack not sampled by the signal engine" in stack[0] for stack, _, _ in threads)
    assert all(labels["thread_id"] > 0 for _, _, labels in threads)
    total = sum(values[1] for _, values, _ in samples(message))
    assert sum(values[1] for _, values, _ in threads) > total / 3


def test_cpu_samples_have_method_and_route(shop):
    """The route label is the template; the raw path does not appear."""
    with shop.load("/v1/items/12345"):
        message = official.parse(shop.get("profile?seconds=2").body)
    burning = [labels for stack, _, labels in samples(message) if "tests.apps.item" in stack]
    assert burning
    assert all(labels == {"method": "GET", "route": "/v1/items/{item_id}"} for labels in burning)
    assert "12345" not in str(list(message.string_table))


def test_the_cpu_profile_has_gos_types_and_times(any_shop):
    """Types, period, start time and duration are those of spec 2.3."""
    before = time.time_ns()
    message = official.parse(any_shop.get("profile?seconds=1").body)
    strings = message.string_table
    types = [(strings[each.type], strings[each.unit]) for each in message.sample_type]
    assert types == [("samples", "count"), ("cpu", "nanoseconds")]
    assert (strings[message.period_type.type], message.period) == ("cpu", 10_000_000)
    assert before <= message.time_nanos <= time.time_ns() - 10**9
    assert 10**9 <= message.duration_nanos < 5 * 10**9


def test_deep_recursion_is_cut_and_marked(any_shop):
    """10,000 frames are sampled without harm: 128 are kept, and the cut is marked."""
    with any_shop.load("/recurse/10000", clients=1):
        message = official.parse(any_shop.get("profile?seconds=2").body)
    deep = [
        stack
        for stack, _, _ in samples(message)
        if any("recurse" in name for name in stack[:-1]) and "truncated" in stack[-1]
    ]
    assert deep
    assert all(len(stack) == 129 for stack in deep)
    assert any_shop.visit("/quick").status == 200


def test_a_blocked_loop_with_a_wakeup_descriptor_is_profiled_quietly():
    """Signals during seconds of a blocked loop do not overflow asyncio's signal pipe."""
    app, env = "tests.integration.busy_apps:with_signal_handler", {"ASGI_PPROF_NATIVE": "0"}
    with serve_process(app, env=env) as server:
        state = server.state()
        assert state["wakeup"] != -1
        answers = []
        profile = "profile?seconds=2&hz=1000"
        reader = threading.Thread(target=lambda: answers.append(server.get(profile)))
        reader.start()
        until(lambda: server.is_sampling())
        # A signal at each tick of the kernel, 4 ms apart; the socket pair holds under 300.
        server.visit("/block/3")
        reader.join()
        assert answers[0].status == 200
        assert server.state()["wakeup"] == state["wakeup"]
        server.visit("/usr1")
        until(lambda: server.visit("/usr1-count").body == b"1")
    assert server.errors == ""


@pytest.mark.parametrize(
    ("app", "reason"),
    [
        ("with_own_handler", "the application handles SIGPROF"),
        ("with_own_timer", "the application uses ITIMER_PROF"),
    ],
)
def test_the_applications_own_use_of_sigprof_is_left_alone(app, reason):
    """The answer is 500 with the reason; the handler or timer is unchanged."""
    with serve_process(f"tests.integration.busy_apps:{app}") as server:
        before = server.state()
        answer = server.get("profile?seconds=1")
        assert answer.status == 500
        assert reason in answer.text
        assert server.state()["handler"] == before["handler"]
        assert (server.state()["timer"] == IDLE_TIMER) is (before["timer"] == IDLE_TIMER)


def test_without_a_main_thread_loop_the_signal_engine_says_so(loop_name, monkeypatch):
    """Where Python cannot handle signals the answer is 501 with the reason; the rest works."""
    monkeypatch.setattr(cpu_native, "why_not", lambda: "not here")
    with serve(apps.app, loop=loop_name) as port:
        answer = ask(port, "/debug/pprof/profile?seconds=1")
        assert answer.status == 501
        assert "main thread" in answer.text
        assert answer.headers["x-go-pprof"] == "1"
        assert ask(port, "/debug/pprof/goroutine").status == 200


def test_two_middlewares_share_one_process():
    """Apps with two prefixes share one process: only one CPU profile runs at a time."""
    with serve_process("tests.integration.busy_apps:two_of_everything") as server:
        outer = ask(server.port, "/debug/pprof/goroutine?debug=1")
        inner = ask(server.port, "/inner/debug/pprof/goroutine?debug=1")
        second = ask(server.port, "/other/goroutine?debug=1")
        assert [outer.status, inner.status, second.status] == [200, 200, 200]
        first = []
        reader = threading.Thread(
            target=lambda: first.append(ask(server.port, "/other/profile?seconds=2"))
        )
        reader.start()
        until(lambda: server.is_sampling())
        assert ask(server.port, "/inner/debug/pprof/profile?seconds=1").status == 500
        reader.join()
        assert first[0].status == 200


def test_a_forked_child_can_profile_itself():
    """A child forked during a profile has no timer, is not busy, and serves a profile."""
    with serve_process("tests.integration.busy_apps:forking") as server:
        answers = []
        reader = threading.Thread(target=lambda: answers.append(server.get("profile?seconds=3")))
        reader.start()
        until(lambda: server.is_sampling())
        assert server.visit("/fork").text == '"sampling False, profile 200"'
        reader.join()
        assert answers[0].status == 200


def test_the_thread_profile_has_every_thread(shop):
    """Each thread has one sample with its name; the loop runs in the main thread."""
    shop.visit("/thread/x")
    message = official.parse(shop.get("thread").body)
    names = [labels.get("thread") for _, _, labels in samples(message)]
    assert "MainThread" in names
    assert any(name and "AnyIO worker thread" in name for name in names)
    main = next(
        stack for stack, _, labels in samples(message) if labels.get("thread") == "MainThread"
    )
    assert main[-1].endswith("<module>") or "_run_module_as_main" in main[-1]


def test_threadcreate_has_the_code_that_started_a_thread(shop):
    """Threads from before have the unknown stack, and later ones their starter's."""
    shop.visit("/thread/x")
    found = samples(official.parse(shop.get("threadcreate").body))
    assert ["<unknown>"] in [stack for stack, _, _ in found]
    starters = [stack for stack, _, _ in found if stack != ["<unknown>"]]
    assert any("anyio" in stack[0] for stack in starters)


def test_goroutines_are_all_tasks_with_names_and_states(shop):
    """Each task has one sample; the current one is running, others wait under their labels."""
    with leaving_client(shop.port, "/wait/1"), leaving_client(shop.port, "/wait/2"):
        until(lambda: shop.get("goroutine?debug=1").text.count("wait_for_release") == 2)
        text = shop.get("goroutine?debug=2").text
        message = official.parse(shop.get("goroutine").body)
        count = shop.state()["tasks"]
    shop.visit("/release")
    assert sum(values[0] for _, values, _ in samples(message)) == count
    waiting = [
        labels for stack, _, labels in samples(message) if "tests.apps.wait_for_release" in stack
    ]
    assert {labels["tenant"] for labels in waiting} == {"waiting-1", "waiting-2"}
    assert {labels["route"] for labels in waiting} == {"/wait/{number}"}
    assert {labels["state"] for labels in waiting} == {"Event.wait"}
    assert re.match(r'goroutine \d+ \[running\] \{.*task: "Task-\d+"\}:\n', text)
    dump = text.split("\n\n")
    assert len(dump) == count
    head = re.compile(r"goroutine \d+ \[[\w. ]+(, \d+ minutes)?\] \{.*\}:\n")
    assert all(map(head.match, dump))
    assert sum("created by uvicorn." in stack for stack in dump) >= 2
    ids = [int(number) for number in re.findall(r"^goroutine (\d+) ", text, re.MULTILINE)]
    assert len(set(ids)) == count


def test_seconds_delta_of_goroutines_shows_the_new_ones(any_shop):
    """A task that starts within the window counts 1; others count nothing."""
    with contextlib.ExitStack() as clients:

        def wait():
            clients.enter_context(leaving_client(any_shop.port, "/wait/3"))
            until(lambda: "wait_for_release" in any_shop.get("goroutine?debug=1").text)

        answer = any_shop.window("goroutine", wait, undo=lambda: any_shop.visit("/release"))
    changes = {stack[0]: values for stack, values, _ in samples(official.parse(answer.body))}
    assert changes["asyncio.locks.Event.wait"] == [1]
    assert answer.headers["content-disposition"] == 'attachment; filename="goroutine-delta"'


def mem_stats(text):
    """Return the numbers of the trailer by name."""
    trailer = text[text.index("# runtime.MemStats\n") :]
    return {name: int(value) for name, value in re.findall(r"^# (\w+) = (\d+)$", trailer, re.M)}


@pytest.mark.parametrize("name", ["heap", "allocs"])
def test_memory_that_a_service_keeps_is_in_its_memstats(any_shop, name):
    """Both texts have them, as in Go; 20 MB are in use, and then they are idle or given back."""

    def read():
        found = mem_stats(any_shop.get(f"{name}?debug=1").text)
        assert found["Alloc"] == found["HeapAlloc"] <= found["HeapInuse"] <= found["HeapSys"]
        assert found["HeapInuse"] + found["HeapIdle"] == found["HeapSys"]
        assert found["HeapReleased"] <= found["HeapIdle"]
        parts = (size for part, size in found.items() if re.match("RSS.", part))
        assert sum(parts) == found["RSS"] <= found["Sys"] + found["RSSMappedFiles"]
        return found

    any_shop.visit("/forget")
    before = read()
    assert before["HeapAlloc"] > 10_000_000  # an idle service is not empty
    any_shop.visit("/keep")
    any_shop.visit("/keep")
    kept = read()["HeapAlloc"] - before["HeapAlloc"]
    assert kept == pytest.approx(20 * 2**20, rel=0.05)
    assert abs(gauges(any_shop)["python_memstats_heap_alloc_bytes"] - read()["HeapAlloc"]) < 2**20
    any_shop.visit("/forget")
    assert read()["HeapAlloc"] - before["HeapAlloc"] < kept / 10


def gauges(shop):
    """Return the figures of `stats`."""
    lines = shop.get("stats").text.splitlines()
    return {name: float(value) for name, value in (line.split() for line in lines)}


def test_resident_memory_in_stats_is_that_of_memstats(any_shop):
    """It has the same parts, and their sum is the whole."""
    found, now = gauges(any_shop), mem_stats(any_shop.get("heap?debug=1").text)
    parts = {
        name: value
        for name, value in found.items()
        if name.startswith("process_resident_memory_part_bytes")
    }
    total = found["process_resident_memory_bytes"]
    assert sum(parts.values()) == pytest.approx(total, abs=2 * 2**20)
    for part, field in (("python_heap", "RSSPythonHeap"), ("mapped_files", "RSSMappedFiles")):
        value = parts[f'process_resident_memory_part_bytes{{part="{part}"}}']
        assert value == pytest.approx(now[field], abs=4 * 2**20)


def test_asking_for_figures_of_memory_does_not_start_the_sampler():
    """With a rate of 0 it is off, and stays off; MemStats and stats have the heap all the same."""
    run_program(
        """
        import asyncio
        from asgi_pprof import PprofApp
        from asgi_pprof.native.core import native

        async def ask(path, query):
            sent = []
            async def send(message): sent.append(message.get("body", b""))
            async def receive(): await asyncio.Event().wait()
            scope = {"type": "http", "method": "GET", "path": path, "query_string": query,
                     "headers": [(b"host", b"localhost")], "client": ("127.0.0.1", 1)}
            await app(scope, receive, send)
            return b"".join(sent)

        app = PprofApp(memory_profile_rate=0)
        for path in ("/heap", "/allocs"):
            text = asyncio.run(ask(path, b"debug=1"))
            assert b"# HeapAlloc = 0\\n" not in text, text
            assert b"# HeapSampled = 0\\n" in text, text
        assert b"python_memstats_heap_alloc_bytes" in asyncio.run(ask("/stats", b""))
        assert not native or not native.heap_stats()["rate"]
        app.close()
        """
    )


@pytest.mark.parametrize("name", ["goroutine", "thread"])
def test_the_request_for_a_delta_is_not_in_it(shop, name):
    """Its own task and the thread of its loop are equal in both snapshots."""
    message = official.parse(shop.get(f"{name}?seconds=1").body)
    assert not [row for row in samples(message) if "asgi_pprof.app.PprofApp._delta" in row[0]]


def records(text):
    """Return [(first word of the record, all of it)] of a debug=1 text."""
    parts = re.split(r"\n(?=\S+.* @ 0x)", text)
    return [(part.split()[0], part) for part in parts if " @ 0x" in part]


def test_new_tasks_and_ended_ones_are_in_the_text_of_a_delta(any_shop):
    """With seconds and debug=1 new tasks come first; ended ones are negative, and come last."""

    def waiting():
        found = records(any_shop.get("goroutine?debug=1").text)
        return [count for count, record in found if '"tenant":"waiting-4"' in record]

    def release():
        any_shop.visit("/release")
        until(lambda: waiting() == [])

    with contextlib.ExitStack() as clients:

        def wait():
            for _ in range(3):
                clients.enter_context(leaving_client(any_shop.port, "/wait/4"))
            until(lambda: waiting() == ["3"])

        began = any_shop.window("goroutine", wait, undo=release, debug=1)
        wait()
        ended = any_shop.window("goroutine", release, undo=wait, debug=1)
        release()
    head = r"goroutine profile: total -?\d+\n# difference of two snapshots, \d+\.\d{3}s apart\n"
    for answer, count, at in ((began, "3", 0), (ended, "-3", -1)):
        assert answer.headers["content-type"] == "text/plain; charset=utf-8"
        assert "content-disposition" not in answer.headers
        assert re.match(head, answer.text)
        assert records(answer.text)[at][0] == count
        assert '"tenant":"waiting-4"' in records(answer.text)[at][1]
        assert "tests.apps.wait_for_release+0x" in records(answer.text)[at][1]


def test_memory_that_is_kept_is_in_the_text_of_a_delta(pure_shop):
    """heap?seconds=N&debug=1 begins with it; tracemalloc, which is on meanwhile, is exact."""
    keep, forget = (lambda: pure_shop.visit("/keep")), (lambda: pure_shop.visit("/forget"))
    text = pure_shop.window("heap", keep, undo=forget, debug=1).text
    assert re.match(r"heap profile: \d+: \d+ \[\d+: \d+\] @ heap/2\n# difference of ", text)
    record = records(text)[0][1]
    values = re.match(r"(\d+): (\d+) \[(\d+): (\d+)\] @", record)
    assert values is not None
    assert 10 * 2**20 <= int(values[2]) < 11 * 2**20
    assert "tests.apps.keep_ten_megabytes+0x" in record
    assert "MemStats" not in text


def test_the_text_of_a_window_has_waits_and_holders(any_shop):
    """One curl is enough to see contention, block and mutex being off otherwise."""
    with any_shop.load("/queue", clients=4):
        for name, head in (("block", "--- contention:\n"), ("mutex", "--- mutex:\n")):
            text = any_shop.get(f"{name}?seconds=1&debug=1").text
            assert text.startswith(f"{head}cycles/second=1000000000\n")
            assert re.search(r"^# difference of two snapshots, \d", text, re.MULTILINE)
            assert "tests.apps.queue_on_a_lock+0x" in records(text)[0][1]


def test_the_gc_parameter_collects_for_heap_only(any_shop):
    """heap?gc=1 counts as a forced collection, allocs?gc=1 does not."""

    def forced() -> int:
        text = any_shop.get("heap?debug=1").text
        return int(re.search(r"^# NumForcedGC = (\d+)$", text, re.MULTILINE)[1])

    before = forced()
    any_shop.get("allocs?gc=1")
    assert forced() == before
    any_shop.get("heap?gc=1")
    assert forced() == before + 1


def test_a_heap_profile_that_is_off_says_how_to_switch_it_on(pure_shop):
    """A comment in the empty profile gives the reason, as the index does."""
    message = official.parse(pure_shop.get("heap").body)
    assert len(message.sample) == 0
    (comment,) = (message.string_table[each] for each in message.comment)
    assert "heap?seconds=N" in comment
    assert 'heap="tracemalloc"' in comment


def test_tracemalloc_may_be_on_from_the_start():
    """heap="tracemalloc" traces from the construction; the application's own tracing is used."""
    pure = {"ASGI_PPROF_NATIVE": "0"}  # otherwise the native engine samples
    for app, env in (("always_tracing", {}), ("tracing_by_itself", pure)):
        with serve_process(f"tests.integration.busy_apps:{app}", env=env) as server:
            for _ in range(10):  # one alone can be missed by a sampler
                server.visit("/keep")
            found = samples(official.parse(server.get("heap").body))
            kept = sum(values[3] for stack, values, _ in found if "keep_a_megabyte" in stack[0])
            assert kept >= 2**20
            assert server.get("heap?seconds=1").status == 200
            assert server.state()["tracing"]
            assert all(labels["bytes"] > 0 for _, _, labels in found)
            first = sum(
                values[1] for _, values, _ in samples(official.parse(server.get("allocs").body))
            )
            server.visit("/forget")
            second = sum(
                values[1] for _, values, _ in samples(official.parse(server.get("allocs").body))
            )
            assert second >= first, "a cumulative value fell"


def test_pipelined_and_slow_clients_do_no_harm(any_shop):
    """A client that sends half a request disturbs neither the server nor the next client."""
    with socket.create_connection(("127.0.0.1", any_shop.port)) as client:
        client.sendall(b"GET /debug/pprof/profile?seconds=1 HTTP/1.1\r\n")
        assert any_shop.get("goroutine").status == 200
