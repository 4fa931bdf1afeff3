"""The frames of a suspended greenlet are in the chain of the task that runs it."""

from __future__ import annotations

import asyncio
import contextlib
import threading

import greenlet
import pytest

from asgi_pprof.collectors.goroutine.collector import TaskCollector
from asgi_pprof.native.core import native
from asgi_pprof.runtime.chains import await_chain
from asgi_pprof.runtime.frames import MAX_DEPTH
from asgi_pprof.runtime.tasks import coroutine_of
from tests.collectors.goroutine.test_collector import names, tasks_of
from tests.loops import iterations, run, until
from tests.programs import run_program


async def greenlet_spawn(function, *arguments):
    """Run a function in a greenlet, as SQLAlchemy's coroutine of this name does."""
    context = greenlet.greenlet(function, greenlet.getcurrent())
    result = context.switch(*arguments)
    while not context.dead:
        result = context.switch(await result)
    return result


def await_only(awaitable):
    return greenlet.getcurrent().parent.switch(awaitable)


def recurse(depth, event):
    if depth:
        return recurse(depth - 1, event)
    return await_only(event.wait())


def codes(chain):
    return [code.co_name for _, code, _ in chain]


@contextlib.asynccontextmanager
async def spawned(function, *arguments):
    """Yield a task that runs a function in a greenlet, after it has begun."""
    task = asyncio.create_task(greenlet_spawn(function, *arguments), name="it")
    await iterations()
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def test_its_frames_are_between_the_coroutines(loop_name):
    """They come after the coroutine that runs it, and before what the function awaits."""

    async def main():
        async with spawned(recurse, 1, asyncio.Event()) as task:
            chain = codes(await_chain(coroutine_of(task)))
            found = (await tasks_of())["it"]
        return chain, found

    chain, found = run(main(), loop_name)
    assert chain == ["greenlet_spawn", "recurse", "recurse", "await_only", "wait"]
    assert found.state == "Event.wait"
    assert [each.split(".")[-1] for each in names(found.stack)] == chain[::-1]


def test_each_line_is_the_one_that_waits():
    """The line of a frame is where its call is, not where the function begins."""

    def waits(event):
        await_only(event.wait())  # the second of two lines
        return 1

    async def main():
        async with spawned(waits, asyncio.Event()):
            return (await tasks_of())["it"]

    lines = {each.function.name.split(".")[-1]: each.line for each in run(main()).stack}
    assert lines["waits"] == waits.__code__.co_firstlineno + 1


def test_of_many_frames_the_innermost_are_kept():
    """The chain says that it was cut, as any other."""

    async def main():
        async with spawned(recurse, 300, asyncio.Event()) as task:
            return codes(await_chain(coroutine_of(task)))

    chain = run(main())
    assert chain[-2:] == ["await_only", "wait"]
    assert chain[:-2] == ["recurse"] * (MAX_DEPTH - 1)


def test_greenlets_of_greenlets_are_followed():
    """SQLAlchemy's may be nested: a function awaits a coroutine that runs another."""

    def outer(event):
        return await_only(greenlet_spawn(recurse, 0, event))

    async def main():
        async with spawned(outer, asyncio.Event()) as task:
            return codes(await_chain(coroutine_of(task)))

    assert run(main()) == [
        *["greenlet_spawn", "outer", "await_only"],
        *["greenlet_spawn", "recurse", "await_only", "wait"],
    ]


@pytest.mark.parametrize("value", [None, 1, object(), type("greenlet", (), {"gr_frame": 1})()])
def test_what_is_no_greenlet_is_passed_over(value):
    """Another coroutine may have the same name, and a variable of the same name."""

    async def greenlet_spawn(context):
        await asyncio.Event().wait()

    async def main():
        task = asyncio.create_task(greenlet_spawn(value))
        await iterations()
        chain = codes(await_chain(coroutine_of(task)))
        task.cancel()
        return chain

    assert run(main()) == ["greenlet_spawn", "wait"]


def test_greenlet_is_not_loaded():
    """Tasks are read without it if the application does not use it."""
    program = """
        import asyncio, sys
        from asgi_pprof.runtime.chains import await_chain

        async def greenlet_spawn(context):
            await asyncio.sleep(0)

        coroutine = greenlet_spawn(1)
        coroutine.send(None)
        print([code.co_name for _, code, _ in await_chain(coroutine)], "greenlet" in sys.modules)
    """
    assert run_program(program).strip() == "['greenlet_spawn', 'sleep', '__sleep0'] False"


def test_greenlets_that_switch_on_another_thread_do_no_harm():
    """They are read while they go on: the frames are those of one moment, or none."""
    program = """
        import asyncio, sys, threading
        from asgi_pprof.runtime.chains import await_chain
        from asgi_pprof.runtime.tasks import coroutine_of
        from tests.runtime.test_greenlets import await_only, codes, greenlet_spawn

        sys.setswitchinterval(1e-6)
        tasks, end = [], threading.Event()

        def down(depth):
            return down(depth - 1) if depth else await_only(asyncio.sleep(0))

        def switch():
            depth = 0
            while not end.is_set():
                depth = (depth + 7) % 50
                down(depth)
                list(map(down, [depth]))

        async def main():
            tasks[:] = [asyncio.create_task(greenlet_spawn(switch)) for _ in range(5)]
            await asyncio.gather(*tasks)

        thread = threading.Thread(target=asyncio.run, args=(main(),))
        thread.start()
        seen = 0
        while seen < 2000:
            for task in tasks:
                names = codes(await_chain(coroutine_of(task)))
                assert set(names) <= {"greenlet_spawn", "switch", "down", "await_only", "sleep",
                    "__sleep0"}, names
                seen += "switch" in names
        end.set()
        thread.join()
        print("done")
    """
    assert run_program(program, options=()).strip() == "done"


@pytest.mark.skipif(native is None, reason="a loop is found by its frames, which are not there")
def test_a_task_that_runs_in_a_greenlet_is_running(loop_name):
    """It blocks its loop, in another thread: the greenlet's frames say with what."""
    begun, end = threading.Event(), threading.Event()

    def blocks():
        begun.set()
        end.wait()

    async def outermost():
        await greenlet_spawn(blocks)

    async def other():
        await asyncio.create_task(outermost(), name="it")

    async def main():
        return (await tasks_of(TaskCollector(answer_s=0.05)))["it"]

    thread = threading.Thread(target=run, args=(other(), loop_name))
    thread.start()
    try:
        assert begun.wait(20)
        found = run(main())
    finally:
        end.set()
        thread.join(20)
    assert found.state == "running"
    stack = [name.split(".")[-1] for name in names(found.stack)]
    assert stack == ["wait", "wait", "blocks", "outermost"]


def test_a_statement_of_sqlalchemy_is_in_the_chain(loop_name):
    """A task waits for the database's answer; the statement's frames show what for."""
    pytest.importorskip("aiosqlite")
    asyncio_engine = pytest.importorskip("sqlalchemy.ext.asyncio")
    from sqlalchemy import event, text

    begun, go_on = threading.Event(), threading.Event()

    def hold():
        begun.set()
        go_on.wait()
        return 1

    async def main():
        engine = asyncio_engine.create_async_engine("sqlite+aiosqlite://")

        @event.listens_for(engine.sync_engine, "connect")
        def connect(connection, _):
            connection.create_function("hold", 0, hold)

        async def ask():
            async with engine.connect() as connection:
                return await connection.scalar(text("SELECT hold()"))

        task = asyncio.create_task(ask(), name="it")
        try:
            await until(begun.is_set)
            found = (await tasks_of())["it"]
        finally:
            go_on.set()
            assert await task == 1
            await engine.dispose()
        return found

    stack = names(run(main(), loop_name).stack)
    execute = stack.index("sqlalchemy.engine.default.DefaultDialect.do_execute")
    spawn = next(at for at, name in enumerate(stack) if name.endswith(".greenlet_spawn"))
    assert execute < spawn < next(at for at, name in enumerate(stack) if name.endswith("ask"))
    assert any(name.startswith("aiosqlite.") for name in stack[:execute])
