"""Forked children, in which no other thread exists, answer everything and leave nothing on."""

from __future__ import annotations

import os

import pytest

from tests.programs import run_program

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")

OPTIONS = ("-W", "error", "-W", "ignore::DeprecationWarning")  # 3.12 warns of forks beside threads

COMMON = """
import _thread, asyncio, contextlib, faulthandler, gc, os, queue, random, sys, threading
import time, traceback, tracemalloc
import httpx
from asgi_pprof import PprofMiddleware, labels
from asgi_pprof.errors import PprofError
from asgi_pprof.recorders import contention, heap_tracing, stall_watch
from asgi_pprof.registry import DESCRIPTIONS, Registry

NAMES = [each.name for each in Registry().profiles()]
PATHS = [
    "", "cmdline", "stats", "symbol?0x1", "heap?gc=1", "goroutine?debug=1", "goroutine?debug=2",
    "goroutineleak?debug=2", "profile?seconds=1", "block?seconds=1", *NAMES,
]
LIMIT_S = 100

async def ask(app, paths):
    transport = httpx.ASGITransport(app, client=("127.0.0.1", 1))
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
        answers = await asyncio.gather(
            *(client.get(f"/debug/pprof/{path}", timeout=LIMIT_S) for path in paths)
        )
    wrong = [(each.url, each.status_code, each.text) for each in answers if each.status_code != 200]
    assert not wrong, wrong

def fork(in_the_child):
    child = os.fork()
    if child:
        return child
    try:
        faulthandler.dump_traceback_later(LIMIT_S, exit=True)
        asyncio._set_running_loop(None)
        in_the_child()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)

def join(child):
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""


def test_in_a_child_no_lock_is_held():
    """All locks of all objects of ours are held by another thread at the fork."""
    run_program(
        COMMON
        + """
LOCKS = type(_thread.allocate_lock()), type(_thread.RLock())

def objects():
    for each in gc.get_objects():
        kind = type(each)
        # The watch thread's own object stays behind in the child.
        if kind.__module__.startswith("asgi_pprof") and kind.__name__ != "_Sleeper":
            yield from gc.get_referents(each)
    for name, module in list(sys.modules.items()):
        if name.startswith("asgi_pprof"):
            yield vars(module)

def locks():
    for each in list(objects()):
        for value in [each, *(each.values() if type(each) is dict else ())]:
            if isinstance(value, LOCKS):
                yield value

def take():
    found = {id(lock): lock.acquire(blocking=False) for lock in locks()}
    taken = sum(found.values())
    return taken, len(found) - taken

def hold():
    counts.append(take())
    holding.set()
    time.sleep(1000)

async def application(scope, receive, send):
    pass

def in_the_child():
    taken, left = take()
    # One is held: what the watch thread sleeps on. The idle worker's is not there any more.
    assert (taken, left) == (counts[0][0], 1), (taken, left, counts)
    for lock in locks():
        with contextlib.suppress(RuntimeError):
            lock.release()
    asyncio.run(ask(app, PATHS))

app = PprofMiddleware(application, block_profile_rate=1)
asyncio.run(ask(app, PATHS))
counts, holding = [], threading.Event()
threading.Thread(target=hold, daemon=True).start()
holding.wait()
join(fork(in_the_child))
os._exit(0)
""",
        options=OPTIONS,
    )


def test_no_request_imports_a_module():
    """A child that is forked in the middle of an import gets its lock, or half a module."""
    run_program(
        """
        import asyncio, sys
        from asgi_pprof import PprofMiddleware
        from asgi_pprof.registry import DESCRIPTIONS, Registry

        async def application(scope, receive, send):
            pass

        async def ask(path, query):
            async def receive():
                await asyncio.sleep(3600)

            async def send(message):
                sent.append(message)

            sent = []
            scope = {"type": "http", "method": "GET", "path": f"/debug/pprof/{path}"}
            scope |= {"query_string": query, "headers": [], "client": ("127.0.0.1", 1)}
            await app(scope, receive, send)
            assert sent

        async def main():
            names = [each.name for each in Registry().profiles()]
            requests = [(path, b"seconds=1") for path in ("", "unknown", *DESCRIPTIONS, *names)]
            requests += [(name, query) for name in names for query in (b"debug=1", b"debug=2")]
            await asyncio.gather(*(ask(*each) for each in requests))

        app = PprofMiddleware(application)
        known = set(sys.modules)
        asyncio.run(main())
        assert not set(sys.modules) - known, set(sys.modules) - known
        """
    )


def test_in_a_child_no_window_is_open():
    """What its parent records for some seconds is off there, whatever becomes of the window."""
    run_program(
        COMMON
        + """
def state():
    return (
        contention.describe("block"), contention.describe("mutex"),
        tracemalloc.is_tracing(), stall_watch.is_on(),
        asyncio.Lock.acquire, asyncio.Lock.release, threading.Condition.wait,
    )

def windows():
    stack = contextlib.ExitStack()
    for each in (contention.window("block"), contention.window("mutex"), heap_tracing.on()):
        stack.enter_context(each)
    stack.enter_context(stall_watch.window())
    return stack

async def open_and_close(of_the_parent=contextlib.nullcontext()):
    before = state()
    with windows():
        during = state()
        assert not any(a == b for a, b in zip(before, during)), during
        with contextlib.suppress(PprofError):  # tracemalloc has been stopped meanwhile
            of_the_parent.__exit__(None, None, None)
        assert state() == during
    assert state() == before == off

async def main():
    inherited = windows()
    child = fork(lambda: in_the_child(inherited))
    join(child)
    inherited.close()
    await open_and_close()

def in_the_child(inherited):
    assert state() == off, state()
    asyncio.run(open_and_close(inherited))

def beside_a_rate():
    assert contention.describe("block").startswith("on")
    assert contention.describe("mutex").startswith("off")

stall_watch.set_threshold(0)
off = state()
asyncio.run(main())
contention.set_rate("block", 1)
with contention.window("mutex"):
    join(fork(beside_a_rate))
contention.set_rate("block", 0)
assert state() == off
""",
        options=OPTIONS,
    )


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_children_of_a_busy_service_answer_everything(loop):
    """They are forked by the loop's thread and by others, in the middle of requests and pulls."""
    run_program(
        COMMON
        + """
import http.client, socket
import uvicorn
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route

FORKS = 4

async def on_the_loop(request):
    with labels(tenant=str(random.random())):
        await asyncio.gather(*(asyncio.sleep(0.0001 * number) for number in range(5)))
        [[str(number)] * 3 for number in range(300)]
    return PlainTextResponse("")

def in_a_thread(request):
    items = queue.Queue()
    threading.Timer(0.0001, items.put, (1,)).start()
    items.get()
    return PlainTextResponse("")

async def fork_on_the_loop(request):
    children.append(fork(in_the_child))
    return PlainTextResponse("")

def fork_in_a_thread(request):
    children.append(fork(in_the_child))
    return PlainTextResponse("")

def in_the_child():
    over.set()
    asyncio.run(ask(app, PATHS))

functions = on_the_loop, in_a_thread, fork_on_the_loop, fork_in_a_thread
app = PprofMiddleware(
    Starlette(routes=[Route(f"/{each.__name__}", each) for each in functions]),
    block_profile_rate=1000, mutex_profile_fraction=1, wrap_lock_classes=True,
    memory_profile_rate=32768, stall_threshold_ms=5,
)
PULLED = [f"debug/pprof/{path}" for path in PATHS]
WORK = ["on_the_loop", "in_a_thread"]
children, over = [], threading.Event()

def visit(*paths):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=LIMIT_S)
    for path in paths:
        connection.request("GET", f"/{path}")
        response = connection.getresponse()
        assert response.read() is not None and response.status == 200, path
    connection.close()

def client(paths):
    while not over.is_set():
        visit(*random.sample(paths, len(paths)))

def drive():
    pulls = [path for path in PULLED if "seconds" not in path]
    timed = ["debug/pprof/profile?seconds=2"], ["debug/pprof/mutex?seconds=1"]
    clients = [
        threading.Thread(target=client, args=(paths,)) for paths in (pulls, *timed, WORK, WORK)
    ]
    for each in clients:
        each.start()
    for _ in range(FORKS):
        for name in ("fork_on_the_loop", "fork_in_a_thread"):
            time.sleep(random.uniform(0, 0.5))
            visit(name)
            join(children.pop())
    over.set()
    for each in clients:
        each.join()
    server.should_exit = True

listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
listener.bind(("127.0.0.1", 0))
listener.listen(128)
port = listener.getsockname()[1]
server = uvicorn.Server(uvicorn.Config(app, loop=sys.argv[1], log_level="warning"))
threading.Timer(0.5, drive).start()
server.run(sockets=[listener])
""",
        loop,
        options=OPTIONS,
        timeout=280,
    )
