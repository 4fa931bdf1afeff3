"""
Waits of tasks: asyncio's primitives, and anyio's on the asyncio backend.

Each method that waits is wrapped in a coroutine function which first tests
whether the method would wait, and times the original only then. If one
primitive waits inside another, the wait belongs to the outermost. Methods are
looked up on their class, so primitives made before are seen too. Only an
`asyncio.Condition` keeps bound methods of its lock: of one made before, the wait
to enter `async with` is seen, but neither `await condition.acquire()` nor the
releases of its lock.

anyio's events, streams, limiters and adapters wait on an `asyncio.Event`, and
`asyncio.Queue.join` does too: they need no wrapper of their own.
"""

from __future__ import annotations

import asyncio
import functools
import sys
import time
from asyncio import locks, queues
from collections.abc import Callable
from typing import Any

from asgi_pprof.collectors.contention.patches import Target, Wrap
from asgi_pprof.collectors.contention.recording import Recording, mutex
from asgi_pprof.collectors.contention.stack_rules import rules
from asgi_pprof.collectors.contention.under_way import Wait, waits
from asgi_pprof.runtime.chains import code_of
from asgi_pprof.runtime.libraries import anyio_backend, anyio_streams

clock = time.monotonic_ns

_blocked: dict[int, bool] = {}
"""By id of a task inside a wrapped method: whether it has had to wait."""

_waiters: dict[int, TaskWaiters] = {}
"""By id of a lock: the tasks that wait for it now."""


class TaskWaiters:
    """
    How long tasks have waited for one lock since its last release.

    A release is charged with the time of all waiters, each since its wait
    began or since the last release, and then grants the lock to one of them. Go
    takes the average of the first and the last for all (runtime/sema.go,
    semrelease1); this is the exact sum, kept as the integral over time of the
    number of waiters.
    """

    __slots__ = ("_granted", "_since_ns", "_waited_ns", "_waiting")

    def __init__(self) -> None:
        self._waiting = 0  # tasks
        self._granted = 0  # those of them that were granted the lock, but did not run yet
        self._since_ns = 0
        self._waited_ns = 0

    def enter(self, now_ns: int) -> None:
        """Add a waiter."""
        self._advance(now_ns)
        self._waiting += 1

    def leave(self, now_ns: int, acquired: bool) -> bool:
        """Remove a waiter, and return whether it was the last."""
        self._advance(now_ns)
        self._waiting -= 1
        self._granted = min(self._waiting, max(0, self._granted - acquired))
        return self._waiting <= 0

    def release(self, now_ns: int) -> int | None:
        """Return the nanoseconds that a release is charged with; None if no task waits."""
        self._advance(now_ns)
        if self._waiting <= self._granted:
            return None
        self._granted += 1
        waited_ns, self._waited_ns = self._waited_ns, 0
        return waited_ns

    def _advance(self, now_ns: int) -> None:
        self._waited_ns += (self._waiting - self._granted) * (now_ns - self._since_ns)
        self._since_ns = now_ns


def reset_in_child() -> None:
    """Remove all waits, in a forked child: none of its parent's tasks will run there."""
    _blocked.clear()
    _waiters.clear()


def wrap_wait(
    ready: Callable[[Any], object],
    is_lock: bool = False,
    called: Callable[..., Any] | None = None,
) -> Wrap:
    """
    Return what wraps a coroutine method that waits.

    Args:
        ready: Returns whether the method would return without waiting.
        is_lock: Whether a release of the object is charged with this wait.
        called: The function to show at the leaf, if not the method itself.
    """

    def wrap(recording: Recording, original: Callable[..., Any]) -> Callable[..., Any]:
        leaf = code_of(called or original)
        rules.add_leaf(leaf)

        @functools.wraps(original)
        async def wait(self: Any, *args: Any, **kwargs: Any) -> Any:
            try:
                delegate = not recording.on or ready(self)
            except Exception:
                delegate = False  # if the object is at fault, the original raises
            if delegate:
                return await original(self, *args, **kwargs)
            key = _task_id()
            outermost = key not in _blocked
            _blocked[key] = True
            # One reading for both profiles: the thread may lose the CPU between two, and
            # releases would be charged with more than was waited.
            began_ns = clock()
            waiters = _waiters_of(self, began_ns) if is_lock and mutex.rate else None
            if outermost:
                under_way = waits.of_tasks[key] = Wait(recording, began_ns)
            ended, acquired = True, False
            try:
                result = await original(self, *args, **kwargs)
                acquired = True
                return result
            except GeneratorExit:
                ended = False  # the task is thrown away: it never runs on
                raise
            finally:
                now_ns = clock()
                if waiters is not None and waiters.leave(now_ns, acquired):
                    _waiters.pop(id(self), None)
                if outermost:
                    _blocked.pop(key, None)
                    waits.of_tasks.pop(key, None)
                    under_way.ended_ns = now_ns
                    if ended:
                        recording.add_wait(now_ns - began_ns, leaf, sys._getframe())
                    else:
                        recording.add_abandoned(now_ns - began_ns, under_way.stack)

        return wait

    return wrap


def wrap_composed_wait(recording: Recording, original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a coroutine method that waits only by way of other wrapped methods, if at all."""
    leaf = code_of(original)
    rules.add_leaf(leaf)

    @functools.wraps(original)
    async def wait(self: Any, *args: Any, **kwargs: Any) -> Any:
        key = _task_id()
        if not recording.on or key in _blocked:
            return await original(self, *args, **kwargs)
        _blocked[key] = False
        began_ns = clock()
        under_way = waits.of_tasks[key] = Wait(recording, began_ns)
        ended = True
        try:
            return await original(self, *args, **kwargs)
        except GeneratorExit:
            ended = False
            raise
        finally:
            waits.of_tasks.pop(key, None)
            under_way.ended_ns = clock()
            if _blocked.pop(key, False):
                waited_ns = under_way.ended_ns - began_ns
                if ended:
                    recording.add_wait(waited_ns, leaf, sys._getframe())
                else:
                    recording.add_abandoned(waited_ns, under_way.stack)

    return wait


def wrap_release(recording: Recording, original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a method that releases a lock."""
    leaf = code_of(original)

    @functools.wraps(original)
    def release(self: Any, *args: Any, **kwargs: Any) -> Any:
        waiters = _waiters.get(id(self))
        if waiters is None or not recording.on:
            return original(self, *args, **kwargs)
        now_ns = clock()
        result = original(self, *args, **kwargs)
        waited_ns = waiters.release(now_ns)
        if waited_ns is not None:
            recording.add_release(waited_ns, leaf, sys._getframe())
        return result

    return release


def _task_id() -> int:
    try:
        return id(asyncio.current_task())
    except RuntimeError:
        return 0


def _waiters_of(lock: object, now_ns: int) -> TaskWaiters:
    # By id: the lock stays alive, since the frames that wait for it refer to it.
    waiters = _waiters.get(id(lock))
    if waiters is None:
        waiters = _waiters[id(lock)] = TaskWaiters()
    waiters.enter(now_ns)
    return waiters


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


def wait_targets() -> list[Target]:
    """Return the methods that wait."""
    rules.add_primitives(
        (locks.Lock, locks.Event, locks.Condition, locks.Semaphore, locks.Barrier, queues.Queue)
    )
    rules.add_primitives((locks._ContextManagerMixin,))
    targets = [
        Target(locks.Lock, "acquire", wrap_wait(_lock_is_free, is_lock=True)),
        Target(locks.Event, "wait", wrap_wait(lambda event: event._value)),
        Target(locks.Condition, "wait", wrap_wait(_never)),
        Target(
            locks.Condition,
            "__aenter__",
            wrap_wait(lambda each: _lock_is_free(each._lock), called=locks.Lock.acquire),
        ),
        Target(locks.Semaphore, "acquire", wrap_wait(lambda each: not each.locked(), is_lock=True)),
        Target(locks.Barrier, "wait", wrap_composed_wait),
        Target(queues.Queue, "get", wrap_wait(_queue_has_items)),
        Target(queues.Queue, "put", wrap_wait(_queue_has_room)),
    ]
    backend = _anyio_backend()
    if backend is not None:
        anyio = sys.modules["anyio"]
        targets += (
            Target(backend.Lock, "acquire", wrap_wait(_anyio_lock_is_free, is_lock=True)),
            Target(backend.Semaphore, "acquire", wrap_wait(_anyio_semaphore_is_free, is_lock=True)),
            Target(anyio.Condition, "wait", wrap_wait(_never)),
        )
    return targets


def release_targets() -> list[Target]:
    """Return the methods that release a lock, and those that wait but matter to mutex only."""
    targets = [
        Target(locks.Lock, "release", wrap_release),
        Target(locks.Semaphore, "release", wrap_release),  # BoundedSemaphore's calls it
    ]
    backend = _anyio_backend()
    if backend is not None:
        targets += (
            Target(backend.Lock, "release", wrap_release),
            Target(backend.Semaphore, "release", wrap_release),
            Target(backend.CapacityLimiter, "release_on_behalf_of", wrap_release),
            # Every `def` endpoint calls this one. Block does without it: it sees the wait for
            # the event inside.
            Target(
                backend.CapacityLimiter,
                "acquire_on_behalf_of",
                wrap_wait(_limiter_is_free, is_lock=True),
            ),
        )
    return targets


def _anyio_backend() -> Any:
    """Return the module with anyio's own primitives; None before anyio 4.5, which has none."""
    anyio, backend, streams = sys.modules.get("anyio"), anyio_backend, anyio_streams
    if anyio is None:
        return None
    try:
        rules.add_primitives(
            (
                *(backend.Lock, backend.Event, backend.Semaphore, backend.CapacityLimiter),
                *(anyio.Condition, anyio.Lock, anyio.Event, anyio.Semaphore, anyio.CapacityLimiter),
                *(streams.MemoryObjectReceiveStream, streams.MemoryObjectSendStream),
                *_anyio_adapters(),
            )
        )
    except (AttributeError, KeyError):
        return None
    return backend


def _anyio_adapters() -> list[object]:
    """Return anyio's classes for primitives that are made outside a loop."""
    names = vars(sys.modules["anyio._core._synchronization"])
    return [value for name, value in names.copy().items() if name.endswith("Adapter")]
