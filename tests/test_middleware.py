"""PprofMiddleware answers profile requests, forwards others, and restores what it changed."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import gzip
import threading
import tracemalloc
import weakref

import httpx
import pytest
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route

from asgi_pprof import PprofApp, PprofMiddleware, labels, start
from asgi_pprof.collectors.goroutine.collector import TaskCollector
from asgi_pprof.labels import current, resolve
from asgi_pprof.recorders import set_mutex_profile_fraction, stall_watch
from tests import official
from tests.programs import run_program
from tests.servers import ask, serve, until
from tests.state import process_state


class Recorder:
    """An application that records the arguments of its calls."""

    def __init__(self):
        self.calls = []
        self.labels = ()

    async def __call__(self, scope, receive, send):
        self.calls.append((scope, receive, send))
        self.labels = resolve(current.get())


def http_scope(path="/", **more):
    return {
        "type": "http",
        "method": "GET",
        "path": path,
        "query_string": b"",
        "headers": [],
        "client": ("127.0.0.1", 5000),
        **more,
    }


async def no_receive():
    await asyncio.sleep(3600)


async def no_send(message):
    raise AssertionError("the application was to answer")


async def answered(app, scope):
    """Return the messages an app sends."""
    messages = []

    async def send(message):
        messages.append(message)

    await app(scope, no_receive, send)
    return messages


@pytest.mark.parametrize("kind", ["websocket", "lifespan", "something-new"])
def test_other_scopes_are_forwarded_unchanged(kind):
    """The application receives the same objects, whatever the path is."""
    recorder, scope = Recorder(), {"type": kind, "path": "/debug/pprof/heap"}
    asyncio.run(PprofMiddleware(recorder)(scope, no_receive, no_send))
    ((seen_scope, seen_receive, seen_send),) = recorder.calls
    assert seen_scope is scope
    assert seen_receive is no_receive
    assert seen_send is no_send
    assert scope == {"type": kind, "path": "/debug/pprof/heap"}


@pytest.mark.parametrize("path", ["/", "/debug", "/debug/pprofx", "/debug/pprof/../x", ""])
def test_other_requests_are_forwarded_unchanged(path):
    """The application receives the same objects, and runs under the request's labels."""
    recorder, scope = Recorder(), http_scope(path)
    asyncio.run(PprofMiddleware(recorder)(scope, no_receive, no_send))
    ((seen_scope, seen_receive, seen_send),) = recorder.calls
    assert seen_scope is scope
    assert (seen_receive, seen_send) == (no_receive, no_send)
    assert recorder.labels == (("method", "GET"),)


def test_an_exception_of_the_application_is_passed_on_and_labels_are_reset():
    """The server receives the application's exception."""

    async def failing(scope, receive, send):
        raise LookupError("the application's own")

    async def call():
        with pytest.raises(LookupError, match="the application's own"):
            await PprofMiddleware(failing)(http_scope(), no_receive, no_send)
        return current.get()

    assert asyncio.run(call()) is None


def test_labels_around_the_middleware_are_kept():
    """Samples of the request also carry the labels that an outer layer has set."""
    recorder = Recorder()

    async def call():
        with labels(tenant="acme"):
            await PprofMiddleware(recorder)(http_scope(), no_receive, no_send)

    asyncio.run(call())
    assert recorder.labels == (("method", "GET"), ("tenant", "acme"))


@pytest.mark.parametrize("prefix", ["", "/", "debug", "/debug/", "//debug", "/a//b"])
def test_a_prefix_that_is_no_path_is_refused(prefix):
    """The constructor raises ValueError; the service does not start without profiles."""
    with pytest.raises(ValueError, match="prefix"):
        PprofMiddleware(Recorder(), prefix=prefix)


def test_an_unknown_heap_engine_is_refused():
    """The ValueError names the engines that exist."""
    with pytest.raises(ValueError, match="tracemalloc"):
        PprofMiddleware(Recorder(), heap="jemalloc")


def test_everything_is_restored_when_the_middleware_is_freed():
    """Thread.start is the original object, no callback remains, tracing is off."""
    start, callbacks = threading.Thread.start, list(gc.callbacks)
    middlewares = [PprofMiddleware(Recorder(), heap="tracemalloc") for _ in range(2)]
    assert threading.Thread.start is not start
    assert tracemalloc.is_tracing()
    middlewares.pop()
    gc.collect()
    assert threading.Thread.start is not start
    assert tracemalloc.is_tracing()
    middlewares.pop()
    gc.collect()
    assert threading.Thread.start is start
    assert gc.callbacks == callbacks
    assert not tracemalloc.is_tracing()


def test_a_wrapper_around_ours_is_not_undone():
    """If another library patches Thread.start after us, its patch stays; ours only delegates."""
    original = threading.Thread.start
    middleware = PprofMiddleware(Recorder())
    ours = threading.Thread.start

    def theirs(thread):
        ours(thread)

    threading.Thread.start = theirs
    del middleware
    gc.collect()
    try:
        assert threading.Thread.start is theirs
        thread = threading.Thread(target=lambda: None)
        thread.start()
        thread.join()
    finally:
        threading.Thread.start = original


@pytest.mark.server
def test_shutdown_restores_everything_and_a_second_start_works():
    """After the lifespan everything is restored, even while the app object exists."""
    start, callbacks = threading.Thread.start, list(gc.callbacks)
    app = Starlette(routes=[Route("/", lambda request: PlainTextResponse("home"))])
    app.add_middleware(PprofMiddleware, heap="tracemalloc")
    for _ in range(2):
        with serve(app) as port:
            assert ask(port, "/").text == "home"
            assert threading.Thread.start is not start
            assert ask(port, "/debug/pprof/heap").status == 200
            assert tracemalloc.is_tracing()
        assert threading.Thread.start is start
        assert gc.callbacks == callbacks
        assert not tracemalloc.is_tracing()


@pytest.mark.server
def test_an_application_without_lifespan_is_served(loop_name):
    """The application rejects the lifespan scope; profiles work nevertheless."""

    async def bare(scope, receive, send):
        assert scope["type"] == "http"
        await PlainTextResponse("bare")(scope, receive, send)

    app = PprofMiddleware(bare)
    with serve(app, loop=loop_name) as port:
        assert ask(port, "/").text == "bare"
        text = ask(port, "/debug/pprof/threadcreate?debug=1").text
        assert text.startswith("threadcreate profile: total ")


def _below(root_path, app):
    """Return the app behind a proxy that strips this prefix and sets root_path."""

    async def stripped(scope, receive, send):
        await app({**scope, "root_path": root_path}, receive, send)

    return stripped


@pytest.mark.server
@pytest.mark.parametrize(
    ("make", "path", "options", "seen_outside"),
    [
        (lambda: _with_middleware(FastAPI()), "/debug/pprof", {}, ""),
        (lambda: _with_middleware(FastAPI()), "/debug/pprof", {"root_path": "/api"}, "/api"),
        (lambda: _below("/api", _with_middleware(FastAPI())), "/debug/pprof", {}, "/api"),
        (lambda: _below("/api", _with_middleware(FastAPI())), "/api/debug/pprof", {}, ""),
        (lambda: _with_middleware(Starlette(), prefix="/_/p"), "/_/p", {}, ""),
        (lambda: PprofMiddleware(Recorder()), "/debug/pprof", {}, ""),
        (lambda: _mounted(FastAPI(), "/debug/pprof"), "/debug/pprof", {}, ""),
        (lambda: _mounted(Starlette(), "/internal/prof"), "/internal/prof", {}, ""),
        (lambda: _below("/api", _mounted(FastAPI(), "/p")), "/p", {}, "/api"),
        (lambda: Starlette(routes=[Mount("/v/{x}", _mounted(FastAPI(), "/p"))]), "/v/7/p", {}, ""),
        (
            lambda: Starlette(routes=[Mount("/sub", _with_middleware(FastAPI()))]),
            "/sub/debug/pprof",
            {},
            "",
        ),
        (PprofApp, "", {}, ""),
    ],
)
def test_it_is_found_wherever_it_is_put(make, path, options, seen_outside):
    """Index, profile, 404 and redirects work as middleware, mounted, and under a root_path."""
    with serve(make(), lifespan="off", **options) as port:
        index = ask(port, f"{path}/")
        assert index.status == 200
        assert "Types of profiles available" in index.text
        heap = ask(port, f"{path}/heap")
        assert heap.headers["content-disposition"] == 'attachment; filename="heap"'
        unknown = ask(port, f"{path}/nosuch/")
        assert (unknown.status, unknown.text) == (404, "Unknown profile\n")
        unclean = ask(port, f"{path}//heap?debug=1")
        assert unclean.status == 307
        assert unclean.headers["location"] == f"{seen_outside}{path}/heap?debug=1"
        if path:
            bare = ask(port, path)
            assert bare.status == 307
            assert bare.headers["location"].endswith(f"{path}/")


def _with_middleware(app, **options):
    app.add_middleware(PprofMiddleware, **options)
    return app


def _mounted(app, path):
    app.mount(path, PprofApp())
    return app


async def _pass_on(request, call_next):
    return await call_next(request)


@pytest.mark.server
@pytest.mark.parametrize("ours_is", ["innermost", "outermost"])
def test_compressing_and_other_middlewares_do_no_harm(ours_is):
    """Bodies are compressed at most once in either order, and CORS headers are kept."""
    app = FastAPI()
    others = [
        (GZipMiddleware, {"minimum_size": 1}),
        (CORSMiddleware, {"allow_origins": ["*"]}),
        (BaseHTTPMiddleware, {"dispatch": _pass_on}),
    ]
    ours = (PprofMiddleware, {})
    for middleware, options in [ours, *others] if ours_is == "innermost" else [*others, ours]:
        app.add_middleware(middleware, **options)
    with serve(app) as port:
        url = f"http://127.0.0.1:{port}/debug/pprof"
        for accepted in ("gzip", "gzip, deflate, br", "identity"):
            headers = {"Accept-Encoding": accepted}
            answer = ask(port, "/debug/pprof/goroutine", headers=headers)
            assert answer.headers.get("content-encoding") in (None, "identity")
            assert official.parse(answer.body).sample
            assert "content-encoding" not in ask(port, "/debug/pprof/goroutine").headers
            text = httpx.get(f"{url}/goroutine?debug=1", headers=headers).text
            assert text.startswith("goroutine profile: total ")
            index = httpx.get(f"{url}/", headers=headers)
            assert index.text.startswith("<html>")
        head = ask(port, "/debug/pprof/goroutine", "HEAD", headers={"Accept-Encoding": "gzip"})
        assert (head.status, head.body) == (200, b"")


@pytest.mark.server
def test_gzip_wrapped_around_by_hand_is_noticed():
    """GZipMiddleware(PprofMiddleware(app)) compresses text and leaves profiles alone."""
    with serve(GZipMiddleware(PprofMiddleware(Recorder()), minimum_size=1), lifespan="off") as port:
        headers = {"Accept-Encoding": "gzip"}
        answer = ask(port, "/debug/pprof/goroutine", headers=headers)
        assert official.parse(answer.body).sample
        text = ask(port, "/debug/pprof/block?debug=1", headers=headers)
        assert gzip.decompress(text.body).startswith(b"--- contention:")


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"client": ("10.0.0.5", 1)}, "loopback"),
        ({"headers": [(b"x-forwarded-for", b"127.0.0.1")]}, "forwarded"),
        ({"headers": [(b"host", b"evil.example")]}, "Host"),
        ({"headers": [(b"sec-fetch-site", b"cross-site")]}, "other sites"),
    ],
)
@pytest.mark.parametrize(
    "path", ["/debug/pprof", "/debug/pprof/", "/debug/pprof//heap", "/debug/pprof/nosuch"]
)
def test_a_request_from_elsewhere_is_refused_before_anything_else(change, word, path):
    """Every path of ours answers 403, with a text that go tool pprof prints."""
    app = PprofMiddleware(Recorder())
    start, body = asyncio.run(answered(app, http_scope(path, **change)))
    headers = dict(start["headers"])
    assert start["status"] == 403
    assert headers[b"x-go-pprof"] == b"1"
    assert headers[b"content-type"] == b"text/plain; charset=utf-8"
    assert word in body["body"].decode()


def test_a_websocket_to_the_mounted_app_is_closed():
    """The app closes the connection instead of leaving it open."""

    async def call():
        messages = []

        async def receive():
            return {"type": "websocket.connect"}

        async def send(message):
            messages.append(message)

        await PprofApp()({"type": "websocket", "path": "/"}, receive, send)
        return messages

    assert asyncio.run(call())[0]["type"] == "websocket.close"


def test_a_fault_of_ours_is_a_500_in_plain_words(caplog):
    """The client receives an answer, and the log has the traceback."""
    app = PprofApp(guard=lambda scope: 1 / 0)
    start, body = asyncio.run(answered(app, http_scope("/heap")))
    assert start["status"] == 500
    assert body["body"] == b"failed to collect profile\n"
    assert "ZeroDivisionError" in caplog.text
    app.close()  # the log keeps the traceback, which references the app


@pytest.mark.parametrize("name", ["profile", "goroutine"])
def test_a_middleware_that_replays_the_body_does_not_stop_the_loop(name):
    """Such a middleware's receive returns the same request immediately, without end."""

    async def replay():
        return {"type": "http.request", "body": b"", "more_body": False}

    async def call():
        messages = []

        async def send(message):
            messages.append(message)

        scope = http_scope(f"/{name}", query_string=b"seconds=1")
        await asyncio.wait_for(PprofApp()(scope, replay, send), 30)
        return messages[0]["status"]

    assert asyncio.run(call()) == 200


@pytest.mark.parametrize(
    "odd",
    [
        {"root_path": None, "app_root_path": None},
        {"raw_path": "/debug/pprof/heap"},
        {"raw_path": None},
        {"client": None},
        {"client": [None, None]},
    ],
)
def test_odd_scopes_get_an_answer(odd):
    """Missing or malformed scope entries raise no exception into the server."""
    app = PprofMiddleware(Recorder())
    start, _ = asyncio.run(answered(app, http_scope("/debug/pprof/heap", **odd)))
    assert start["status"] in (200, 403)


def test_bare_scopes_get_through():
    """The application receives scopes without method and headers; ours are answered."""
    recorder = Recorder()
    app = PprofMiddleware(recorder)
    asyncio.run(app({"type": "http", "path": "/"}, no_receive, no_send))
    assert len(recorder.calls) == 1
    scope = {"type": "http", "path": "/debug/pprof/heap", "client": ("127.0.0.1", 1)}
    start, _ = asyncio.run(answered(app, scope))
    assert start["status"] == 200


@pytest.mark.server
def test_labels_do_not_leak_from_request_to_request(loop_name):
    """On a kept connection servers reuse a context after large bodies."""
    seen = []

    async def read_all(request):
        await request.body()
        seen.append((_depth(), resolve(current.get())))
        return PlainTextResponse("read")

    app = Starlette(routes=[Route("/up", read_all, methods=["POST"])])
    app.add_middleware(PprofMiddleware)
    with serve(app, loop=loop_name) as port, httpx.Client() as client:
        for _ in range(20):
            assert client.post(f"http://127.0.0.1:{port}/up", content=bytes(400_000)).text == "read"
    assert seen == [(1, (("method", "POST"), ("route", "/up")))] * 20


def _depth():
    depth, link = 0, current.get()
    while link is not None:
        depth, link = depth + 1, link.outer
    return depth


def test_inner_labels_reach_a_mounted_service_with_a_middleware_of_its_own():
    """An inner middleware keeps all labels of the request it serves."""
    recorder = Recorder()
    inner = PprofMiddleware(recorder)

    async def between(scope, receive, send):
        with labels(tenant="acme"):
            await inner(scope, receive, send)

    asyncio.run(PprofMiddleware(between)(http_scope(), no_receive, no_send))
    assert recorder.labels == (("method", "GET"), ("tenant", "acme"))


def test_a_task_that_outlives_its_request_keeps_the_route_and_not_the_request():
    """The task keeps its labels, while the objects in the scope are freed."""

    class Session:
        pass

    sessions, outliving = [], []

    async def spawn(request):
        request.scope["session"] = Session()
        sessions.append(weakref.ref(request.scope["session"]))
        outliving.append(asyncio.create_task(asyncio.sleep(30)))
        return PlainTextResponse("spawned")

    app = PprofMiddleware(Starlette(routes=[Route("/spawn/{number}", spawn)]))

    async def call():
        scope = http_scope("/spawn/1")
        await answered(app, scope)
        del scope
        gc.collect()
        (dump,) = [
            dict(task.labels)
            async for task in TaskCollector().goroutines()
            if any("sleep" in place.function.name for place in task.stack)
        ]
        outliving[0].cancel()
        return dump

    found = asyncio.run(call())
    assert (found["method"], found["route"]) == ("GET", "/spawn/{number}")
    assert sessions[0]() is None


def factory_seen_by(app, *scopes):
    """Return the loop's task factory after each of these requests to one loop."""

    async def main():
        seen = []
        for scope in scopes:
            await answered(app, scope)
            seen.append(asyncio.get_running_loop().get_task_factory())
        return seen

    return asyncio.run(main())


def test_tasks_are_tracked_from_startup_to_shutdown(loop_name):
    """The loop has our task factory during the lifespan, and its own afterwards."""
    seen = []

    @contextlib.asynccontextmanager
    async def lifespan(app):
        loops.append(asyncio.get_running_loop())
        seen.append(loops[0].get_task_factory())
        yield

    async def handle(request):
        task = asyncio.create_task(asyncio.sleep(30))
        await asyncio.sleep(0)
        text = [each async for each in TaskCollector().goroutines()]
        task.cancel()
        made = [each for each in text if each.created_by is not None]
        return PlainTextResponse(" ".join(each.created_by.function.name for each in made))

    loops = []
    app = PprofMiddleware(Starlette(routes=[Route("/", handle)], lifespan=lifespan))
    with serve(app, loop=loop_name) as port:
        assert f"{__name__}.test_tasks_are_tracked" in ask(port, "/").text
        assert seen[0] is not None
    assert loops[0].get_task_factory() is None


def test_without_lifespan_tasks_are_tracked_from_the_first_request():
    """A request to the service starts it, and so does one for a profile."""
    for path in ("/", "/debug/pprof/"):
        app = PprofMiddleware(Recorder())
        (factory,) = factory_seen_by(app, http_scope(path))
        assert factory is not None, path


def test_the_mounted_app_tracks_tasks_from_its_first_request():
    """A mounted app receives no lifespan events."""
    app = PprofApp()
    (factory,) = factory_seen_by(app, http_scope("/", headers=[(b"host", b"localhost")]))
    assert factory is not None
    app.close()
    assert factory_seen_by(app, http_scope("/")) == [None]


def test_tracking_tasks_can_be_switched_off():
    """The loop's task factory stays as it is."""
    app = PprofMiddleware(Recorder(), track_tasks=False)
    assert factory_seen_by(app, http_scope("/"), http_scope("/debug/pprof/")) == [None, None]


def test_the_middleware_sets_contention_rates_and_resets_them():
    """Rates are arguments as in Go. A rate that is set later by hand is not reset."""
    original = threading.Condition.wait
    app = PprofMiddleware(Recorder(), block_profile_rate=1000, mutex_profile_fraction=5)
    assert threading.Condition.wait is not original
    assert set_mutex_profile_fraction(-1) == 5
    set_mutex_profile_fraction(7)
    del app
    gc.collect()
    assert set_mutex_profile_fraction(0) == 7
    assert threading.Condition.wait is original


@pytest.mark.parametrize("name", ["block_profile_rate", "mutex_profile_fraction"])
def test_negative_rates_of_contention_are_refused(name):
    """A negative rate has no meaning."""
    with pytest.raises(ValueError, match="-1"):
        PprofMiddleware(Recorder(), **{name: -1})


def thresholds_seen_by(*apps):
    """Return the threshold while each app serves a request, and whether its loop is monitored."""

    async def serve_all():
        seen = []
        for app in apps:
            await answered(app, http_scope("/"))
            loops = stall_watch.loops()
            seen.append((stall_watch.threshold_ms, asyncio.get_running_loop() in loops))
        return seen

    return asyncio.run(serve_all())


def test_loops_are_monitored_for_stalls_from_the_first_request_to_the_end():
    """The default threshold is 100 ms; the monitor ends with the app."""
    threads = process_state()["native threads"]
    app = PprofMiddleware(Recorder())
    assert thresholds_seen_by(app) == [(100, True)]
    del app
    gc.collect()
    until(lambda: process_state()["native threads"] == threads)


def test_a_stall_threshold_of_0_monitors_no_loop():
    """A second middleware with a threshold has the loop monitored."""
    app = PprofMiddleware(Recorder(), stall_threshold_ms=0)
    assert thresholds_seen_by(app) == [(0, False)]
    other = PprofMiddleware(Recorder(), stall_threshold_ms=30)
    assert thresholds_seen_by(app, other) == [(30, False), (30, True)]


def test_the_lower_of_two_thresholds_applies_while_it_lives():
    """Afterwards the other one applies. The loop is monitored until both apps are gone."""

    async def main():
        apps = [PprofMiddleware(Recorder(), stall_threshold_ms=each) for each in (300, 20)]
        while apps:
            for app in apps:
                await answered(app, http_scope("/"))
            seen.append((stall_watch.threshold_ms, len(stall_watch.loops())))
            del app, apps[-1]
            gc.collect()
        seen.append(len(stall_watch.loops()))

    seen = []
    asyncio.run(main())
    assert seen == [(20, 1), (300, 1), 0]


@pytest.mark.parametrize("threshold_ms", [-1, float("inf"), float("nan")])
def test_invalid_thresholds_are_refused(threshold_ms):
    """The constructor raises before it switches anything on."""
    with pytest.raises(ValueError, match=str(threshold_ms)):
        PprofMiddleware(Recorder(), stall_threshold_ms=threshold_ms)


def test_a_figure_that_fails_does_not_break_the_index(monkeypatch, caplog):
    """Reading the attributes of a foreign task can raise any exception."""

    async def fail(self):
        raise RuntimeError("no figures today")

    monkeypatch.setattr("asgi_pprof.collectors.stats.Stats.text", fail)
    app = PprofApp()
    scope = http_scope("/", headers=[(b"host", b"localhost")])
    start, *rest = asyncio.run(answered(app, scope))
    app.close()
    body = b"".join(message["body"] for message in rest)
    assert start["status"] == 200
    assert b"goroutine" in body
    assert b"failed: the reason is in the log" in body
    assert "no figures today" in caplog.text


def test_start_samples_memory_before_there_is_a_middleware():
    """
    The middleware takes it over, and its end ends all.

    What is allocated before `start` is not in the profile.
    """
    run_program(
        """
        import asyncio, gc, sys, threading
        import asgi_pprof
        from asgi_pprof.collectors.heap.collector import HeapCollector
        from asgi_pprof.collectors.heap.tracing import Peaks
        from asgi_pprof.native.core import native
        from asgi_pprof.recorders import gc_pauses, heap_sampler, heap_tracing, thread_starts

        def before_start(): return bytearray(8 << 20)
        def while_importing(): return bytearray(8 << 20)
        def with_middleware(): return bytearray(8 << 20)

        def live():
            collector = HeapCollector(heap_sampler, heap_tracing, Peaks())
            profile = asyncio.run(collector.snapshot())()
            names = "before_start", "while_importing", "with_middleware"
            return [
                sum(s.values[3] for s in profile.samples if s.stack[0].function.name.endswith(name))
                for name in names
            ]

        async def application(scope, receive, send): pass

        kept = [before_start()]
        asgi_pprof.start(65536)
        asgi_pprof.start(1)  # changes nothing
        assert gc_pauses.is_on()
        kept.append(while_importing())
        app = asgi_pprof.PprofMiddleware(application, memory_profile_rate=1000)
        asgi_pprof.start()
        kept.append(with_middleware())
        mb = 1 << 20
        if native:
            assert native.heap_stats()["rate"] == 65536
            nothing, imported, built = live()
            assert nothing == 0 and 8 * mb <= imported < 9 * mb and 8 * mb <= built < 9 * mb
        del app
        gc.collect()
        assert not gc_pauses.is_on()
        assert not heap_sampler.is_on()
        assert not native or native.heap_stats()["rate"] == 0
        asgi_pprof.start()  # there was a middleware
        assert not gc_pauses.is_on()
        """
    )


@pytest.mark.parametrize("rate", [-1, 2**63])
def test_start_refuses_a_rate_as_the_middleware_does(rate):
    """The error is the same, and nothing is on."""
    with pytest.raises(ValueError, match="memory_profile_rate is bytes a sample, or 0, not"):
        start(memory_profile_rate=rate)
