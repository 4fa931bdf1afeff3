"""Slow work runs on two threads at most; one is kept while a middleware lives."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
import weakref
from pathlib import Path

import pytest

from asgi_pprof.labels import current, resolve
from asgi_pprof.native.core import native
from asgi_pprof.offload import run_in_thread, workers, yield_gil
from tests.loops import LOOPS, run
from tests.programs import run_program
from tests.servers import until


def this_thread():
    return threading.get_ident()


@pytest.fixture
def kept():
    """A user of the threads, until the test is over."""
    workers.keep()
    yield
    workers.release()
    until(lambda: workers._threads == 0)


@pytest.mark.parametrize("loop", LOOPS)
def test_one_thread_does_all_work_that_comes_one_by_one(kept, loop):
    """The C library keeps memory for each thread: a new one a profile would take more and more."""

    async def main():
        return {await run_in_thread(this_thread) for _ in range(20)}

    used = run(main(), loop)
    assert threading.get_ident() not in used
    assert len(used) == 1 or not native  # without the C core each ends, and a new one may follow


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads have no names here")
def test_the_threads_have_our_name_and_our_label(kept):
    """Tools that show the system's threads then tell whose they are, and CPU profiles too."""

    def look():
        name = Path(f"/proc/self/task/{threading.get_native_id()}/comm").read_text().strip()
        return name, resolve(current.get())

    async def main():
        return await run_in_thread(look)

    assert run(main()) == ("asgi_pprof", (("asgi_pprof", "own work"),))


def test_of_much_work_two_pieces_run_at_a_time(kept):
    """The rest waits, in order."""
    running, most, order = [], [], []
    free = threading.Event()

    def work(number):
        running.append(number)
        most.append(len(running))
        order.append(number)
        free.wait(20)
        running.remove(number)
        return number

    async def main():
        tasks = [asyncio.create_task(run_in_thread(lambda n=n: work(n))) for n in range(10)]
        await asyncio.to_thread(until, lambda: len(running) == 2)
        await asyncio.sleep(0.01)
        assert sorted(running) == [0, 1]
        free.set()
        return await asyncio.gather(*tasks)

    assert run(main()) == list(range(10))
    assert max(most) == 2
    assert sorted(order[:2]) == [0, 1]
    assert order[2:] == sorted(order[2:])


def test_work_whose_caller_has_gone_is_begun_and_ends_soon(kept):
    """It may have to free what its caller began, as the sampler of a CPU profile."""
    started, free = threading.Event(), threading.Event()
    begun, freed = [], []

    def hold():
        started.set()
        free.wait(20)

    def work():
        try:
            begun.append(True)
            while True:
                yield_gil()
        finally:
            freed.append(True)

    async def main():
        holders = [asyncio.create_task(run_in_thread(hold)) for _ in range(2)]
        await asyncio.to_thread(started.wait, 20)
        waiting = asyncio.create_task(run_in_thread(work))
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        assert begun == []
        free.set()
        await asyncio.gather(*holders)
        await run_in_thread(this_thread)

    run(main())
    until(lambda: freed == begun == [True])


def test_an_idle_thread_keeps_no_result_alive(kept):
    class Result:
        pass

    async def main():
        return weakref.ref(await run_in_thread(Result))

    found = run(main())
    gc.collect()
    until(lambda: found() is None)


def test_without_users_threads_end_with_their_work():
    async def main():
        await asyncio.gather(*(run_in_thread(this_thread) for _ in range(5)))

    assert workers._users == 0
    run(main())
    until(lambda: workers._threads == 0)


def test_an_error_is_the_callers():
    async def main():
        with pytest.raises(ZeroDivisionError):
            await run_in_thread(lambda: 1 / 0)
        return await run_in_thread(this_thread)

    assert run(main())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_has_threads_of_its_own():
    """Those of the parent, and the work that waited for them, do not exist there."""
    program = """
    import asyncio, os, threading, warnings
    from asgi_pprof.offload import run_in_thread, workers

    warnings.simplefilter("ignore")
    workers.keep()
    asyncio.run(run_in_thread(threading.get_ident))
    child = os.fork()
    if child == 0:
        asyncio.run(asyncio.wait_for(run_in_thread(threading.get_ident), 20))
        os._exit(7)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """
    assert run_program(program) == "7\n"


def test_where_no_thread_can_be_started_the_work_is_done_all_the_same(monkeypatch):
    def fail(*_):
        raise RuntimeError("can't start new thread")

    async def main():
        return await run_in_thread(this_thread)

    monkeypatch.setattr("_thread.start_new_thread", fail)
    assert run(main()) == threading.get_ident()
    assert not workers._waiting
