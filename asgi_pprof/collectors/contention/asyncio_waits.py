"""
Waits of tasks: asyncio's primitives, and anyio's on the asyncio backend.

The methods that wait are wrapped by coroutine functions which ask first
whether there is anything to wait for, and time the original only then. What
one primitive waits for inside another belongs to the outermost. Primitives
made before are seen too, since their methods are looked up on their class. An
`asyncio.Condition` keeps bound methods of its lock, though: of one made before,
waiting to enter `async with` is seen, but not `await condition.acquire()`, nor
who lets others wait for its lock.

anyio's events, streams, limiters and adapters wait on an `asyncio.Event`, and so need
no wrapper of their own; nor does `asyncio.Queue.join`.
"""

from __future__ import annotations

import asyncio
import functools
import importlib
import sys
import time
from asyncio import locks, queues
from collections.abc import Callable
from typing import Any

from asgi_pprof.collectors.contention.stacks import know_primitives
from asgi_pprof.collectors.contention.watch import Target, Watch, Wrap, code_of, mutex

clock = time.monotonic_ns

_blocked: dict[int, bool] = {}
"""By id of a task inside a wrapped method: whether it has had to wait."""

_queues: dict[int, TaskQueue] = {}
"""By id of a lock: who waits for it now."""


class TaskQueue:
    """
    How long tasks have waited for one lock since it was released last.

    A release is charged with the waiting of all who wait, each since it
    began or since the last release, and then lets one of them go. Go takes the
    first and the last for an average of all (runtime/sema.go, semrelease1);
    this is the exact sum, kept as the integral of their number over time.
    """

    __slots__ = ("_granted", "_since_ns", "_waited_ns", "_waiting")

    def __init__(self) -> None:
        self._waiting = 0  # tasks
        self._granted = 0  # those of them who may go, but did not run yet
        self._since_ns = 0
        self._waited_ns = 0

    def enter(self, now_ns: int) -> None:
        """Note that one more waits."""
        self._advance(now_ns)
        self._waiting += 1

    def leave(self, now_ns: int, got_it: bool) -> bool:
        """Note that one waits no longer, and return whether nobody does."""
        self._advance(now_ns)
        self._waiting -= 1
        self._granted = min(self._waiting, max(0, self._granted - got_it))
        return self._waiting <= 0

    def release(self, now_ns: int) -> int | None:
        """Return the nanoseconds that this release is charged with; None if nobody waits."""
        self._advance(now_ns)
        if self._waiting <= self._granted:
            return None
        self._granted += 1
        waited_ns, self._waited_ns = self._waited_ns, 0
        return waited_ns

    def _advance(self, now_ns: int) -> None:
        self._waited_ns += (self._waiting - self._granted) * (now_ns - self._since_ns)
        self._since_ns = now_ns


def forget_waits() -> None:
    """Begin anew, in a forked child: no task of its parent's will run there."""
    _blocked.clear()
    _queues.clear()


def waiting(
    ready: Callable[[Any], object],
    lock: Callable[[Any], object] | None = None,
    called: Callable[..., Any] | None = None,
) -> Wrap:
    """
    Return what wraps a coroutine method that waits.

    Args:
        ready: Tells whether an object will not let its caller wait.
        lock: What others are charged for holding; None if that is nobody.
        called: What to show at the leaf, if not the method.
    """

    def wrap(watch: Watch, original: Callable[..., Any]) -> Callable[..., Any]:
        leaf = code_of(called or original)

        @functools.wraps(original)
        async def wait(self: Any, *args: Any, **kwargs: Any) -> Any:
            try:
                pass_on = not watch.on or ready(self)
            except Exception:
                pass_on = False  # it is for the original to raise
            if pass_on:
                return await original(self, *args, **kwargs)
            key = _task_id()
            outermost = key not in _blocked
            _blocked[key] = True
            queue_id, queue = _enter(lock, self)
            began_ns = clock()
            ended, got_it = True, False
            try:
                result = await original(self, *args, **kwargs)
                got_it = True
                return result
            except GeneratorExit:
                ended = False  # nobody wakes up: the task is thrown away
                raise
            finally:
                now_ns = clock()
                if queue is not None and queue.leave(now_ns, got_it):
                    _queues.pop(queue_id, None)
                if outermost:
                    _blocked.pop(key, None)
                    if ended:
                        watch.waited(now_ns - began_ns, leaf, sys._getframe())

        return wait

    return wrap


def composed(watch: Watch, original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a coroutine method that waits, if at all, in other primitives."""
    leaf = code_of(original)

    @functools.wraps(original)
    async def wait(self: Any, *args: Any, **kwargs: Any) -> Any:
        key = _task_id()
        if not watch.on or key in _blocked:
            return await original(self, *args, **kwargs)
        _blocked[key] = False
        began_ns = clock()
        ended = True
        try:
            return await original(self, *args, **kwargs)
        except GeneratorExit:
            ended = False
            raise
        finally:
            if _blocked.pop(key, False) and ended:
                watch.waited(clock() - began_ns, leaf, sys._getframe())

    return wait


def releasing(watch: Watch, original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a method that releases a lock."""
    leaf = code_of(original)

    @functools.wraps(original)
    def release(self: Any, *args: Any, **kwargs: Any) -> Any:
        queue = _queues.get(id(self))
        if queue is None or not watch.on:
            return original(self, *args, **kwargs)
        now_ns = clock()
        result = original(self, *args, **kwargs)
        waited_ns = queue.release(now_ns)
        if waited_ns is not None:
            watch.released(waited_ns, leaf, sys._getframe())
        return result

    return release


def _task_id() -> int:
    try:
        return id(asyncio.current_task())
    except RuntimeError:
        return 0


def _enter(lock: Callable[[Any], object] | None, primitive: Any) -> tuple[int, TaskQueue | None]:
    if lock is None or not mutex.rate:
        return 0, None
    queue_id = id(lock(primitive))  # it stays alive: who waits for it refers to it
    queue = _queues.get(queue_id)
    if queue is None:
        queue = _queues[queue_id] = TaskQueue()
    queue.enter(clock())
    return queue_id, queue


def _itself(primitive: Any) -> Any:
    return primitive


def _never(primitive: Any) -> bool:
    return False


def _lock_is_free(lock: Any) -> bool:
    return not lock._locked and not lock._waiters


def _queue_has_items(queue: Any) -> bool:
    return not queue.empty() or getattr(queue, "_is_shutdown", False)


def _queue_has_room(queue: Any) -> bool:
    return not queue.full() or getattr(queue, "_is_shutdown", False)


def _anyio_lock_is_free(lock: Any) -> bool:
    return lock._owner_task is None and not lock._waiters


def _anyio_semaphore_is_free(semaphore: Any) -> bool:
    return semaphore._value > 0 and not semaphore._waiters


def _limiter_is_free(limiter: Any) -> bool:
    return not limiter._wait_queue and len(limiter._borrowers) < limiter._total_tokens


def waiting_targets() -> list[Target]:
    """Return the methods that wait."""
    know_primitives(
        (locks.Lock, locks.Event, locks.Condition, locks.Semaphore, locks.Barrier, queues.Queue)
    )
    know_primitives((locks._ContextManagerMixin,))
    targets = [
        Target(locks.Lock, "acquire", waiting(_lock_is_free, _itself)),
        Target(locks.Event, "wait", waiting(lambda event: event._value)),
        Target(locks.Condition, "wait", waiting(_never)),
        Target(
            locks.Condition,
            "__aenter__",
            waiting(lambda each: _lock_is_free(each._lock), called=locks.Lock.acquire),
        ),
        Target(locks.Semaphore, "acquire", waiting(lambda each: not each.locked(), _itself)),
        Target(locks.Barrier, "wait", composed),
        Target(queues.Queue, "get", waiting(_queue_has_items)),
        Target(queues.Queue, "put", waiting(_queue_has_room)),
    ]
    backend = _anyio_backend()
    if backend is not None:
        anyio = sys.modules["anyio"]
        targets += (
            Target(backend.Lock, "acquire", waiting(_anyio_lock_is_free, _itself)),
            Target(backend.Semaphore, "acquire", waiting(_anyio_semaphore_is_free, _itself)),
            Target(anyio.Condition, "wait", waiting(_never)),
        )
    return targets


def releasing_targets() -> list[Target]:
    """Return the methods that release a lock, and of those that wait what only mutex needs."""
    targets = [
        Target(locks.Lock, "release", releasing),
        Target(locks.Semaphore, "release", releasing),  # BoundedSemaphore's calls it
    ]
    backend = _anyio_backend()
    if backend is not None:
        targets += (
            Target(backend.Lock, "release", releasing),
            Target(backend.Semaphore, "release", releasing),
            Target(backend.CapacityLimiter, "release_on_behalf_of", releasing),
            # In the way of every `def` endpoint; for block the event that it waits on will do.
            Target(
                backend.CapacityLimiter,
                "acquire_on_behalf_of",
                waiting(_limiter_is_free, _itself),
            ),
        )
    return targets


def _anyio_backend() -> Any:
    """Return the module with anyio's own primitives, None where it has none (before 4.5)."""
    anyio = sys.modules.get("anyio")
    if anyio is None:
        return None
    try:
        # anyio loads it with the first call in a loop, which may be still to come.
        backend = importlib.import_module("anyio._backends._asyncio")
        streams = importlib.import_module("anyio.streams.memory")
        know_primitives(
            (
                *(backend.Lock, backend.Event, backend.Semaphore, backend.CapacityLimiter),
                *(anyio.Condition, anyio.Lock, anyio.Event, anyio.Semaphore, anyio.CapacityLimiter),
                *(streams.MemoryObjectReceiveStream, streams.MemoryObjectSendStream),
                *_anyio_adapters(),
            )
        )
    except (ImportError, AttributeError, KeyError):
        return None
    return backend


def _anyio_adapters() -> list[object]:
    """Return anyio's stand-ins for primitives made outside a loop."""
    names = vars(sys.modules["anyio._core._synchronization"])
    return [value for name, value in names.copy().items() if name.endswith("Adapter")]
