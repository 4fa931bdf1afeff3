"""
What a waiting task waits for: the reason in asyncio's terms, other tasks, a worker thread.

How: the reason is taken from the innermost frames of the chain of awaits, by the
names of asyncio's and anyio's own coroutines, or else from the future. The tasks
it waits for are found where such a coroutine keeps them: a future's children, a
group's tasks, what a callback refers to. Local variables of suspended coroutines
are read as the garbage collector sees them, which changes nothing.

What it costs: about 5 us a task.

What it misses: coroutines of other libraries are not known by name. Their tasks
wait for whatever these await in the end, at worst a plain future. Up to 3.11 the
state of what `wait_for` runs in a task of its own is known if tasks are tracked.

Source: CPython, Lib/asyncio/{tasks,locks,queues,streams,taskgroups}.py; anyio,
_backends/_asyncio.py.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import gc
import itertools
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import FunctionType, GeneratorType
from typing import Any, NamedTuple, TypeVar

from asgi_pprof.runtime.chains import Chain, await_chain
from asgi_pprof.runtime.frames import generator_local
from asgi_pprof.runtime.modules import code_filename
from asgi_pprof.runtime.pools import Work, Workers, tasks_woken_by
from asgi_pprof.runtime.task_records import record_of
from asgi_pprof.runtime.tasks import coroutine_of, waits_for

Task = asyncio.Task[Any]
_Future = TypeVar("_Future", bound=asyncio.Future[Any])

_FEW_CALLBACKS = 16  # more than most futures have
_MOST_CALLBACKS = 10_000  # looked at of one future; what it is bound to is among the first
_MOST_PARTS = 100  # of a gather or the like that are searched for the work of threads

WAITING_FOR_A_THREAD = "waiting for a thread"
_OF_THREADS = ("executor", WAITING_FOR_A_THREAD)

_ANYIO = "anyio._backends._asyncio"
# Module, names in it, and the reason; "" stands for the name itself.
_REASONS: tuple[tuple[str, str, str], ...] = (
    ("asyncio.tasks", "sleep", ""),
    ("asyncio.tasks", "wait _wait", "wait"),
    ("asyncio.tasks", "wait_for _cancel_and_wait", "wait_for"),
    ("asyncio.tasks", "as_completed.<locals>._wait_for_one", "as_completed"),
    ("asyncio.tasks", "_AsCompletedIterator._wait_for_one", "as_completed"),
    ("asyncio.taskgroups", "TaskGroup.__aexit__ TaskGroup._aexit", "TaskGroup"),
    ("asyncio.locks", "Lock.acquire Event.wait Condition.wait Semaphore.acquire", ""),
    ("asyncio.locks", "Condition.wait_for", "Condition.wait"),
    ("asyncio.locks", "Barrier.wait Barrier._wait Barrier._block", "Barrier.wait"),
    ("asyncio.queues", "Queue.get Queue.put Queue.join", ""),
    ("asyncio.streams", "StreamReader._wait_for_data StreamReader.read", "IO wait"),
    ("asyncio.streams", "StreamReader.readline StreamReader.readuntil", "IO wait"),
    ("asyncio.streams", "StreamReader.readexactly StreamReader.__anext__", "IO wait"),
    ("asyncio.streams", "FlowControlMixin._drain_helper StreamWriter.drain", "IO wait"),
    ("asyncio.streams", "StreamWriter.wait_closed", "IO wait"),
    ("asyncio.base_events", "Server.serve_forever Server.wait_closed", "IO wait"),
    *(
        ("asyncio.selector_events", f"BaseSelectorEventLoop.sock_{name}", "IO wait")
        for name in "recv recv_into recvfrom recvfrom_into sendall sendto connect accept".split()
    ),
    (
        "uvloop/loop.pyx",
        "sock_recv sock_recv_into sock_sendall sock_sendto sock_recvfrom sock_recvfrom_into"
        " sock_connect sock_accept create_connection",
        "IO wait",
    ),
    ("asyncio.base_subprocess", "BaseSubprocessTransport._wait", "subprocess"),
    ("asyncio.subprocess", "Process.wait Process.communicate", "subprocess"),
    (_ANYIO, "TaskGroup.__aexit__", "TaskGroup"),
    (_ANYIO, "Event.wait Lock.acquire Semaphore.acquire CapacityLimiter.acquire", ""),
    (_ANYIO, "CapacityLimiter.acquire_on_behalf_of", "CapacityLimiter.acquire"),
    (_ANYIO, "CapacityLimiter.__aenter__", "CapacityLimiter.acquire"),
    *(
        (_ANYIO, f"{name}.{method}", "IO wait")
        for name in (
            "SocketStream UNIXSocketStream TCPSocketListener UNIXSocketListener UDPSocket"
            " ConnectedUDPSocket UNIXDatagramSocket ConnectedUNIXDatagramSocket"
        ).split()
        for method in ("receive", "send", "accept", "receive_fds", "send_fds")
    ),
    (_ANYIO, "AsyncIOBackend.wait_readable AsyncIOBackend.wait_writable", "IO wait"),
    (_ANYIO, "Process.wait", "subprocess"),
    (_ANYIO, "AsyncIOBackend.run_sync_in_worker_thread", "executor"),
    ("anyio._core._synchronization", "Condition.wait", ""),
    ("anyio._core._synchronization", "Condition.wait_for", "Condition.wait"),
    ("anyio.streams.memory", "MemoryObjectReceiveStream.receive", ""),
    ("anyio.streams.memory", "MemoryObjectSendStream.send", ""),
)
_WAIT_FOR = asyncio.wait_for.__code__
# Futures in Python, as nest_asyncio uses them, are awaited through a generator.
_AWAIT_FUTURE = asyncio.futures._PyFuture.__await__.__code__  # type: ignore[attr-defined]
# It has been woken, and waits for the lock that it released meanwhile.
_REACQUIRING = {("Lock.acquire", "Condition.wait")}


class Wait(NamedTuple):
    """
    What a task waits for.

    Args:
        reason: In asyncio's terms, such as "Lock.acquire", "gather" or "Future".
        tasks: The tasks it waits for that are not done.
        work: The work of worker threads that it waits for; of a gather of the first hundred only.
        workers: How busy the threads are that it waits for, such as "40 of 40 busy".
    """

    reason: str
    tasks: Iterable[Task] = ()
    work: tuple[Work, ...] = ()
    workers: str = ""


class Waits:
    """Finds out what tasks wait for, for the length of one scan."""

    def __init__(self) -> None:
        self.workers = Workers()
        # Of futures that many tasks wait for; these are kept, so that no address is used twice.
        self._shared: dict[int, tuple[object, Wait]] = {}
        self._reasons: dict[tuple[str, str], str] = {}
        for module, names, reason in _REASONS:
            # Modules may have been loaded since the last scan. Cython's code has the .pyx file.
            loaded = sys.modules.get(module)
            filename = module if "/" in module else code_filename(loaded)
            if filename:
                for name in names.split():
                    self._reasons[filename, name] = reason or name

    def read_threads(self) -> None:
        """Read again what the worker threads do."""
        self.workers = Workers()

    def wait(self, future: Any, chain: Chain) -> Wait:
        """
        Return what a task waits for.

        Args:
            future: What would wake it.
            chain: Its chain of awaits.
        """
        chain = [each for each in chain if each.code is not _AWAIT_FUTURE]
        library = list(self._library(chain))
        reason = library[-1][0] if library else ""
        if reason == "executor":
            return self._thread(future, library)
        if reason == "as_completed":
            # Up to 3.12 it is a generator, which the coroutine around it has on its stack.
            innermost = [each.awaitable for each in chain if each.code is not _WAIT_FOR]
            return self._several(reason, _held(innermost[-len(library) - 1 :]))
        if reason in ("wait", "TaskGroup"):
            return self._several(reason, _held([awaitable for _, awaitable in library]))
        if reason == "wait_for":
            awaited = _waited_for(library[-1][1], future)
            return self._inside(awaited, future, chain) or self._future(awaited)
        return Wait(reason) if reason else self._future(future)

    def _library(self, chain: Chain) -> Iterator[tuple[str, object]]:
        """Yield reason and awaitable of the innermost frames that are asyncio's or anyio's."""
        last = ""
        for awaitable, code, _ in reversed(chain):
            if code is None:
                continue
            reason = self._reasons.get((code.co_filename, code.co_qualname))
            if reason is None and code.co_filename.startswith(_OWN_FILES):
                continue  # our wrapper of an asyncio method, while contention is recorded
            if reason is None or (last, reason) in _REACQUIRING or (last and code is _WAIT_FOR):
                return
            yield reason, awaitable
            last = reason

    def _inside(self, awaited: Any, future: Any, chain: Chain) -> Wait | None:
        """
        Return the wait of a task that `wait_for` has made of a coroutine.

        None if it has made none, or if what it has made can run. Only up to 3.11 there
        are such tasks.
        """
        waiter = next(tasks_woken_by(future), None)
        if waiter is None or not isinstance(awaited, asyncio.Task):
            return None
        record = record_of(awaited)
        # A coroutine that begins to await is one instruction before where it is suspended.
        places = [(each.code, each.lasti - 2) for each in chain if each.code is not _WAIT_FOR]
        if record.creator != record_of(waiter).id:
            return None
        if places and (record.code, record.lasti) not in places:
            return None  # the waiting task has made it elsewhere
        inner = waits_for(awaited)
        if inner is None:
            return None
        return Wait(self.wait(inner, await_chain(coroutine_of(awaited))).reason, (awaited,))

    def _thread(self, future: object, library: list[tuple[str, object]]) -> Wait:
        reasons = [reason for reason, _ in library]
        if "CapacityLimiter.acquire" in reasons:
            limiter = _self(library[reasons.index("CapacityLimiter.acquire")][1])
            return Wait(WAITING_FOR_A_THREAD, workers=_borrowed(limiter))
        if reasons != ["executor"]:
            return Wait(reasons[0])
        return self._executor(future)

    def _executor(self, future: object) -> Wait:
        work = self.workers.working_for(future)
        return Wait("executor", work=() if work is None else (work,))

    def _future(self, future: Any) -> Wait:
        if isinstance(future, asyncio.Task):
            return Wait("Task", (future,))
        if type(future) is asyncio.tasks._GatheringFuture:  # type: ignore[attr-defined]
            return self._several("gather", _Parts((future,)))
        known = self._shared.get(id(future))
        if known is not None:
            return known[1]
        added = getattr(future, "_callbacks", None) or ()
        callbacks = [each[0] for each in itertools.islice(added, _MOST_CALLBACKS)]
        return self._share(future, callbacks, self._bound(callbacks))

    def _share(self, future: object, callbacks: Sequence[object], wait: Wait) -> Wait:
        """Return a wait, after keeping that of a future which takes long to read."""
        if len(callbacks) > _FEW_CALLBACKS:
            wait = wait._replace(tasks=tuple(wait.tasks))
            self._shared[id(future)] = future, wait
        return wait

    def _bound(self, callbacks: Sequence[object]) -> Wait:
        """Return what a future with these callbacks stands for."""
        if (shielded := _found_in(callbacks, "_outer_done_callback", "inner")) is not None:
            return self._shield(shielded)
        source = _found_in(callbacks, "_call_check_cancel", "source")
        if isinstance(source, concurrent.futures.Future):
            return self._concurrent(source)
        return Wait("Future")

    def _shield(self, shielded: object) -> Wait:
        if isinstance(shielded, asyncio.Task):
            return Wait("shield", _tasks((shielded,)))
        wait = self._future(shielded)
        return wait if wait.reason in _OF_THREADS else wait._replace(reason="shield")

    def _several(self, reason: str, parts: _Parts) -> Wait:
        """Return a wait for several futures: that for a thread if only a thread's work is left."""
        first = list(itertools.islice(parts, _MOST_PARTS))
        waits = [self._future(each) for each in first if not isinstance(each, asyncio.Task)]
        if len(first) == 1 and waits and waits[0].reason in _OF_THREADS:
            return waits[0]
        work = tuple(each for wait in waits for each in wait.work)
        workers = next((wait.workers for wait in waits if wait.workers), "")
        tasks = itertools.chain(_tasks(parts), *(wait.tasks for wait in waits))
        return Wait(reason, _each_once(tasks), work, workers)

    def _concurrent(self, future: concurrent.futures.Future[Any]) -> Wait:
        known = self._shared.get(id(future))
        if known is not None:
            return known[1]
        callbacks = getattr(future, "_done_callbacks", [])[:_MOST_CALLBACKS]
        return self._share(future, callbacks, self._submitted(future, callbacks))

    def _submitted(
        self, future: concurrent.futures.Future[Any], callbacks: Sequence[object]
    ) -> Wait:
        for callback in callbacks:
            task = _closed_over(callback, "_call_check_cancel", "source")
            if isinstance(task, asyncio.Future):  # run_coroutine_threadsafe: of another loop
                return Wait("Task", _tasks((task,)))
        pool = self.workers.queued_in(future)
        if pool is not None:
            return Wait(WAITING_FOR_A_THREAD, workers=f"{pool.busy} of {pool.size} busy")
        return self._executor(future)


_OWN_FILES = str(Path(Waits.wait.__code__.co_filename).parents[1])


class _Parts:
    """Those of some futures, and of the gatherings among them, that are not done, once each."""

    def __init__(self, futures: Iterable[Any]) -> None:
        self._futures = futures

    def __iter__(self) -> Iterator[asyncio.Future[Any]]:
        return _each_once(part for each in self._futures for part in _pending(each))


def _held(coroutines: Iterable[object]) -> _Parts:
    """Return the futures that asyncio's and anyio's own coroutines have in their variables."""
    held = [each for coroutine in coroutines for each in gc.get_referents(coroutine)]
    return _Parts([member for each in held for member in _members(each)])


def _members(held: Any) -> Iterable[Any]:
    name = type(held).__name__
    members: Any = ()
    if type(held) is set:
        members = held  # of asyncio.wait
    elif name in ("TaskGroup", "_AsCompletedIterator"):
        members = getattr(held, "_tasks", None) or getattr(held, "_todo", ())
    elif type(held) is GeneratorType and held.gi_code.co_name == "as_completed":
        members = _closed_over_by(held, "todo")
    return list(members)


def _tasks(futures: Iterable[Any]) -> Iterator[Task]:
    """Yield the tasks that are not done among futures, and in the gatherings among these."""
    parts = (part for each in futures for part in _pending(each))
    return (each for each in parts if isinstance(each, asyncio.Task))


def _each_once(futures: Iterable[_Future]) -> Iterator[_Future]:
    seen: set[int] = set()
    for future in futures:
        if id(future) not in seen:
            seen.add(id(future))
            yield future


def _waited_for(wait_for: object, future: Any) -> Any:
    # Up to 3.11 wait_for awaits a future of its own, which is done when the one
    # that it was given is, or when the time is up.
    others = (each for each in gc.get_referents(wait_for) if isinstance(each, asyncio.Future))
    return next((each for each in others if each is not future), future)


def _pending(future: Any) -> Iterator[asyncio.Future[Any]]:
    if type(future) is asyncio.tasks._GatheringFuture:  # type: ignore[attr-defined]
        for child in future._children:
            yield from _pending(child)
    elif isinstance(future, asyncio.Future) and not future.done():
        yield future


def _found_in(callbacks: Iterable[object], function: str, variable: str) -> object:
    for callback in callbacks:
        found = _closed_over(callback, function, variable)
        if found is not None:
            return found
    return None


def _closed_over(callback: object, function: str, variable: str) -> object:
    """Return a variable that a callback of this name closes over, None if it is another."""
    if type(callback) is not FunctionType or callback.__code__.co_name != function:
        return None
    names = callback.__code__.co_freevars
    if variable not in names or callback.__closure__ is None:
        return None
    return callback.__closure__[names.index(variable)].cell_contents


def _closed_over_by(generator: GeneratorType[Any, Any, Any], variable: str) -> Any:
    if variable not in generator.gi_code.co_cellvars:
        return ()
    return generator_local(generator, variable) or ()


def _self(coroutine: object) -> object:
    for held in gc.get_referents(coroutine):
        if hasattr(type(held), "total_tokens"):
            return held
    return None


def _borrowed(limiter: Any) -> str:
    if limiter is None:
        return ""
    return f"{limiter.borrowed_tokens} of {limiter.total_tokens} busy"
