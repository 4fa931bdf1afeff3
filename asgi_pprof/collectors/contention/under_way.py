"""
Waits that have not ended, for the block profile.

A wait under way has the nanoseconds since it began, or since the recording did, and the
count 0: it counts when it ends. So the difference of two profiles has of each wait the
part that lies between them.

Wrappers keep the waits inside them in tables. Waits that began before there were
wrappers are found once, by a look at all tasks and threads, when the first profile of a
recording is read. When such a wait of a task ends, a callback tells of the future that
the task waits for. Threads have no such thing, and are looked at again: after 50 ms, and
then whenever the recording has grown by a 32nd.
"""

from __future__ import annotations

import asyncio
import threading
import time
import weakref
from collections.abc import Callable, Collection
from contextlib import suppress
from typing import Any

from asgi_pprof.collectors.contention.records import MAX_STACKS, OTHERS, ContendedStack
from asgi_pprof.collectors.contention.stack_rules import rules
from asgi_pprof.runtime.chains import Chain, await_chain
from asgi_pprof.runtime.frames import current_frames, generator_local, is_generator
from asgi_pprof.runtime.own_work import (
    are_own_requests_recent,
    has_scope,
    is_own_label_set,
    is_own_scope,
    own_work,
)
from asgi_pprof.runtime.task_labels import context_labels
from asgi_pprof.runtime.tasks import Task, TaskList, alive, coroutine_of, loop_of, waits_for
from asgi_pprof.slices import Slices
from asgi_pprof.stacks import StackKey

clock = time.monotonic_ns

_SLICE_S = 0.001
_POLL_S = 0.05
_POLLS = 32
_OTHERS: ContendedStack = OTHERS.function.name.strip("<>"), StackKey()


def now_ns() -> int:
    """Return the time by the clock of all waits."""
    return clock()


class Wait:
    """
    A wait for one primitive, or of work in a queue.

    Args:
        owner: The recording that it belongs to.
        began_ns: When it began, or that recording did.
        name: What to show at the leaf, if no primitive written in Python is there.
    """

    __slots__ = ("__weakref__", "began_ns", "ended_ns", "name", "owner", "stack")

    def __init__(
        self,
        owner: object,
        began_ns: int,
        name: str = "",
        stack: ContendedStack | None = None,
    ) -> None:
        self.owner = owner
        self.began_ns = began_ns
        self.name = name
        self.stack = stack
        """As a profile has shown it, None if none has; of work in a queue from the start."""
        self.ended_ns = 0

    def has_ended(self, at_ns: int) -> bool:
        """Return whether it had ended by that time."""
        return 0 < self.ended_ns <= at_ns


Delay = tuple[ContendedStack, int]
"""A stack, and nanoseconds of waiting."""


class Waits:
    """What a process waits for inside wrappers; tables by task, by thread and by itself."""

    def __init__(self) -> None:
        self.of_tasks: dict[int, Wait] = {}
        self.of_threads: dict[int, Wait] = {}
        self.of_work: dict[int, weakref.ref[Wait]] = {}
        """Kept alive by the work's future: work that is thrown away waits no more."""

    def add_work(self, wait: Wait) -> None:
        """Add a wait in a queue."""
        key = id(wait)

        def forget(_: object) -> None:
            self.of_work.pop(key, None)

        self.of_work[key] = weakref.ref(wait, forget)

    def clear(self) -> None:
        """Remove all waits, in a forked child: none of its parent's will end there."""
        self.of_tasks.clear()
        self.of_threads.clear()
        self.of_work.clear()


waits = Waits()


class UnderWay:
    """
    Finds the waits that are under way while one recording lasts.

    Args:
        owner: The recording.
        add_ended: Called with nanoseconds and stack when a wait without a wrapper has ended.
    """

    def __init__(self, owner: object, add_ended: Callable[[int, ContendedStack], None]) -> None:
        self._owner = owner
        self._add_ended = add_ended
        self._began_ns = clock()
        self._has_ended = False
        self._is_first = True
        self._stacks: dict[tuple[str, tuple[int, ...]], ContendedStack] = {}
        self._tasks = TaskList()
        self._older_tasks: dict[int, Wait] = {}
        self._older_threads: dict[int, Wait] = {}
        self._callbacks: list[Callable[[], None]] = []  # each removes one
        self._end_polling: Callable[[], None] = lambda: None

    def end(self) -> None:
        """Remove the callbacks. What began before wrappers is no longer found."""
        callbacks = [*self._callbacks, self._end_polling]
        self.forget()
        while callbacks:
            callbacks.pop()()

    def forget(self) -> None:
        """Forget what began before wrappers: in a forked child, none of it will end."""
        self._has_ended, self._is_first = True, False
        self._older_tasks, self._older_threads, self._callbacks = {}, {}, []
        self._end_polling = lambda: None

    async def find(self) -> list[Wait]:
        """Return the waits with their stacks. Those that end meanwhile say so."""
        is_first, self._is_first = self._is_first, False
        found = self._of_threads(is_first)
        slices = Slices(_SLICE_S)
        for task in alive(self._tasks.tasks()):
            with suppress(Exception):  # of a task or a future of the application's own class
                wait = self._of_task(task, is_first)
                if wait is not None:
                    found.append(wait)
            if slices.is_over():
                await slices.yield_to_loop()
        of_work = [each() for each in waits.of_work.copy().values()]
        return [*found, *(each for each in of_work if each and each.owner is self._owner)]

    def _of_task(self, task: Task, is_first: bool) -> Wait | None:
        future, wait = waits_for(task), waits.of_tasks.get(id(task))
        if wait is None or wait.owner is not self._owner:
            wait = self._older_tasks.get(id(task))
        if future is None:
            return _shown(wait)  # it is about to run, and to end its wait
        if self._has_ended or (wait is None and not is_first):
            return None
        if is_own_label_set(context_labels(task)):
            return None
        chain = await_chain(coroutine_of(task))
        places = [(each.code, each.lasti) for each in reversed(chain) if each.code is not None]
        stack = rules.suspended_stack(places)
        if stack is None or _awaits_own_request(chain):
            return None
        stack = self._same(stack)
        if wait is None:
            wait = self._older_tasks[id(task)] = Wait(self._owner, self._began_ns, stack=stack)
            self._watch(wait, future, loop_of(task))
        wait.stack = stack
        return wait

    def _same(self, stack: ContendedStack) -> ContendedStack:
        """Return an equal stack, which all waits there share: there may be 100,000."""
        name, key = stack
        if len(self._stacks) >= MAX_STACKS:
            return self._stacks.get((name, key.places), _OTHERS)
        return self._stacks.setdefault((name, key.places), stack)

    def _watch(self, wait: Wait, future: Any, loop: asyncio.AbstractEventLoop | None) -> None:
        """Notice when a future is done."""

        def ended(_: object) -> None:
            self._end_older(wait)

        # Weakly: the future of a leaked task must not be referred to. It may be thrown away.
        kept = weakref.ref(future, ended)

        def remove() -> None:
            if (future := kept()) is not None:
                _call(loop, future.remove_done_callback, ended)

        self._callbacks.append(remove)
        _call(loop, future.add_done_callback, ended)

    def _end_older(self, wait: Wait) -> None:
        if not wait.ended_ns and wait.stack is not None:
            wait.ended_ns = clock()
            self._add_ended(wait.ended_ns - wait.began_ns, wait.stack)

    def _of_threads(self, is_first: bool) -> list[Wait]:
        known = {
            ident: wait
            for ident, wait in waits.of_threads.copy().items()
            if wait.owner is self._owner
        }
        if is_first:
            stacks = _waiting_threads(None, known)
            older = {
                ident: Wait(self._owner, self._began_ns, stack=stack)
                for ident, stack in stacks.items()
                if ident not in known
            }
            self._older_threads.update(older)
            self._poll_later()
        else:
            self._look_at_older_threads()
            stacks = _waiting_threads(known, known)
        found = [wait for wait in self._older_threads.values() if not wait.ended_ns]
        for ident, wait in known.items():
            wait.stack = stacks.get(ident, wait.stack)
        return [*found, *filter(_shown, known.values())]

    def _look_at_older_threads(self) -> None:
        older = self._older_threads.copy()
        stacks = _waiting_threads(older, {})
        for ident, wait in older.items():
            wrapped = waits.of_threads.get(ident)
            is_same = wrapped is None or wrapped.owner is not self._owner
            if not (is_same and ident in stacks and stacks[ident] == wait.stack):
                self._older_threads.pop(ident, None)
                self._end_older(wait)

    def _poll_later(self) -> None:
        loop = asyncio._get_running_loop()
        if loop is None or not self._older_threads:
            return
        grown_s = (clock() - self._began_ns) / 1e9 / _POLLS
        timer = loop.call_later(max(_POLL_S, grown_s), self._poll)
        self._end_polling = lambda: _call(loop, timer.cancel)

    @own_work
    def _poll(self) -> None:
        self._look_at_older_threads()
        self._poll_later()


async def sum_waits(found: list[Wait], at_ns: int, rate_ns: int) -> tuple[int, list[Delay]]:
    """
    Add up the waits that had not ended at one moment.

    Those shorter than the rate are left out: they would have to be sampled, with the
    chance that they have when they end.

    Returns:
        How many there were, and the nanoseconds of each stack.
    """
    count, delays = 0, dict[int, Delay]()
    slices = Slices(_SLICE_S)
    for wait in found:
        waited_ns = at_ns - wait.began_ns
        if wait.stack is not None and waited_ns >= rate_ns and not wait.has_ended(at_ns):
            count += 1
            before_ns = delays[id(wait.stack)][1] if id(wait.stack) in delays else 0
            delays[id(wait.stack)] = wait.stack, before_ns + waited_ns
        if slices.is_over():
            await slices.yield_to_loop()
    return count, list(delays.values())


def _shown(wait: Wait | None) -> Wait | None:
    """Return a wait that a profile has shown and that has not ended: totals must not fall."""
    return None if wait is None or wait.stack is None or wait.ended_ns else wait


def _waiting_threads(
    idents: Collection[int] | None, known: dict[int, Wait]
) -> dict[int, ContendedStack]:
    """Return the stacks of those of some threads, None for all, that wait for a primitive."""
    found: dict[int, ContendedStack] = {}
    if idents is not None and not idents:
        return found
    stacks = current_frames(None if idents is None else list(idents))
    for ident, thread_stack in stacks.items():
        if ident != threading.get_ident():
            name = known[ident].name if ident in known else ""
            stack = rules.suspended_stack(thread_stack.places(), name)
            if stack is not None:
                found[ident] = stack
    return found


def _awaits_own_request(chain: Chain) -> bool:
    if not are_own_requests_recent():
        return False
    for each in reversed(chain):
        if each.code is not None and has_scope(each.code) and is_generator(each.awaitable):
            return is_own_scope(generator_local(each.awaitable, "scope"))
    return False


def _call(
    loop: asyncio.AbstractEventLoop | None, function: Callable[..., Any], *arguments: Any
) -> None:
    """Call a function on the loop of a future, which is not thread-safe."""
    with suppress(Exception):  # the loop is closed, or its class is the application's own
        if loop is None or loop is asyncio._get_running_loop():
            function(*arguments)
        else:
            loop.call_soon_threadsafe(function, *arguments)
