"""Locks of threads: seen where a program makes them, and as good as real ones."""

from __future__ import annotations

import _thread
import copy
import pickle
import queue
import threading
import time

import pytest

from asgi_pprof.collectors.contention.lock_classes import RecordedLock
from tests.collectors.contention.test_collector import is_in, names, recording
from tests.servers import until

KINDS = ("Lock", "RLock")


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    return request.param


def make(kind: str):
    """Make a lock as a program does: by the name in `threading`."""
    return getattr(threading, kind)()


@pytest.mark.parametrize("how", ["with", "acquire", "timeout"])
def test_threads_queueing_on_a_lock(kind, how):
    """One contention each, as long as their own clocks say, and charged to who releases."""
    waited_ns: list[int] = []

    def contend_j() -> None:
        began_ns = time.monotonic_ns()
        if how == "with":
            with lock:
                waited_ns.append(time.monotonic_ns() - began_ns)
        else:
            assert lock.acquire() if how == "acquire" else lock.acquire(timeout=60)
            waited_ns.append(time.monotonic_ns() - began_ns)
            lock.release()

    def hold_k() -> None:
        with lock:
            for thread in threads:
                thread.start()
            until(lambda: len(lock._waiters.waiting_ns) == 3)
            time.sleep(0.2)

    threads = [threading.Thread(target=contend_j) for _ in range(3)]
    with recording() as seen:
        lock = make(kind)
        hold_k()
        for thread in threads:
            thread.join()
    count, delay_ns = seen.of("block", "contend_j")
    assert count == 3
    assert delay_ns == pytest.approx(sum(waited_ns), rel=0.05)
    assert seen.stack("block", "contend_j")[0] == f"<threading.{kind}.acquire>"
    holder = [each for each in seen.samples("mutex") if is_in("hold_k", each)]
    assert [each.values[0] for each in holder] == [1]
    assert names(holder[0])[0] == f"<threading.{kind}.release>"
    assert names(holder[0])[1].endswith("hold_k")
    assert 0.7 * delay_ns < holder[0].values[1] <= delay_ns


def test_only_the_last_release_of_a_reentrant_lock_is_charged():
    """Inner releases let nobody go; what a condition does with the lock is a release."""

    def contend_l() -> None:
        with lock:
            pass

    with recording() as seen:
        lock = threading.RLock()
        condition = threading.Condition(lock)
        thread = threading.Thread(target=contend_l)
        with lock:
            with lock:
                thread.start()
                until(lambda: lock._waiters.waiting_ns)
            with lock:
                time.sleep(0.02)
            condition.wait(0.05)
        thread.join()
    charged = [each for each in seen.samples("mutex") if is_in("<threading.RLock.release>", each)]
    assert [each.values[0] for each in charged] == [1]
    assert names(charged[0])[1] == "Condition.wait"


def test_free_locks_and_those_that_must_not_wait_are_not_recorded(kind):
    """As the real ones: results, and errors for arguments that make no sense."""
    with recording() as seen:
        lock, real = make(kind), (_thread.allocate_lock if kind == "Lock" else _thread.RLock)()
        with lock:
            if kind == "Lock":
                assert not lock.acquire(blocking=False)
                assert not lock.acquire(timeout=0)
                assert lock.locked()
            else:
                assert lock.acquire(blocking=False)
                lock.release()
        for arguments in ((False, 5), (True, -5), (True, 1e30), (True, "x")):
            with pytest.raises((ValueError, OverflowError, TypeError)) as error:
                real.acquire(*arguments)
            with pytest.raises(type(error.value)):
                lock.acquire(*arguments)
        with pytest.raises(RuntimeError):
            lock.release()
    assert seen.samples("block") == ()


def test_it_passes_for_a_real_lock(kind):
    """In isinstance both ways, repr, weak references, pickling, copying, and conditions."""
    real = make(kind)
    with recording(mutex=0):
        lock = make(kind)
        assert type(lock) is not type(real)
        assert isinstance(lock, type(real))
        assert isinstance(lock, getattr(threading, kind))
        assert isinstance(real, getattr(threading, kind))
        assert not isinstance(3, getattr(threading, kind))
        assert type(real).__name__ in repr(lock)
        for attempt in (pickle.dumps, copy.copy, copy.deepcopy):
            with pytest.raises(TypeError, match="cannot pickle"):
                attempt(lock)
        assert hasattr(lock, "_release_save") == hasattr(real, "_release_save")
        assert hasattr(lock, "_at_fork_reinit")
        with pytest.raises(AttributeError):
            lock.label = "x"
        condition = threading.Condition(lock)
        with condition:
            assert not condition.wait(0.01)
            condition.notify_all()


def test_the_standard_library_gets_real_locks(kind):
    """Its queues, events and conditions have the locks they always had."""
    with recording():
        assert type(queue.Queue().mutex) is _thread.LockType
        assert type(threading.Event()._cond._lock) is _thread.LockType
        assert type(threading.Condition()._lock) is _thread.RLock
        assert type(make(kind)).__name__ == f"Recorded{kind}"


def test_locks_made_before_are_not_seen_and_those_made_while_on_are_later_too(kind):
    """As documented: the type of a real lock cannot be changed; one of ours is only off."""
    before = make(kind)
    assert type(before) in (_thread.LockType, _thread.RLock)
    with recording():
        lock = make(kind)
        factory = getattr(threading, kind)
    assert type(make(kind)) is type(before)
    assert type(factory()) is type(before)  # whoever has kept the name
    with lock:
        pass
    assert lock.acquire()
    lock.release()

    def contend_m() -> None:
        with lock:
            pass

    with recording() as seen:
        thread = threading.Thread(target=contend_m)
        with lock:
            thread.start()
            until(lambda: lock._waiters.waiting_ns)
        thread.join()
    assert seen.of("block", "contend_m")[0] == 1


def test_names_that_somebody_else_has_replaced_are_left_alone(monkeypatch):
    """Another tool's lock stays what it is, and there is no endless chain."""

    def theirs():
        return _thread.allocate_lock()

    monkeypatch.setattr(threading, "Lock", theirs)
    with recording():
        assert threading.Lock is theirs
        assert not isinstance(theirs(), RecordedLock) or type(theirs()) is _thread.LockType
    assert threading.Lock is theirs
