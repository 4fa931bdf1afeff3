"""What the block and mutex profiles have recorded, and a clock that tests move."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Iterator

from asgi_pprof.collectors.contention import asyncio_waits, lock_classes, threading_waits
from asgi_pprof.collectors.contention.collector import ContentionCollector, ContentionSettings
from asgi_pprof.merge import subtract
from asgi_pprof.profile import Profile, Sample
from asgi_pprof.recorders import contention, set_block_profile_rate, set_mutex_profile_fraction
from tests.servers import until
from tests.valid import check_valid

KINDS = ("block", "mutex")
HOLD_NS = 20_000_000


def take(kind: str) -> Profile:
    """Return a snapshot of one of the two profiles."""
    snapshot = ContentionCollector(contention, kind).snapshot()
    while True:  # it only yields to the loop, so none is needed
        try:
            snapshot.send(None)
        except StopIteration as done:
            profile: Profile = done.value()
            break
    check_valid(profile)
    return profile


class Recorded:
    """Reads what has been recorded since this object was made."""

    def __init__(self) -> None:
        self._before = {kind: take(kind) for kind in KINDS}

    def samples(self, kind: str) -> tuple[Sample, ...]:
        return subtract(take(kind), self._before[kind]).samples

    def of(self, kind: str, function: str) -> tuple[int, int]:
        """Return contentions and nanoseconds of all stacks that a function is in."""
        found = [sample.values for sample in self.samples(kind) if is_in(function, sample)]
        return sum(count for count, _ in found), sum(delay_ns for _, delay_ns in found)

    def stack(self, kind: str, function: str) -> list[str]:
        """Return the names in the one stack that a function is in."""
        (found,) = [names(each) for each in self.samples(kind) if is_in(function, each)]
        return found


def is_in(function: str, sample: Sample) -> bool:
    return any(name.split(".")[-1] == function or name == function for name in names(sample))


def names(sample: Sample) -> list[str]:
    """Return the functions of a stack as class and name, leaf first."""
    return [short(location.function.name) for location in sample.stack]


def short(name: str) -> str:
    return (
        name if name.startswith("<") else ".".join(name.rpartition(".<locals>.")[2].split(".")[-2:])
    )


@contextlib.contextmanager
def recording(block: int = 1, mutex: int = 1) -> Iterator[Recorded]:
    """Record contention inside the `with`."""
    seen = Recorded()
    set_block_profile_rate(block)
    set_mutex_profile_fraction(mutex)
    try:
        yield seen
    finally:
        set_block_profile_rate(0)
        set_mutex_profile_fraction(0)


@contextlib.contextmanager
def asking(**arguments: object) -> Iterator[None]:
    """Enable recording as a middleware with these arguments does, inside the `with`."""
    settings = ContentionSettings(**arguments)
    contention.enable(settings)
    try:
        yield
    finally:
        contention.disable(settings)


def patched() -> dict[str, object]:
    """Return the current value of every attribute that recording replaces."""
    targets = [
        *asyncio_waits.wait_targets(),
        *asyncio_waits.release_targets(),
        *threading_waits.wait_targets(),
        *threading_waits.release_targets(),
        *lock_classes.targets(),
    ]
    return {f"{each.owner}.{each.name}": vars(each.owner).get(each.name) for each in targets}


def identical(left: dict[str, object], right: dict[str, object]) -> bool:
    return left.keys() == right.keys() and all(left[name] is right[name] for name in left)


class Clock:
    """
    A clock that stands still until a test moves it.

    Args:
        tick_ns: By how much each reading moves it.
    """

    def __init__(self, tick_ns: int = 0) -> None:
        self.now_ns = 1_000_000_000
        self.tick_ns = tick_ns
        self.readings = 0
        self._readers: queue.SimpleQueue[int] = queue.SimpleQueue()  # no profile sees its waits

    def __call__(self) -> int:
        now_ns = self.now_ns
        self.now_ns += self.tick_ns
        self.readings += 1
        self._readers.put(threading.get_ident())
        return now_ns

    def advance(self, nanoseconds: int) -> None:
        self.now_ns += nanoseconds

    def wait_for_reading(self, thread: threading.Thread) -> None:
        """Wait until that thread has read the clock, as it does when its wait begins."""
        while self._readers.get(timeout=20) != thread.ident:
            pass


def contend_a(lock: threading.Semaphore) -> None:
    with lock:
        pass


def contend_once() -> None:
    """Let one thread wait for another, in `contend_a` and for `hold_b`."""
    lock = threading.Semaphore()
    thread = threading.Thread(target=contend_a, args=(lock,))
    hold_b(lock, thread)
    thread.join()


def hold_b(lock: threading.Semaphore, thread: threading.Thread) -> None:
    with lock:
        thread.start()
        until(lambda: lock._cond._waiters)
