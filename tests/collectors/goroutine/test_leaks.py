"""Leaked tasks, which nothing can wake any more, are found, and no others."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import gc
import http.client
import itertools
import socket
import sys
import threading
import weakref

import anyio
import anyio.to_thread
import pytest
from fastapi import FastAPI

from asgi_pprof.collectors.goroutine import leak_search
from asgi_pprof.collectors.goroutine.collector import TaskCollector
from asgi_pprof.collectors.goroutine.leak_collector import LeakCollector
from asgi_pprof.collectors.goroutine.leak_search import find_leaked
from asgi_pprof.collectors.goroutine.references import referents
from tests.loops import run
from tests.servers import serve

BACKGROUND: set[asyncio.Task] = set()
HELD: list[object] = []
BY_NAME: weakref.WeakValueDictionary[str, asyncio.Event] = weakref.WeakValueDictionary()
CURRENT: contextvars.ContextVar[object] = contextvars.ContextVar("current")


async def search(tasks=None, **options):
    """Return the leaked tasks among these, or among all."""
    scan = await TaskCollector().begin_scan()
    found, _ = await find_leaked(tasks or asyncio.all_tasks(), scan.awaited, **options)
    return found


async def leaked():
    """Return the names of the leaked tasks."""
    return {task.get_name() for task in await search()}


def background(coroutine, name):
    """Start a task that only a set of this module refers to."""
    task = asyncio.create_task(coroutine, name=name)
    BACKGROUND.add(task)
    task.add_done_callback(BACKGROUND.discard)


async def ended(*names):
    """Wait until the background tasks of these names are done."""
    while not {task.get_name() for task in BACKGROUND}.isdisjoint(names):  # noqa: ASYNC110
        await asyncio.sleep(0.001)


@pytest.fixture(autouse=True)
def _nothing_held():
    yield
    BACKGROUND.clear()
    HELD.clear()
    gc.collect()


async def settle():
    for _ in range(5):
        await asyncio.sleep(0)
    gc.collect()


def use(*values):
    return values


async def wait_on(event):
    await event.wait()


async def consume(queue):
    while True:
        await queue.get()


async def nested(event):
    await wait_on(event)


# Tasks that leak


async def orphaned_consumer():
    background(consume(asyncio.Queue()), "leaked consumer")


async def deadlock():
    one, two = asyncio.Lock(), asyncio.Lock()

    async def take(first, second):
        async with first:
            await asyncio.sleep(0)
            async with second:
                pass

    background(take(one, two), "leaked one")
    background(take(two, one), "leaked two")


async def waiter_of_leaked():
    async def wait():
        await asyncio.create_task(wait_on(asyncio.Event()), name="leaked awaited")

    background(wait(), "leaked awaiting")


async def gather_of_leaked():
    async def wait():
        a = asyncio.create_task(wait_on(asyncio.Event()), name="leaked a")
        b = asyncio.create_task(wait_on(asyncio.Event()), name="leaked b")
        await asyncio.gather(a, b)

    background(wait(), "leaked gather")


async def group_of_leaked():
    async def wait():
        async with asyncio.TaskGroup() as group:
            group.create_task(wait_on(asyncio.Event()), name="leaked child")

    background(wait(), "leaked parent")


async def event_nobody_holds():
    background(nested(asyncio.Event()), "leaked waiter")


class Session:
    def __init__(self):
        self.ready = asyncio.Event()
        self.condition = asyncio.Condition()
        self.me = self

    async def serve(self):
        await self.ready.wait()

    async def wait_for_change(self):
        async with self.condition:
            await self.condition.wait()


async def session_only_its_task_holds():
    background(Session().serve(), "leaked session")
    background(Session().wait_for_change(), "leaked condition")


async def dropped_future():
    async def wait():
        await asyncio.get_running_loop().create_future()

    background(wait(), "leaked future")


async def asynchronous_generators():
    async def inner(event):
        yield 1
        await event.wait()
        yield 2

    async def outer(event):
        async for each in inner(event):
            yield each

    async def read():
        async for _ in outer(asyncio.Event()):
            pass

    background(read(), "leaked reader")


async def ping_and_pong():
    async def pair(event, other):
        await event.wait()
        other.set()

    one, two = asyncio.Event(), asyncio.Event()
    background(pair(one, two), "leaked ping")
    background(pair(two, one), "leaked pong")


async def semaphore_never_released():
    async def take_twice(semaphore):
        async with semaphore:
            await semaphore.acquire()

    background(take_twice(asyncio.Semaphore(1)), "leaked semaphore")


async def shielded_leak():
    async def wait():
        await asyncio.shield(asyncio.create_task(wait_on(asyncio.Event()), name="leaked shielded"))

    background(wait(), "leaked shield")


async def task_in_an_object_of_its_own():
    class Worker:
        def start(self):
            self.event = asyncio.Event()
            self.task = asyncio.create_task(self.run(), name="leaked worker")
            BACKGROUND.add(self.task)

        async def run(self):
            await self.event.wait()

    Worker().start()


async def reader_of_a_stream_nobody_feeds():
    background(asyncio.StreamReader().read(), "leaked stream reader")


LEAKS = {
    orphaned_consumer: {"leaked consumer"},
    deadlock: {"leaked one", "leaked two"},
    waiter_of_leaked: {"leaked awaited", "leaked awaiting"},
    gather_of_leaked: {"leaked a", "leaked b", "leaked gather"},
    group_of_leaked: {"leaked child", "leaked parent"},
    event_nobody_holds: {"leaked waiter"},
    session_only_its_task_holds: {"leaked session", "leaked condition"},
    dropped_future: {"leaked future"},
    asynchronous_generators: {"leaked reader"},
    ping_and_pong: {"leaked ping", "leaked pong"},
    semaphore_never_released: {"leaked semaphore"},
    shielded_leak: {"leaked shielded", "leaked shield"},
    task_in_an_object_of_its_own: {"leaked worker"},
    reader_of_a_stream_nobody_feeds: {"leaked stream reader"},
}


def test_tasks_that_nothing_can_wake_are_found(loop_name):
    """They are found even if a module's set refers to the task: code could only cancel it."""

    async def main():
        for leak in LEAKS:
            await leak()
        await settle()
        found = await leaked()
        return {leak.__name__: names & found for leak, names in LEAKS.items()}, found

    by_leak, found = run(main(), loop_name)
    assert by_leak == {leak.__name__: names for leak, names in LEAKS.items()}
    assert found == set().union(*LEAKS.values())


# Tasks that do not leak: each context manager starts tasks that wait


@contextlib.asynccontextmanager
async def sleeping():
    background(asyncio.sleep(60), "sleeps")
    yield


@contextlib.asynccontextmanager
async def queue_of_a_module():
    queue = asyncio.Queue()
    HELD.append(queue)
    background(consume(queue), "consumes")
    del queue
    yield


@contextlib.asynccontextmanager
async def queue_of_a_living_task():
    async def produce():
        queue = asyncio.Queue()
        background(consume(queue), "consumes")
        await asyncio.sleep(60)
        queue.put_nowait(1)

    background(produce(), "produces")
    yield


@contextlib.asynccontextmanager
async def queue_of_a_runnable_task():
    async def produce():
        queue = asyncio.Queue()
        background(consume(queue), "consumes")
        for number in itertools.count():
            await asyncio.sleep(0 * number)

    background(produce(), "produces")
    yield


@contextlib.asynccontextmanager
async def queue_of_a_thread():
    end, ready = threading.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    def hold():
        queue = asyncio.Queue()
        loop.call_soon_threadsafe(background, consume(queue), "consumes")
        ready.set()
        end.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    ready.wait()
    yield
    end.set()
    thread.join()


@contextlib.asynccontextmanager
async def queue_of_a_thread_local():
    local = threading.local()
    HELD.append(local)
    local.queue = asyncio.Queue()
    background(consume(local.queue), "consumes")
    yield


@contextlib.asynccontextmanager
async def queue_in_a_context():
    async def hold():
        CURRENT.set(asyncio.Queue())
        background(consume(CURRENT.get()), "consumes")
        await asyncio.sleep(60)

    background(hold(), "holds")
    yield


@contextlib.asynccontextmanager
async def closure_of_a_timer():
    event = asyncio.Event()
    timer = asyncio.get_running_loop().call_later(60, lambda event=event: event.set())
    background(wait_on(event), "waits")
    del event
    yield
    timer.cancel()


@contextlib.asynccontextmanager
async def method_of_a_timer():
    event = asyncio.Event()
    asyncio.get_running_loop().call_later(60, event.set)
    background(wait_on(event), "waits")
    del event
    yield


@contextlib.asynccontextmanager
async def timer_that_cancels():
    task = asyncio.create_task(wait_on(asyncio.Event()), name="waits")
    asyncio.get_running_loop().call_later(60, task.cancel)
    del task
    yield


@contextlib.asynccontextmanager
async def partial_of_a_reader():
    ours, theirs = socket.socketpair()
    event = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_reader(ours, functools.partial(Session.__init__, event))
    background(wait_on(event), "waits")
    del event
    yield
    loop.remove_reader(ours)
    ours.close()
    theirs.close()


@contextlib.asynccontextmanager
async def socket_read():
    ours, theirs = socket.socketpair()
    reader, writer = await asyncio.open_connection(sock=ours)
    background(reader.readline(), "reads")
    del reader
    yield
    writer.close()
    await writer.wait_closed()
    theirs.close()


@contextlib.asynccontextmanager
async def raw_socket_read():
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    background(asyncio.get_running_loop().sock_recv(ours, 1), "receives")
    yield
    theirs.send(b"x")
    await ended("receives")
    ours.close()
    theirs.close()


@contextlib.asynccontextmanager
async def executor():
    end = threading.Event()

    async def wait():
        await asyncio.get_running_loop().run_in_executor(None, end.wait)

    background(wait(), "in executor")
    background(asyncio.to_thread(end.wait), "to thread")
    yield
    end.set()
    await ended("in executor", "to thread")


@contextlib.asynccontextmanager
async def anyio_worker():
    end = threading.Event()
    background(anyio.to_thread.run_sync(end.wait), "in worker")
    yield
    end.set()
    await ended("in worker")


@contextlib.asynccontextmanager
async def timeouts():
    async def under_timeout():
        async with asyncio.timeout(60):
            await nested(asyncio.Event())

    async def under_fail_after():
        with anyio.fail_after(60):
            await nested(asyncio.Event())

    async def under_wait_for():
        await asyncio.wait_for(nested(asyncio.Event()), 60)

    background(under_timeout(), "timeout")
    background(under_fail_after(), "fail_after")
    background(under_wait_for(), "wait_for")
    yield


@contextlib.asynccontextmanager
async def children_of_a_parent_with_a_timeout():
    async def at_the_end():
        async with asyncio.timeout(60):
            async with asyncio.TaskGroup() as group:
                group.create_task(wait_on(asyncio.Event()), name="child")

    async def within():
        async with asyncio.timeout(60):
            async with asyncio.TaskGroup() as group:
                group.create_task(wait_on(asyncio.Event()), name="child")
                await asyncio.get_running_loop().create_future()

    async def within_anyio():
        with anyio.fail_after(60):
            async with anyio.create_task_group() as group:
                group.start_soon(wait_on, asyncio.Event(), name="child")
                await asyncio.get_running_loop().create_future()

    async def gathers():
        async with asyncio.timeout(60):
            await asyncio.gather(wait_on(asyncio.Event()), nested(asyncio.Event()))

    for each in (at_the_end, within, within_anyio, gathers):
        background(each(), each.__name__)
    yield


@contextlib.asynccontextmanager
async def event_in_a_weak_dictionary():
    event = asyncio.Event()
    BY_NAME["one"] = event
    background(wait_on(event), "waits")
    del event
    yield


@contextlib.asynccontextmanager
async def future_in_a_dict():
    waiting = {"answer": asyncio.get_running_loop().create_future()}
    HELD.append(waiting)

    async def wait():
        await waiting["answer"]

    background(wait(), "waits")
    yield


@contextlib.asynccontextmanager
async def object_by_its_own_dict():
    session = Session()
    HELD.append(vars(session))
    background(session.serve(), "serves")
    del session
    yield


@contextlib.asynccontextmanager
async def finalizer():
    event = asyncio.Event()
    owner = Session()
    HELD.append(owner)
    weakref.finalize(owner, event.set)
    background(wait_on(event), "waits")
    del event
    yield


@contextlib.asynccontextmanager
async def subprocess():
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", "input()", stdin=-1)
    background(process.wait(), "waits")
    yield
    process.stdin.close()
    await process.wait()


@contextlib.asynccontextmanager
async def server():
    started = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
    background(started.serve_forever(), "serves")
    yield
    started.close()


@contextlib.asynccontextmanager
async def context_manager_of_a_living_task():
    gate = Session()

    async def opens():
        await asyncio.sleep(60)
        gate.ready.set()

    async def waits():
        async with contextlib.AsyncExitStack() as stack:
            stack.callback(print)
            await gate.serve()

    background(opens(), "opens")
    background(waits(), "waits")
    yield


@contextlib.asynccontextmanager
async def object_that_holds_its_task():
    holder = Session()
    holder.task = asyncio.create_task(wait_on(asyncio.Event()), name="held")
    HELD.append(holder)
    del holder
    yield


@contextlib.asynccontextmanager
async def thread_that_waits_for_a_coroutine():
    loop, asked = asyncio.get_running_loop(), threading.Event()

    def ask():
        future = asyncio.run_coroutine_threadsafe(nested(asyncio.Event()), loop)
        asked.set()
        with contextlib.suppress(BaseException):
            future.result(60)

    thread = threading.Thread(target=ask)
    thread.start()
    assert asked.wait(20)
    yield
    for task in asyncio.all_tasks() - {asyncio.current_task()}:
        task.cancel()
    await asyncio.sleep(0)
    await asyncio.to_thread(thread.join)


@contextlib.asynccontextmanager
async def borrowed_by_a_generator():
    def borrows(event):
        use(event, (yield))

    async def async_borrows(event):
        use(event, (yield))

    one, two = asyncio.Event(), asyncio.Event()
    generator, asynchronous = borrows(one), async_borrows(two)
    next(generator)
    await anext(asynchronous)
    HELD.extend([one, two])

    async def wait(event, _):
        await event.wait()

    background(wait(one, generator), "generator")
    background(wait(two, asynchronous), "asynchronous")
    del one, two, generator, asynchronous
    yield


ALIVE = [
    sleeping,
    queue_of_a_module,
    queue_of_a_living_task,
    queue_of_a_runnable_task,
    queue_of_a_thread,
    queue_of_a_thread_local,
    queue_in_a_context,
    closure_of_a_timer,
    method_of_a_timer,
    timer_that_cancels,
    partial_of_a_reader,
    socket_read,
    raw_socket_read,
    executor,
    anyio_worker,
    timeouts,
    children_of_a_parent_with_a_timeout,
    event_in_a_weak_dictionary,
    future_in_a_dict,
    object_by_its_own_dict,
    finalizer,
    subprocess,
    server,
    context_manager_of_a_living_task,
    object_that_holds_its_task,
    thread_that_waits_for_a_coroutine,
    borrowed_by_a_generator,
]


def test_tasks_that_something_can_wake_or_end_are_not_found(loop_name):
    """The leaked task beside them is found. On a failure the names say which task was wrong."""

    async def main():
        await orphaned_consumer()
        async with contextlib.AsyncExitStack() as stack:
            for alive in ALIVE:
                await stack.enter_async_context(alive())
            await settle()
            return await leaked()

    assert run(main(), loop_name, debug=False) == {"leaked consumer"}


def test_the_task_that_a_loop_runs_until_it_is_done_is_not_found(loop_name):
    """It waits for ever on purpose, until a signal ends it."""
    found = []

    def other_thread(loop, main):
        async def look():
            return await search([main])

        found.append(asyncio.run_coroutine_threadsafe(look(), loop).result())
        loop.call_soon_threadsafe(main.cancel)

    async def main():
        loop = asyncio.get_running_loop()
        thread = threading.Thread(target=other_thread, args=(loop, asyncio.current_task()))
        thread.start()
        HELD.append(thread)
        del thread
        await loop.create_future()

    with pytest.raises(asyncio.CancelledError):
        run(main(), loop_name)
    HELD[0].join()
    assert found == [set()]


def test_a_search_keeps_nothing_alive():
    """All objects are freed as they would be without the search."""

    async def main():
        session = Session()
        refs = [weakref.ref(session), weakref.ref(session.condition)]
        task = asyncio.create_task(session.serve(), name="leaked")
        refs.append(weakref.ref(task))
        BACKGROUND.add(task)
        del session
        await settle()
        before = gc.get_threshold(), gc.isenabled(), gc.get_freeze_count()
        await leaked()
        assert (gc.get_threshold(), gc.isenabled(), gc.get_freeze_count()) == before
        BACKGROUND.clear()
        task.cancel()
        await asyncio.wait([task])
        del task
        gc.collect()
        return [ref() for ref in refs]

    assert run(main()) == [None] * 3


def test_leaks_are_found_among_thousands_of_tasks():
    """A module refers to the events of half of the tasks, and nothing to those of the others."""

    async def main():
        for number in range(1000):
            held = asyncio.Event()
            HELD.append(held)
            background(wait_on(held), f"held {number}")
            background(wait_on(asyncio.Event()), f"leaked {number}")
        del held
        await settle()
        return await leaked()

    assert run(main()) == {f"leaked {number}" for number in range(1000)}


def test_a_search_can_be_cancelled_at_any_point():
    """After that it keeps nothing alive."""

    async def main():
        for _ in range(200):
            background(Session().serve(), "leaked")
        await settle()
        refs = [weakref.ref(task._fut_waiter) for task in BACKGROUND]
        for iterations in range(1, 40, 6):
            now = iter(range(10**9))
            searching = asyncio.create_task(search(clock=lambda now=now: next(now)))
            for _ in range(iterations):
                await asyncio.sleep(0)
            searching.cancel()
            with pytest.raises(asyncio.CancelledError):
                await searching
        del searching
        for task in list(BACKGROUND):
            task.cancel()
        del task
        await settle()
        return [ref for ref in refs if ref() is not None]

    assert run(main()) == []


def test_leaks_are_found_while_tasks_are_created(loop_name):
    """Tasks pass a shared queue on to one another while the search runs."""

    async def main():
        queue = asyncio.Queue()
        background(consume(queue), "always waits")
        shared = [queue]
        del queue

        async def use():
            mine = shared.pop()
            mine.put_nowait(1)
            await asyncio.sleep(0)
            shared.append(mine)

        async def keep_making():
            while True:
                await asyncio.create_task(use())

        background(keep_making(), "makes")
        await orphaned_consumer()
        await settle()
        now = iter(range(10**9))
        found = set()
        for _ in range(3):
            found |= await search()
        found |= await search(clock=lambda: next(now) / 4000)
        return {task.get_name() for task in found}

    assert run(main(), loop_name, debug=False) == {"leaked consumer"}


def suspended_frames(local):
    def function(*values):
        return values

    async def wait():
        await asyncio.get_running_loop().create_future()

    async def in_call(local):
        function(local, await wait())

    async def in_with(local):
        async with contextlib.AsyncExitStack() as stack:
            function(local, stack, [local, await wait()])

    async def in_loop(local):
        for each in (local, local):
            function(each, local, f"{await wait()}")

    return [asyncio.create_task(each(local)) for each in (in_call, in_with, in_loop)]


def test_a_reference_that_a_frame_only_borrows_is_not_counted():
    """CPython 3.14 shows the garbage collector more references of a frame than there are."""

    def plain(local):
        use(local, (yield))

    async def asynchronous(local):
        use(local, (yield local))

    async def main():
        local = Session()
        local.__dict__.clear()
        before = sys.getrefcount(local)
        tasks = suspended_frames(local)
        await settle()
        frames = [task.get_coro() for task in tasks]
        generator, other = plain(local), asynchronous(local)
        next(generator)
        await anext(other)
        frames += [generator, other]
        shown = sum(each is local for frame in frames for each in referents(frame))
        held = sys.getrefcount(local) - before
        await other.aclose()
        return shown, held

    shown, held = run(main())
    assert 5 <= shown <= held


def test_no_slice_is_long():
    """The clock advances by a millisecond whenever it is read."""
    iterations = 0

    async def main():
        nonlocal iterations
        for _ in range(50):
            background(wait_on(asyncio.Event()), "leaked")
        await settle()
        ticks = 0

        def clock():
            nonlocal ticks
            ticks += 1
            return ticks / 1000

        async def count():
            nonlocal iterations
            while True:
                iterations += 1
                await asyncio.sleep(0)

        background(count(), "counts")
        await search(clock=clock)
        return ticks

    ticks = run(main(), debug=False)  # debug mode would make each step take longer
    assert iterations > ticks / 10


def test_a_server_with_idle_connections_has_no_leaks(loop_name):
    """Only a handler that waits for an event of its own is found."""
    app = FastAPI()

    @app.get("/leaks")
    async def leaks():
        return sorted(await leaked())

    is_stuck = threading.Event()

    @app.get("/stuck")
    async def stuck():
        asyncio.current_task().set_name("leaked handler")
        is_stuck.set()
        await asyncio.Event().wait()

    with (
        serve(app, loop=loop_name, timeout_graceful_shutdown=1) as port,
        contextlib.ExitStack() as stack,
    ):
        for _ in range(20):
            connection = http.client.HTTPConnection("127.0.0.1", port)
            stack.callback(connection.close)
            connection.request("GET", "/nothing")
            assert connection.getresponse().read()
        connection.request("GET", "/leaks")
        assert connection.getresponse().read() == b"[]"
        connection.request("GET", "/stuck")
        assert is_stuck.wait(20)
        other = http.client.HTTPConnection("127.0.0.1", port)
        stack.callback(other.close)
        other.request("GET", "/leaks")
        assert other.getresponse().read() == b'["leaked handler"]'


def test_all_apps_of_a_process_have_the_same_leaks():
    """Each app marks and counts what the latest search found, whichever app did it."""

    async def main():
        apps = [LeakCollector(TaskCollector()) for _ in range(2)]
        background(wait_on(asyncio.Event()), "leaked, then held")
        background(wait_on(asyncio.Event()), "leaked")
        await settle()
        samples = (await apps[0].snapshot())().samples
        first = [app.count() for app in apps], await marked()
        HELD.extend(task._fut_waiter for task in BACKGROUND if task.get_name() != "leaked")
        await apps[1].snapshot()
        second = [app.count() for app in apps], await marked()
        return len(samples), first, second

    samples, first, second = run(main())
    assert samples == 2
    assert first == ([2, 2], {"leaked", "leaked, then held"})
    assert second == ([1, 1], {"leaked"})


async def marked():
    """Return the names of the tasks that a dump of all tasks marks as leaked."""
    tasks = [task async for task in TaskCollector().goroutines()]
    return {dict(task.labels)["task"] for task in tasks if task.leaked}


def test_a_search_that_is_cut_says_so(monkeypatch):
    """The profile and the end of the dump say it. The leaks that were found are right."""

    async def main():
        async def wait():
            await asyncio.get_running_loop().create_future()

        tasks = [asyncio.create_task(wait()) for _ in range(3)]
        await asyncio.sleep(0)
        collector = LeakCollector(TaskCollector())
        whole = (await collector.snapshot())()
        monkeypatch.setattr(leak_search, "MAX_OBJECTS", 2)
        cut = (await collector.snapshot())()
        last = [each async for each in collector.goroutines()][-1]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return whole, cut, last

    whole, cut, last = asyncio.run(main(), debug=False)
    assert whole.comments == ()
    assert cut.comments == ("the search was cut at 200,000 objects: leaks may be missing",)
    assert last.state == cut.comments[0]


def test_what_tasks_reach_is_not_searched_if_they_can_be_woken():
    """Of an application's 50,000 objects, a search needs few to see that the tasks can be woken."""

    class Route:
        def __init__(self):
            self.handlers = {"get": [self]}

    async def main():
        application = [[Route() for _ in range(100)] for _ in range(250)]

        async def use(application, event):
            await event.wait()

        event, queue = asyncio.Event(), asyncio.Queue()
        asyncio.get_running_loop().call_later(60, event.set)
        HELD.append(queue)
        background(use(application, event), "woken by a timer")
        background(consume_with(application, queue), "woken by a module")
        await asyncio.sleep(0)
        steps = 0

        def clock():
            nonlocal steps
            steps += 1
            return 0.0

        scan = await TaskCollector().begin_scan()
        found, is_cut = await find_leaked(asyncio.all_tasks(), scan.awaited, clock=clock)
        return found, is_cut, steps

    found, is_cut, steps = asyncio.run(main(), debug=False)
    assert found == set()
    assert not is_cut
    assert steps < 40_000


async def consume_with(_, queue):
    await queue.get()
