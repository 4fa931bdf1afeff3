"""The reason why a task waits, in asyncio's terms, and the tasks it waits for are found."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import socket
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import anyio
import anyio.to_thread
import pytest

from asgi_pprof.collectors.goroutine.task_tracking import task_tracking
from asgi_pprof.collectors.goroutine.waits import WAITING_FOR_A_THREAD, Wait, Waits
from asgi_pprof.runtime.chains import await_chain
from asgi_pprof.runtime.tasks import waits_for
from tests.collectors.contention.recorded import recording
from tests.loops import LOOPS, iterations, run, until
from tests.programs import run_program

WRAPS = sys.version_info < (3, 12)  # wait_for runs a coroutine in a task of its own


def wait_of(task):
    return Waits().wait(waits_for(task), await_chain(task.get_coro()))


@contextlib.asynccontextmanager
async def waiting(awaitable):
    """Yield a task that awaits this, and cancel the task afterwards."""

    async def wait():
        return await awaitable

    task = asyncio.create_task(wait(), name="waits")
    try:
        await iterations()
        await until(lambda: waits_for(task) is not None)
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def reason_for(awaitable):
    async with waiting(awaitable) as task:
        return wait_of(task).reason


# Coroutine functions that wait in one way each; these use asyncio only.


async def sleep():
    await asyncio.sleep(3600)


async def future():
    await asyncio.get_running_loop().create_future()


async def own_protocol():
    class Waiter:
        def __await__(self):
            yield from asyncio.get_running_loop().create_future()

    await Waiter()


async def event():
    await asyncio.Event().wait()


async def lock():
    held = asyncio.Lock()
    await held.acquire()
    async with held:
        pass


async def semaphore():
    async with asyncio.Semaphore(0):
        pass


async def bounded_semaphore():
    await asyncio.BoundedSemaphore(0).acquire()


async def condition():
    condition = asyncio.Condition()
    async with condition:
        await condition.wait()


async def condition_wait_for():
    condition = asyncio.Condition()
    async with condition:
        await condition.wait_for(lambda: False)


async def condition_not_entered():
    lock = asyncio.Lock()
    await lock.acquire()
    async with asyncio.Condition(lock):
        pass


async def barrier():
    async with asyncio.Barrier(2):
        pass


async def queue_get():
    await asyncio.Queue().get()


async def priority_queue_get():
    await asyncio.PriorityQueue().get()


async def queue_put():
    queue = asyncio.Queue(1)
    queue.put_nowait(1)
    await queue.put(2)


async def queue_join():
    queue = asyncio.Queue()
    queue.put_nowait(1)
    await queue.join()


async def read():
    await asyncio.StreamReader().read(10)


async def read_all():
    await asyncio.StreamReader().read()


async def readline():
    await asyncio.StreamReader().readline()


async def readexactly():
    await asyncio.StreamReader().readexactly(10)


async def readuntil():
    await asyncio.StreamReader().readuntil(b"\n")


async def read_lines():
    async for _ in asyncio.StreamReader():
        pass


async def in_a_timeout():
    async with asyncio.timeout(3600):
        await asyncio.Event().wait()


async def anyio_sleep():
    await anyio.sleep(3600)


async def anyio_sleep_forever():
    await anyio.sleep_forever()


async def anyio_event():
    await anyio.Event().wait()


async def anyio_lock():
    lock = anyio.Lock()

    async def hold():
        async with lock:
            await anyio.sleep_forever()

    async with anyio.create_task_group() as group:
        group.start_soon(hold)
        await iterations(3)
        async with lock:
            pass


async def anyio_semaphore():
    async with anyio.Semaphore(0):
        pass


async def anyio_limiter():
    limiter = anyio.CapacityLimiter(1)
    await limiter.acquire_on_behalf_of("another")
    async with limiter:
        pass


async def anyio_limiter_on_behalf():
    limiter = anyio.CapacityLimiter(1)
    await limiter.acquire_on_behalf_of("one")
    await limiter.acquire_on_behalf_of("another")


async def anyio_condition():
    condition = anyio.Condition()
    async with condition:
        await condition.wait()


async def anyio_receive():
    send, receive = anyio.create_memory_object_stream()
    with send, receive:
        await receive.receive()


async def anyio_receive_each():
    send, receive = anyio.create_memory_object_stream()
    with send, receive:
        async for _ in receive:
            pass


async def anyio_send():
    send, receive = anyio.create_memory_object_stream()
    with send, receive:
        await send.send(1)


async def anyio_fail_after():
    with anyio.fail_after(3600):
        await anyio.Event().wait()


async def anyio_move_on_after():
    with anyio.move_on_after(3600):
        await anyio.sleep_forever()


REASONS = {
    sleep: "sleep",
    future: "Future",
    own_protocol: "Future",
    event: "Event.wait",
    lock: "Lock.acquire",
    semaphore: "Semaphore.acquire",
    bounded_semaphore: "Semaphore.acquire",
    condition: "Condition.wait",
    condition_wait_for: "Condition.wait",
    condition_not_entered: "Lock.acquire",
    barrier: "Barrier.wait",
    queue_get: "Queue.get",
    priority_queue_get: "Queue.get",
    queue_put: "Queue.put",
    queue_join: "Queue.join",
    read: "IO wait",
    read_all: "IO wait",
    readline: "IO wait",
    readexactly: "IO wait",
    readuntil: "IO wait",
    read_lines: "IO wait",
    in_a_timeout: "Event.wait",
    anyio_sleep: "sleep",
    anyio_sleep_forever: "sleep",
    anyio_event: "Event.wait",
    anyio_lock: "Lock.acquire",
    anyio_semaphore: "Semaphore.acquire",
    anyio_limiter: "CapacityLimiter.acquire",
    anyio_limiter_on_behalf: "CapacityLimiter.acquire",
    anyio_condition: "Condition.wait",
    anyio_receive: "MemoryObjectReceiveStream.receive",
    anyio_receive_each: "MemoryObjectReceiveStream.receive",
    anyio_send: "MemoryObjectSendStream.send",
    anyio_fail_after: "Event.wait",
    anyio_move_on_after: "sleep",
}


async def all_reasons():
    return {wait: await reason_for(wait()) for wait in REASONS}


def test_the_reason_is_in_asyncios_terms(loop_name):
    """Asyncio's own coroutines on the stack give the reason as the caller wrote it, not futures."""
    assert run(all_reasons(), loop_name) == REASONS


def test_reasons_are_the_same_while_contention_is_recorded(loop_name):
    """Our wrappers of asyncio's methods are skipped."""
    with recording():
        assert run(all_reasons(), loop_name) == REASONS


async def by_wait_for(awaitable):
    await asyncio.wait_for(awaitable, 3600)


async def by_wait_for_without_a_time(awaitable):
    await asyncio.wait_for(awaitable, None)


async def by_wait_for_twice(awaitable):
    await asyncio.wait_for(asyncio.wait_for(awaitable, 1800), 3600)


async def by_timeout(awaitable):
    async with asyncio.timeout(3600):
        await awaitable


async def by_fail_after(awaitable):
    with anyio.fail_after(3600):
        await awaitable


async def by_move_on_after(awaitable):
    with anyio.move_on_after(3600):
        await awaitable


async def by_own_wrapper(awaitable):
    async def retry():
        return await awaitable

    await asyncio.wait_for(retry(), None)


WRAPPERS = [
    by_wait_for,
    by_wait_for_without_a_time,
    by_wait_for_twice,
    by_timeout,
    by_fail_after,
    by_move_on_after,
    by_own_wrapper,
    functools.partial(asyncio.wait_for, timeout=3600),  # the task's own coroutine
]


BARE = {  # nothing of the application's stands between these and the wrapper
    "Queue.get": lambda: asyncio.Queue().get(),
    "Event.wait": lambda: asyncio.Event().wait(),
    "IO wait": lambda: asyncio.StreamReader().read(),
    "sleep": lambda: asyncio.sleep(3600),
    "wait": lambda: asyncio.wait([asyncio.get_running_loop().create_future()]),
}


@contextlib.contextmanager
def tracking():
    loop = asyncio.get_running_loop()
    task_tracking.attach(loop)
    try:
        yield
    finally:
        task_tracking.detach(loop)


@pytest.mark.parametrize("wrapper", WRAPPERS, ids=lambda each: getattr(each, "__name__", "itself"))
def test_a_wrapper_does_not_hide_the_reason(wrapper, loop_name):
    """What awaits in the same task, or as 3.11's `wait_for` in one of its own, is in its state."""

    async def main():
        with tracking():
            found = {wait: await reason_for(wrapper(wait())) for wait in REASONS}
            bare = {reason: await reason_for(wrapper(wait())) for reason, wait in BARE.items()}
            return found, bare

    assert run(main(), loop_name) == (REASONS, {reason: reason for reason in BARE})


def test_the_state_of_a_wait_for_a_task_made_before_is_task(loop_name):
    """The task that was waited for has a state of its own, on every version."""

    async def main():
        with tracking():
            async with waiting(waits_for_a_task()) as task:
                wait = wait_of(task)
                found = wait.reason, [each.get_name() for each in wait.tasks]
            for each in asyncio.all_tasks() - {asyncio.current_task()}:
                each.cancel()
            return found

    assert run(main(), loop_name) == ("Task", ["a"])


def test_a_wait_for_what_was_completed_first_names_the_tasks(loop_name):
    """The tasks behind `as_completed` are found through `wait_for`."""

    async def completed():
        for each in asyncio.as_completed([named("a"), named("b")]):
            await asyncio.wait_for(each, None)

    async def main():
        async with waiting(completed()) as task:
            wait = wait_of(task)
            found = wait.reason, sorted(each.get_name() for each in wait.tasks)
        for each in asyncio.all_tasks() - {asyncio.current_task()}:
            each.cancel()
        return found

    assert run(main(), loop_name) == ("as_completed", ["a", "b"])


def test_reasons_are_the_same_with_futures_in_python():
    """nest_asyncio puts asyncio's own Python classes in the place of those in C, as this does."""
    program = """
        import sys
        sys.modules["_asyncio"] = None
        from tests.collectors.goroutine.test_waits import REASONS, all_reasons, run
        print(run(all_reasons()) == REASONS)
    """
    assert run_program(program).strip() == "True"


@pytest.mark.parametrize("kind", [asyncio, anyio], ids=lambda kind: kind.__name__)
def test_a_notified_task_waits_for_the_lock(kind, loop_name):
    """If another task holds the lock of the condition, the task waits for the lock."""

    async def main():
        condition = kind.Condition()

        async def wait():
            async with condition:
                await condition.wait()

        async with waiting(wait()) as task:
            before = wait_of(task).reason
            async with condition:
                notified = condition.notify(1)
                if notified is not None:
                    await notified  # anyio 3
                await iterations()
                after = wait_of(task).reason
            await task
        return before, after

    assert run(main(), loop_name) == ("Condition.wait", "Lock.acquire")


# Waits for sockets, processes and threads.


@pytest.mark.parametrize("method", ["sock_recv", "sock_recv_into", "sock_accept", "sock_sendall"])
def test_waiting_for_a_socket_is_io_wait(method, loop_name):
    """This holds for methods of asyncio's loop and of uvloop's."""

    async def main():
        loop = asyncio.get_running_loop()
        with contextlib.ExitStack() as stack:
            ours, theirs = map(stack.enter_context, socket.socketpair())
            listening = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            for each in (ours, theirs, listening):
                each.setblocking(False)
            wait = {
                "sock_recv": lambda: loop.sock_recv(ours, 10),
                "sock_recv_into": lambda: loop.sock_recv_into(ours, bytearray(10)),
                "sock_accept": lambda: loop.sock_accept(listening),
                "sock_sendall": lambda: loop.sock_sendall(ours, bytes(10**7)),
            }[method]
            return await reason_for(wait())

    assert run(main(), loop_name) == "IO wait"


def test_a_blocked_drain_is_io_wait(loop_name):
    """The other side does not read."""

    async def main():
        ours, theirs = socket.socketpair()
        with theirs:
            _, writer = await asyncio.open_connection(sock=ours)
            writer.write(bytes(10**7))
            reason = await reason_for(writer.drain())
            writer.transport.abort()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
        return reason

    assert run(main(), loop_name) == "IO wait"


def test_a_read_from_a_connection_is_io_wait(loop_name):
    """The wait goes through the transport of each kind of loop."""

    async def main():
        ours, theirs = socket.socketpair()
        with theirs:
            reader, writer = await asyncio.open_connection(sock=ours)
            reason = await reason_for(reader.readline())
            writer.close()
            await writer.wait_closed()
        return reason

    assert run(main(), loop_name) == "IO wait"


@pytest.mark.parametrize("side", ["accept", "receive", "send"])
def test_anyios_socket_streams_are_io_wait(side, loop_name):
    """They accept, receive, and send while the other side does not read."""

    async def send(stream):
        while True:
            await stream.send(bytes(10**6))

    async def main():
        if side == "accept":
            async with await anyio.create_tcp_listener(local_host="127.0.0.1") as listener:
                return await reason_for(listener.listeners[0].accept())
        with socket.create_server(("127.0.0.1", 0)) as listening:
            async with await anyio.connect_tcp(*listening.getsockname()) as stream:
                if side == "receive":
                    return await reason_for(stream.receive())
                async with waiting(send(stream)) as task:
                    await until(lambda: not stream._protocol.write_event.is_set())
                    return wait_of(task).reason

    assert run(main(), loop_name) == "IO wait"


def test_a_server_that_serves_is_io_wait(loop_name):
    """This is so with asyncio's server; uvloop's has no Python frames."""

    async def main():
        server = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
        async with server:
            return await reason_for(server.serve_forever())

    expected = "IO wait" if loop_name == "asyncio" else "Future"
    assert run(main(), loop_name) == expected


@pytest.mark.parametrize("method", ["wait", "communicate"])
def test_a_wait_for_a_subprocess_is_named(method, loop_name):
    """The task waits for the process's end, or for its output."""

    async def main():
        process = await asyncio.create_subprocess_exec("sleep", "30")
        reason = await reason_for(getattr(process, method)())
        process.kill()
        await process.wait()
        return reason

    assert run(main(), loop_name) == "subprocess"


def test_a_wait_for_a_subprocess_with_pipes_is_named(loop_name):
    """Tasks of asyncio's own read its output."""

    async def main():
        process = await asyncio.create_subprocess_exec("sleep", "30", stdout=-1, stderr=-1)
        async with waiting(process.communicate()) as task:
            reason = wait_of(task).reason
        process.kill()
        await process.wait()
        return reason

    assert run(main(), loop_name) == "subprocess"


def test_a_wait_for_a_subprocess_of_anyio_is_named(loop_name):
    """anyio's process object awaits asyncio's."""

    async def main():
        async with await anyio.open_process(["sleep", "30"]) as process:
            reason = await reason_for(process.wait())
            process.kill()
        return reason

    assert run(main(), loop_name) == "subprocess"


def test_a_pool_of_processes_is_an_executor():
    """The work of its processes cannot be seen from this one."""

    program = """
        import asyncio, time
        from concurrent.futures import ProcessPoolExecutor
        from multiprocessing import get_context
        from tests.collectors.goroutine.test_waits import run, wait_of, waiting

        async def main():
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                loop = asyncio.get_running_loop()
                async with waiting(loop.run_in_executor(pool, time.sleep, 0)) as task:
                    print(wait_of(task))

        if __name__ == "__main__":
            run(main())
    """
    wait = Wait("executor", (), (), "")
    # Without development mode, in which the loop would log slow callbacks.
    said = run_program(program, options=("-W", "error"))
    assert said.strip() == repr(wait)


# Tasks


async def wait_for_ever():
    await asyncio.Event().wait()


def named(name):
    return asyncio.create_task(wait_for_ever(), name=name)


async def awaits():
    await named("a")


async def awaits_through_await_protocol():
    class Waiter:
        def __init__(self, task):
            self.task = task

        def __await__(self):
            return self.task.__await__()

    await Waiter(named("a"))


async def gathers():
    await asyncio.gather(named("a"), named("b"))


async def gathers_gatherings():
    inner = asyncio.gather(named("b"), named("c"))
    await asyncio.gather(named("a"), asyncio.gather(inner, named("d")))


async def gathers_one_twice():
    task = named("a")
    await asyncio.gather(task, task)


async def waits():
    await asyncio.wait([named("a"), named("b")])


async def waits_for_the_first():
    await asyncio.wait([named("a"), named("b")], return_when=asyncio.FIRST_COMPLETED)


async def waits_with_a_timeout():
    await asyncio.wait([named("a"), named("b")], timeout=3600)


async def waits_for_a_done_one():
    done = asyncio.create_task(asyncio.sleep(0))
    await done
    await asyncio.wait([named("a"), done])


async def waits_for_futures():
    await asyncio.wait([asyncio.get_running_loop().create_future()])


async def as_completed():
    for each in asyncio.as_completed([named("a"), named("b")]):
        await each


async def as_completed_after_one():
    done = asyncio.create_task(asyncio.sleep(0))
    for each in asyncio.as_completed([named("a"), done, named("b")]):
        await each


async def as_completed_by_async_for():
    if sys.version_info < (3, 13):
        return await as_completed()
    async for _ in asyncio.as_completed([named("a"), named("b")]):
        pass


async def task_group():
    async with asyncio.TaskGroup() as group:
        for name in "ab":
            group.create_task(wait_for_ever(), name=name)


async def anyio_task_group():
    async with anyio.create_task_group() as group:
        for name in "ab":
            group.start_soon(wait_for_ever, name=name)


async def shields():
    await asyncio.shield(named("a"))


async def shields_a_gathering():
    await asyncio.shield(asyncio.gather(named("a"), named("b")))


async def waits_for_a_task():
    await asyncio.wait_for(named("a"), 3600)


async def waits_for_a_shielded_task():
    await asyncio.wait_for(asyncio.shield(named("a")), 3600)


async def waits_for_a_gathering():
    await asyncio.wait_for(asyncio.gather(named("a"), named("b")), 3600)


async def awaits_in_a_timeout():
    async with asyncio.timeout(3600):
        await named("a")


TASKS = {
    awaits: ("Task", "a"),
    awaits_through_await_protocol: ("Task", "a"),
    gathers: ("gather", "ab"),
    gathers_gatherings: ("gather", "abcd"),
    gathers_one_twice: ("gather", "a"),
    waits: ("wait", "ab"),
    waits_for_the_first: ("wait", "ab"),
    waits_with_a_timeout: ("wait", "ab"),
    waits_for_a_done_one: ("wait", "a"),
    waits_for_futures: ("wait", ""),
    as_completed: ("as_completed", "ab"),
    as_completed_after_one: ("as_completed", "ab"),
    as_completed_by_async_for: ("as_completed", "ab"),
    task_group: ("TaskGroup", "ab"),
    anyio_task_group: ("TaskGroup", "ab"),
    shields: ("shield", "a"),
    shields_a_gathering: ("shield", "ab"),
    waits_for_a_task: ("Task", "a"),
    waits_for_a_shielded_task: ("shield", "a"),
    waits_for_a_gathering: ("gather", "ab"),
    awaits_in_a_timeout: ("Task", "a"),
}


def test_tasks_that_a_task_waits_for_are_found(loop_name):
    """Each task that is not done is found once; the reason is the function that waits for it."""

    async def tasks_for(wait):
        async with waiting(wait()) as task:
            found = wait_of(task)
            seen = found.reason, "".join(sorted(each.get_name() for each in found.tasks))
            others = asyncio.all_tasks() - {asyncio.current_task(), task}
        for each in others:
            each.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        return seen

    async def main():
        return {wait: await tasks_for(wait) for wait in TASKS}

    assert run(main(), loop_name) == TASKS


def test_the_state_of_a_wait_for_a_coroutine_with_a_timeout(loop_name):
    """
    Up to 3.11 the coroutine runs in a task of its own; later it is awaited directly.

    This is without tracking, so it is not known who made that task.
    """

    async def main():
        async with waiting(asyncio.wait_for(wait_for_ever(), 3600)) as task:
            wait = wait_of(task)
            return wait.reason, [wait_of(each).reason for each in wait.tasks]

    expected = ("Task", ["Event.wait"]) if WRAPS else ("Event.wait", [])
    assert run(main(), loop_name) == expected


def test_the_state_of_a_wait_for_a_future_with_a_timeout(loop_name):
    """The reason is the future, since there is no task."""

    async def main():
        future = asyncio.get_running_loop().create_future()
        return await reason_for(asyncio.wait_for(future, 3600))

    assert run(main(), loop_name) == "Future"


def test_the_state_of_a_wait_for_a_thread_with_a_timeout(loop_name):
    """The worker thread's work is found through `wait_for` as well."""

    async def main():
        begun, end = threading.Event(), threading.Event()

        def work():
            begun.set()
            end.wait()

        future = asyncio.get_running_loop().run_in_executor(None, work)
        async with waiting(asyncio.wait_for(asyncio.shield(future), 3600)):
            pass
        async with waiting(asyncio.wait_for(future, 3600)) as task:
            await until(begun.is_set)
            wait = wait_of(task)
            end.set()
            await task
        return wait

    wait = run(main(), loop_name)
    assert wait.reason == "executor"
    assert len(wait.work) == 1


@pytest.mark.parametrize("other_loop", LOOPS)
def test_a_task_of_another_loop_is_found(loop_name, other_loop):
    """It is found through the future that `run_coroutine_threadsafe` returns."""
    ready, loops = threading.Event(), []

    async def serve():
        loops.extend([asyncio.get_running_loop(), asyncio.Event()])
        ready.set()
        await loops[1].wait()

    async def main():
        away = asyncio.run_coroutine_threadsafe(wait_for_ever(), loops[0])
        async with waiting(asyncio.wrap_future(away)) as task:
            await until(lambda: list(wait_of(task).tasks))
            wait = wait_of(task)
            (found,) = wait.tasks
            seen = wait.reason, found.get_loop() is loops[0], found.get_coro().__name__
        return seen

    thread = threading.Thread(target=run, args=(serve(), other_loop))
    thread.start()
    assert ready.wait(20)
    try:
        assert run(main(), loop_name) == ("Task", True, "wait_for_ever")
    finally:
        loops[0].call_soon_threadsafe(loops[1].set)
        thread.join()


def test_a_task_queued_for_an_executor_waits_for_a_thread(loop_name):
    """All threads of the pool are busy. `workers` says how many, and how many there may be."""

    async def main():
        loop = asyncio.get_running_loop()
        begun, end = threading.Event(), threading.Event()

        def work():
            begun.set()
            end.wait()

        with ThreadPoolExecutor(1) as pool:
            first = loop.run_in_executor(pool, work)
            await until(begun.is_set)
            async with waiting(loop.run_in_executor(pool, work)) as task:
                wait = wait_of(task)
            end.set()
            await first
        return wait

    wait = run(main(), loop_name)
    assert (wait.reason, wait.workers) == (WAITING_FOR_A_THREAD, "1 of 1 busy")
    assert wait.work == ()


def test_a_task_queued_for_anyios_threads_waits_for_a_thread(loop_name):
    """Their limiter has no token left. A task that acquires the limiter itself does not count."""

    async def main():
        limiter = anyio.CapacityLimiter(1)
        begun, end = threading.Event(), threading.Event()

        def work():
            begun.set()
            end.wait()

        async with waiting(anyio.to_thread.run_sync(work, limiter=limiter)) as first:
            await until(begun.is_set)
            async with waiting(anyio.to_thread.run_sync(work, limiter=limiter)) as second:
                wait = wait_of(second)
            async with waiting(limiter.acquire()) as third:
                other = wait_of(third)
            end.set()
            await first
        return wait, other

    wait, other = run(main(), loop_name)
    assert (wait.reason, wait.workers) == (WAITING_FOR_A_THREAD, "1 of 1 busy")
    assert (other.reason, other.workers) == ("CapacityLimiter.acquire", "")


def test_functions_named_as_asyncios_are_not_taken_for_them():
    """Their files distinguish them."""

    async def sleep():
        await asyncio.get_running_loop().create_future()

    assert run(reason_for(sleep())) == "Future"


def test_tasks_in_variables_of_the_applications_coroutines_do_not_count(loop_name):
    """Only coroutines of asyncio and anyio wait for the tasks in their variables."""

    async def main():
        async def hold():
            other = named("other")  # referred to, and not awaited
            await asyncio.sleep(3600)
            await other

        async with waiting(hold()) as task:
            wait = wait_of(task)
            found = wait.reason, list(wait.tasks)
        for each in asyncio.all_tasks() - {asyncio.current_task()}:
            each.cancel()
        return found

    assert run(main(), loop_name) == ("sleep", [])
