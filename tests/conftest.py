"""Fixtures for all tests, among them the check that a test leaves nothing behind."""

from __future__ import annotations

import _signal
import asyncio
import contextlib
import gc
import os
import threading
import time
from pathlib import Path

import pytest
import uvloop
from hypothesis import settings

from asgi_pprof.collectors.custom import custom_profiles
from asgi_pprof.runtime.malloc import _mallinfo2
from asgi_pprof.runtime.tasks import TaskList, alive
from tests.servers import ServerProcess, serve_process
from tests.state import clock_timers, process_state

settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")

SERVERS = {"shop", "any_shop", "pure_shop", "service", "any_service"}
"""Fixtures whose server outlives the test."""


def _left_behind() -> dict[str, object]:
    """Return all state of the process that a profiler could leave changed."""
    return {
        **process_state(),
        "clock timers": clock_timers(),
        "Thread.start": threading.Thread.start,
        "for SIGPROF": (_signal.signal, os.execv, os.execve),
        "threading": (threading.Lock, threading.RLock, threading.Condition.wait),
        "asyncio": (asyncio.Lock.acquire, asyncio.Event.wait, asyncio.Queue.get),
        "callbacks": [each for each in gc.callbacks if not _is_hypothesis(each)],
        "descriptors": len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0,
        "custom profiles": set(custom_profiles()),
        "tasks": {id(task) for task in alive(TaskList().tasks())},
    }


def _is_hypothesis(callback) -> bool:
    # Hypothesis installs a callback at its first use and keeps it.
    return (getattr(callback, "__module__", "") or "").startswith("hypothesis.")


@pytest.fixture(autouse=True)
def nothing_left_behind(request):
    """Fail any test that leaves a timer, handler, thread, patch or tracing behind."""
    for shared in SERVERS & set(request.fixturenames):
        request.getfixturevalue(shared)  # the server outlives the test, so it is started before
    before = _left_behind()
    yield
    after = {}
    for attempt in range(50):
        after = _left_behind()
        for count in ("descriptors", "native threads"):
            after[count] = max(after[count], before[count])  # fewer: an earlier test's ended
        if after == before:
            return
        # Garbage may still refer to it, or a thread may need a moment to end.
        gc.collect()
        time.sleep(0.05 * (attempt > 0))
    changed = {name: (before[name], after[name]) for name in before if before[name] != after[name]}
    pytest.fail(f"left behind: {changed}")


@pytest.fixture(scope="session", autouse=True)
def _first_uses_are_over():
    """Let uvloop and ctypes open the descriptor that they keep from their first use."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(asyncio.sleep(0))
    _mallinfo2()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    """Start slow tests first; otherwise the other workers wait for them at the end."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def pytest_collection_finish(session):
    """Exclude the objects that pytest's collection made from later garbage collections."""
    gc.collect()
    gc.freeze()


@pytest.fixture(params=["asyncio", "uvloop"])
def loop_name(request) -> str:
    """Run the test with each kind of event loop that uvicorn offers."""
    return request.param


@pytest.fixture(scope="session")
def _servers():
    """Servers by the kind of their loop, started at first use."""
    with contextlib.ExitStack() as stack:
        servers: dict[str, ServerProcess] = {}

        def server(loop: str, native: str = "1") -> ServerProcess:
            if loop + native not in servers:
                env = {} if native == "1" else {"ASGI_PPROF_NATIVE": native}
                servers[loop + native] = stack.enter_context(
                    serve_process("tests.apps:app", loop=loop, env=env)
                )
            return servers[loop + native]

        yield server


@pytest.fixture
def shop(_servers, loop_name):
    """A service with the middleware, in a process of its own, on each kind of loop."""
    return _servers(loop_name)


@pytest.fixture
def pure_shop(_servers):
    """The same service without the C core, where the kind of loop makes no difference."""
    return _servers("asyncio", native="0")


@pytest.fixture
def any_shop(_servers):
    """The same service, where the kind of loop makes no difference."""
    return _servers("asyncio")
