"""No client, and no object of the application, can keep others from getting an answer."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading

import pytest

from asgi_pprof import PprofApp, PprofMiddleware, labels
from asgi_pprof.collectors.contention import asyncio_waits, threading_waits
from asgi_pprof.collectors.goroutine.collector import TaskCollector
from asgi_pprof.labels import MAX_LETTERS, clip, current, resolve
from asgi_pprof.profile import Goroutine
from asgi_pprof.recorders import UsedRecorders, contention, gc_pauses, set_block_profile_rate
from asgi_pprof.request_labels import RequestLabels
from asgi_pprof.stacks import UNKNOWN
from tests.loops import LOOPS, iterations, run
from tests.programs import run_program

TASKS = 400
OF_TASKS = ("goroutine", "goroutine?debug=1", "goroutine?debug=2", "goroutineleak")
ALL = (*OF_TASKS, "goroutineleak?debug=2", "thread", "thread?debug=1", "stats", "")


async def application(scope, receive, send):
    pass


async def asked(app, path, *, leaves=False, query=None):
    """Request a path and return status and text. A client that `leaves` disconnects at once."""
    name, _, parameters = path.partition("?")
    scope = {
        "type": "http",
        "method": "GET",
        "path": f"/debug/pprof/{name}",
        "query_string": parameters.encode() if query is None else query,
        "headers": [(b"host", b"127.0.0.1")],
        "client": ("127.0.0.1", 1),
    }
    came, sent = [], []

    async def receive():
        if not came:
            came.append(True)
            return {"type": "http.request", "body": b"", "more_body": False}
        if not leaves:
            await asyncio.sleep(3600)
        return {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    await app(scope, receive, send)
    assert sent or leaves
    status = sent[0]["status"] if sent else None
    return status, b"".join(each.get("body", b"") for each in sent).decode("utf-8", "replace")


@contextlib.contextmanager
def middleware(**options):
    served = PprofMiddleware(application, **options)
    try:
        yield served
    finally:
        served._pprof.close()


@contextlib.asynccontextmanager
async def waiting(kind=asyncio.Task, count=1):
    """Yield while tasks of this class wait."""
    never = asyncio.Event()
    loop = asyncio.get_running_loop()
    tasks = [kind(never.wait(), loop=loop) for _ in range(count)]
    await asyncio.sleep(0)
    try:
        yield tasks
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


# A fault of our own


@pytest.mark.once
@pytest.mark.parametrize("query", [b"", b"x=\xff", b"\x80", b"a=%ff&\xc3("])
@pytest.mark.parametrize("handler_fails", [False, True])
def test_a_fault_is_a_500_whatever_the_query_is_and_whatever_the_log_does(query, handler_fails):
    class Handler(logging.Handler):
        def emit(self, record):
            seen.append(record.getMessage())
            if handler_fails:
                raise OSError("no space left on device")

    def guard(scope):
        raise LookupError("a fault")

    seen, handler, logger = [], Handler(), logging.getLogger("asgi_pprof")
    app = PprofApp(prefix="/debug/pprof", guard=guard)
    logger.addHandler(handler)
    try:
        status, text = asyncio.run(asked(app, "heap", query=query))
    finally:
        logger.removeHandler(handler)
        app.close()
    assert (status, text) == (500, "failed to collect profile\n")
    assert seen == ["asgi_pprof failed to answer '/debug/pprof/heap'"]


# Objects of the application


class NameRaises(asyncio.Task):
    def get_name(self):
        raise RuntimeError("no name")


class NameIsNoString(asyncio.Task):
    def get_name(self):
        return 7


class LongName(asyncio.Task):
    def get_name(self):
        return "n" * 100_000


class CoroutineRaises(asyncio.Task):
    def get_coro(self):
        raise KeyError


class LoopRaises(asyncio.Task):
    on = False  # asyncio too reads the attribute, at the end

    def get_loop(self):
        if self.on:
            raise KeyError
        return super().get_loop()


class ContextRaises(asyncio.Task):
    def get_context(self):
        raise MemoryError


class TakesNoAttribute(asyncio.Task):
    def __setattr__(self, name, value):
        raise ZeroDivisionError

    def __getattr__(self, name):
        raise ZeroDivisionError


class Unequal(asyncio.Task):
    def __eq__(self, other):
        raise TypeError

    __hash__ = asyncio.Task.__hash__


@pytest.mark.parametrize(
    "kind",
    [
        NameRaises,
        NameIsNoString,
        LongName,
        CoroutineRaises,
        LoopRaises,
        ContextRaises,
        TakesNoAttribute,
        Unequal,
    ],
)
def test_a_task_that_cannot_be_read_is_shown_beside_the_others(kind):
    async def main():
        with middleware() as served:
            async with waiting(kind) as (odd,), waiting(count=3):
                kind.on = True
                texts = {path: await asked(served, path) for path in ALL}
                kind.on = False
                assert not odd.done()
        assert {path: status for path, (status, _) in texts.items()} == dict.fromkeys(ALL, 200)
        return texts["goroutine?debug=2"][1]

    dump = run(main(), debug=False)
    assert dump.count("goroutine ") - dump.count("in goroutine ") == 5  # one of them asks
    assert max(map(len, dump.splitlines())) < 1000


def test_values_of_a_task_that_cannot_be_read_are_replaced_by_the_reason():
    async def main():
        with middleware() as served:
            async with waiting(NameRaises), waiting(NameIsNoString), waiting(ContextRaises):
                return (await asked(served, "goroutine?debug=2"))[1]

    dump = run(main(), debug=False)
    assert '{task: "unreadable: RuntimeError"}' in dump
    assert "{task: 7}" in dump
    if hasattr(asyncio.Task, "get_context"):  # 3.12
        assert "[unreadable: MemoryError]" in dump


def test_a_thread_whose_name_raises_is_shown_beside_the_others():
    class Odd(threading.Thread):
        @property
        def name(self):
            raise RuntimeError

    async def main(odd, long):
        with middleware() as served:
            return [await asked(served, path) for path in ("thread?debug=1", "stats", "goroutine")]

    stop = threading.Event()
    odd = Odd(target=stop.wait)
    threads = [odd, threading.Thread(target=stop.wait, name="n" * 100_000)]
    odd._name = "odd"  # `start` reads the name
    for each in threads:
        threading.Thread.start(each)
    try:
        answers = asyncio.run(main(*threads))
    finally:
        stop.set()
        for each in threads:
            each.join()
    assert [status for status, _ in answers] == [200, 200, 200]
    assert '"thread":"unreadable: RuntimeError"' in answers[0][1]
    assert "... (100000 letters)" in answers[0][1]


def test_a_route_that_raises_is_a_label_that_says_so():
    class Route:
        @property
        def path(self):
            raise RuntimeError

    request = RequestLabels({"type": "http", "method": "GET", "route": Route()})
    assert request.own() == {"method": "GET", "route": "unreadable: RuntimeError"}


# Values that others choose


@pytest.mark.parametrize(
    ("method", "label"),
    [
        ("GET", "GET"),
        ("PATCH", "PATCH"),
        ("QUERY", "QUERY"),
        ("X" * 60_000, "other"),
        ("get", "other"),
    ],
)
def test_an_invented_method_takes_no_memory(method, label):
    """A client chooses the method, and a label may be kept for the life of the process."""
    assert RequestLabels({"type": "http", "method": method}).own() == {"method": label}


def test_long_keys_and_values_are_cut_and_marked():
    cut = clip("x" * 100_000)
    assert len(cut) < MAX_LETTERS + 30
    assert cut.endswith("... (100000 letters)")
    assert clip("x" * MAX_LETTERS) == "x" * MAX_LETTERS
    with labels({"k" * 100_000: "v" * 100_000}):
        ((key, value),) = resolve(current.get())
    assert key == clip("k" * 100_000)
    assert value == clip("v" * 100_000)
    request = RequestLabels({"type": "http", "method": "GET", "route": Path("/" + "r" * 100_000)})
    assert request.own()["route"] == clip("/" + "r" * 100_000)


class Path:
    def __init__(self, path):
        self.path = path


# Clients that disconnect


class Counted(asyncio.Task):
    """A task that counts how often tasks are read."""

    read = 0

    def get_coro(self):
        Counted.read += 1
        return super().get_coro()


@pytest.mark.parametrize("path", [*OF_TASKS, "goroutineleak?debug=2"])
@pytest.mark.parametrize("loop_name", LOOPS)
def test_nothing_is_read_for_a_client_that_has_left(path, loop_name):
    """The client may leave while its request waits, or while its profile is made."""

    async def main():
        with middleware(stall_threshold_ms=0, track_tasks=False) as served:
            async with waiting(Counted, TASKS):
                Counted.read = 0
                await asked(served, path)
                one = Counted.read
                Counted.read = 0
                answers = await asyncio.gather(
                    *(asked(served, path, leaves=True) for _ in range(6))
                )
                left = asyncio.all_tasks() - {asyncio.current_task()}
                assert all(type(each) is Counted for each in left)
        assert one >= TASKS
        return one, Counted.read, answers

    one, read, answers = run(main(), loop_name, debug=False)
    assert read < 3 * one
    for status, text in answers:
        assert (status, text) in ((500, "context canceled\n"), (None, ""))


def test_a_client_that_leaves_stops_the_thread_that_makes_its_profile(monkeypatch):
    """The thread names functions, encodes and compresses."""
    started, ended = threading.Event(), threading.Event()

    async def leave(app):
        async def receive():
            if not started.is_set():
                await asyncio.to_thread(started.wait)
            return {"type": "http.disconnect"}

        sent = []

        async def send(message):
            sent.append(message)

        scope = {"type": "http", "method": "GET", "path": "/debug/pprof/threadcreate"}
        scope |= {"query_string": b"", "headers": [], "client": ("127.0.0.1", 1)}
        await app(scope, receive, send)
        return sent[0]["status"], sent[1]["body"]

    def endless(profile):
        from asgi_pprof.offload import yield_gil

        started.set()
        try:
            while True:
                yield_gil()
        finally:
            ended.set()

    monkeypatch.setattr("asgi_pprof.responses.encode", endless)
    with middleware() as served:
        assert asyncio.run(leave(served)) == (500, b"context canceled\n")
        assert ended.wait(20)


# Servers that end and cancel their requests


@pytest.mark.parametrize("path", ["profile?seconds=60", "heap?seconds=60", *OF_TASKS])
@pytest.mark.parametrize("loop_name", LOOPS)
def test_a_cancelled_request_is_answered_as_in_go(path, loop_name):
    """Wherever it is; a server would take the exception for a failure of the application."""

    async def main():
        with middleware() as served:
            async with waiting(count=TASKS):
                for steps in range(1, 8):
                    task = asyncio.create_task(asked(served, path))
                    await iterations(steps)
                    task.cancel()
                    status, text = await task
                    assert (status, text) == (500, "context canceled\n") or status == 200
                    assert status != 200 or steps > 1
                assert asyncio.all_tasks().isdisjoint({task})
        assert len(asyncio.all_tasks()) == 1

    run(main(), loop_name, debug=False)


@pytest.mark.once
@pytest.mark.parametrize("reads", [True, False])
def test_a_cancelled_dump_says_so_at_its_end_and_waits_for_no_client(monkeypatch, reads):
    async def main():
        sent = []

        async def send(message):
            sent.append(message)
            if len(sent) == 3:
                task.cancel()
            if len(sent) >= 3:
                await asyncio.sleep(0 if reads else 3600)

        with middleware() as served:
            async with waiting(count=2000):
                scope = {"type": "http", "method": "GET", "path": "/debug/pprof/goroutine"}
                scope |= {"query_string": b"debug=2", "headers": [], "client": ("127.0.0.1", 1)}
                task = asyncio.create_task(served(scope, no_message, send))
                await task
        return sent[-1]

    monkeypatch.setattr("asgi_pprof.responses._LAST_S", 0.05)
    last = run(main(), debug=False)
    assert last["body"] == b"\nfailed: the rest is missing, context canceled\n"
    assert not last["more_body"]


UVICORN = """
import asyncio, http.client, logging, socket, sys, threading, time
import uvicorn
from asgi_pprof import PprofMiddleware
from asgi_pprof.recorders import contention

async def application(scope, receive, send):
    if scope["type"] == "lifespan":
        for event in "startup", "shutdown":
            await receive()
            await send({"type": f"lifespan.{event}.complete"})

class Log(logging.Handler):
    def emit(self, record):
        logged.append((record.getMessage(), record.exc_info))

def pull(path):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", f"/debug/pprof/{path}")
    response = connection.getresponse()
    answer = path, response.status, response.read()
    with printing:
        print(*answer)

def end():
    while contention.describe("mutex").startswith("off"):
        time.sleep(0.01)
    server.should_exit = True

logged, printing = [], threading.Lock()
logging.getLogger("uvicorn.error").addHandler(Log(logging.WARNING))
app = PprofMiddleware(application)
with socket.create_server(("127.0.0.1", 0)) as listener:
    port = listener.getsockname()[1]
    config = uvicorn.Config(app, loop=sys.argv[1], log_config=None, timeout_graceful_shutdown=0)
    server = uvicorn.Server(config)
    threads = [threading.Thread(target=pull, args=(each,)) for each in sys.argv[2:]]
    for thread in (*threads, threading.Thread(target=end)):
        thread.start()
    server.run(sockets=[listener])
for thread in threads:
    thread.join()
(message, failure), = logged
assert message.startswith("Cancel 2 running task(s)") and failure is None
"""


@pytest.mark.server
@pytest.mark.parametrize("loop_name", LOOPS)
def test_a_server_that_ends_in_the_middle_of_profiles_logs_no_failure(loop_name):
    said = run_program(UVICORN, loop_name, "profile?seconds=60", "mutex?seconds=60")
    for path in ("profile?seconds=60", "mutex?seconds=60"):
        assert f"{path} 500 b'context canceled\\n'\n" in said


# Dumps, which are sent while they are being made


def dump_that_fails_after(count):
    async def goroutines(self):
        for number in range(count):
            yield Goroutine(number + 1, "running", (UNKNOWN,), (("task", "n" * 1000),))
        raise ZeroDivisionError

    return goroutines


@pytest.mark.once
@pytest.mark.parametrize("count", [0, 3, 100])
def test_a_dump_that_fails_is_an_error_or_ends_with_one(monkeypatch, caplog, count):
    async def main():
        with middleware() as served:
            return await asked(served, "goroutine?debug=2")

    monkeypatch.setattr(TaskCollector, "goroutines", dump_that_fails_after(count))
    status, text = run(main())
    assert [each.exc_info[0] for each in caplog.records] == [ZeroDivisionError]
    if count < 100:
        assert (status, text) == (500, "failed to collect profile\n")
    else:
        assert status == 200
        assert text.startswith("goroutine 1 [running]")
        assert text.endswith("\nfailed: the rest is missing, and the reason is in the log\n")


@pytest.mark.once
@pytest.mark.parametrize("query", ["debug=1", "debug=2"])
def test_a_text_is_sent_in_pieces(query):
    """So a text takes little memory, and none of its steps is long."""

    async def main():
        sent = []

        async def send(message):
            sent.append(len(message.get("body", b"")))

        with middleware() as served:
            async with contextlib.AsyncExitStack() as stack:
                for number in range(2000):
                    with labels(number=str(number)):
                        await stack.enter_async_context(waiting())
                scope = {"type": "http", "method": "GET", "path": "/debug/pprof/goroutine"}
                scope |= {"query_string": query.encode(), "headers": [], "client": ("127.0.0.1", 1)}
                await served(scope, no_message, send)
        return sent

    sent = run(main(), debug=False)
    assert max(sent) < 2 * sum(sent) / 10
    assert len(sent) > 10


@pytest.mark.once
def test_a_text_that_fails_is_an_error(monkeypatch, caplog):
    async def main():
        with middleware() as served:
            return await asked(served, "thread?debug=1")

    monkeypatch.setattr("asgi_pprof.encoders.text._record_text", lambda head, sample: 1 / 0)
    status, text = run(main())
    assert [each.exc_info[0] for each in caplog.records] == [ZeroDivisionError]
    assert (status, text) == (500, "failed to collect profile\n")


async def no_message():
    await asyncio.sleep(3600)


# Recorders that cannot be switched on


def test_contention_that_cannot_be_switched_on_leaves_nothing_on(monkeypatch):
    """A window, a rate or a middleware may fail to; methods are wrapped one after the other."""

    def fails():
        raise OSError("too many open files")

    async def with_window():
        with middleware() as served:
            return await asked(served, "block?seconds=1")

    before = asyncio.Lock.acquire, threading.Condition.wait
    for targets in (asyncio_waits, threading_waits):
        with monkeypatch.context() as patched:
            patched.setattr(targets, "wait_targets", fails)
            assert asyncio.run(with_window())[0] == 500
            with pytest.raises(OSError, match="too many"):
                set_block_profile_rate(1)
            with pytest.raises(OSError, match="too many"):
                PprofMiddleware(application, block_profile_rate=1)
        assert (asyncio.Lock.acquire, threading.Condition.wait) == before
        assert contention.describe("block") == "off: contention is not recorded"
        assert contention.rate("block") == 0
    with middleware(block_profile_rate=1):
        assert asyncio.Lock.acquire is not before[0]
    assert (asyncio.Lock.acquire, threading.Condition.wait) == before


def test_if_one_recorder_fails_none_stays_on(monkeypatch):
    def fails():
        raise RuntimeError("no more threads")

    def users():
        return [len(recorder._settings) for recorder, _ in UsedRecorders(None, 0)._uses]

    before = users()
    monkeypatch.setattr(contention, "_enabled", fails)
    with pytest.raises(RuntimeError, match="no more threads"):
        PprofMiddleware(application)
    assert users() == before
    assert not gc_pauses.is_on()


# Another library's loop

TRIO = """
import logging
import trio
from asgi_pprof import PprofMiddleware

logging.basicConfig()

async def application(scope, receive, send):
    pass

async def asked(served, path):
    name, _, query = path.partition("?")
    sent = []
    async def receive():
        await trio.sleep(3600)
    async def send(message):
        sent.append(message)
    scope = {"type": "http", "method": "GET", "path": "/debug/pprof/" + name}
    scope |= {"query_string": query.encode(), "headers": [], "client": ("127.0.0.1", 1)}
    await served(scope, receive, send)
    return sent[0]["status"], b"".join(each.get("body", b"") for each in sent[1:])

async def main():
    served = PprofMiddleware(application)
    for path in ("", "heap", "heap?debug=1", "allocs", "thread", "thread?debug=1", "threadcreate",
                 "cmdline", "symbol", "block", "mutex", "stall", "stats"):
        assert (await asked(served, path))[0] == 200, path
    for path in ("goroutine", "goroutine?debug=2", "goroutineleak", "profile?seconds=1",
                 "heap?seconds=1"):
        status, body = await asked(served, path)
        assert status == 501, path
        assert body.endswith(b" needs asyncio, and this server runs another library's loop\\n")
    assert b"process_resident_memory_bytes" in (await asked(served, "stats"))[1]
    served._pprof.close()

trio.run(main)
"""


@pytest.mark.once
def test_under_trio_everything_that_does_not_need_asyncio_is_answered():
    """The other answers give the reason, without a traceback."""
    run_program(TRIO)
