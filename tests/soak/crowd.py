"""
1,500 threads that live at once: they wait, run now and then, end and are replaced.

One round starts them, keeps them for some seconds and ends them. So it provokes what
many threads do to the samplers and to looks at all threads, and many that start and
end at once.

Few of them are runnable at a time: each thread that waits for the GIL wakes once in a
switch interval, and a thousand such threads leave no time for anything else.
"""

from __future__ import annotations

import queue
import random
import threading
import time
from collections.abc import Callable

from asgi_pprof.runtime.frames import current_frames, why_not
from tests.soak import looks, work

THREADS = 1500
_STARTERS = 10  # one that starts them all would wait for the GIL 1,500 times
_STACK = 512 * 1024  # bytes of each; others that start meanwhile get no more
_LIFE_S = 4.0  # of one round, after all have started
_STEP_S = 0.01
_WOKEN = 5  # of all threads, in one step
_REPLACED = 2  # of all threads, in one step
_ENDED = 10  # at the end, in one step

Inbox = queue.SimpleQueue[bool] | queue.Queue[bool]
"""Wakes a thread: True lets it run, False end."""


def _get(inbox: Inbox) -> bool:
    return inbox.get()


def _get_patiently(inbox: Inbox) -> bool:
    while True:
        try:
            return inbox.get(timeout=random.uniform(5, 20))
        except queue.Empty:
            continue


def _sleep(inbox: Inbox) -> bool:
    while inbox.empty():
        time.sleep(random.uniform(0.5, 3))
    return inbox.get()


_INBOXES: tuple[Callable[[], Inbox], ...] = (queue.SimpleQueue, queue.Queue)  # in C, in Python
_WAYS = (*[_get, _get_patiently] * 8, _sleep)


def _live(inbox: Inbox, wait: Callable[[Inbox], bool]) -> None:
    while wait(inbox):
        work.burn(random.randrange(100))


class _Crowd:
    """The threads of one round, and their inboxes."""

    def __init__(self) -> None:
        self._members: list[tuple[threading.Thread, Inbox]] = []
        self._replaced: list[threading.Thread] = []
        count = THREADS // _STARTERS
        before = threading.stack_size(_STACK)
        starters = [threading.Thread(target=self._add, args=(count,)) for _ in range(_STARTERS)]
        for starter in starters:
            starter.start()
        for starter in starters:
            starter.join()
        threading.stack_size(before)

    def _add(self, count: int) -> None:
        for _ in range(count):
            inbox = random.choice(_INBOXES)()
            thread = threading.Thread(target=_live, args=(inbox, random.choice(_WAYS)))
            thread.start()
            self._members.append((thread, inbox))

    def step(self) -> None:
        """Let some threads run, and replace some."""
        random.shuffle(self._members)
        for _, inbox in self._members[:_WOKEN]:
            inbox.put(True)
        for _ in range(_REPLACED):
            thread, inbox = self._members.pop()
            inbox.put(False)
            self._replaced.append(thread)
        before = threading.stack_size(_STACK)
        self._add(_REPLACED)
        threading.stack_size(before)

    def end(self) -> None:
        """End all threads."""
        for number, (_, inbox) in enumerate(self._members):
            inbox.put(False)
            if number % _ENDED == 0:
                time.sleep(_STEP_S)
        for thread in (*self._replaced, *(thread for thread, _ in self._members)):
            thread.join()


def crowd() -> None:
    """Keep that many threads alive for some seconds."""
    members = _Crowd()
    try:
        if not why_not() and (seen := len(current_frames())) < THREADS:
            raise RuntimeError(f"of {THREADS} threads {seen} are seen")
        end = time.monotonic() + _LIFE_S
        while time.monotonic() < end:
            members.step()
            time.sleep(_STEP_S)
    finally:
        members.end()


CROWD: dict[str, Callable[[], None]] = {"crowd": crowd}
WITH = [*looks.LOOKING, "threads", "interpreters", "own_gils", "coroutines"]
"""What else runs in this slice."""
