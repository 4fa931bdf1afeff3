"""`threading.Lock` and `RLock` are replaced only if a middleware asks, and then behave the same."""

from __future__ import annotations

import _thread
import copy
import gc
import pickle
import queue
import threading

import pytest

from asgi_pprof import PprofApp, PprofMiddleware
from asgi_pprof.collectors.contention.collector import ContentionCollector
from asgi_pprof.collectors.contention.lock_classes import RecordedLock, RecordedRLock
from asgi_pprof.recorders import contention, set_block_profile_rate
from tests.collectors.contention.recorded import HOLD_NS, asking, is_in, names, recording
from tests.servers import until

# The names as modules get them that a program imports before it has a middleware.
ORIGINALS = threading.Lock, threading.RLock

KINDS = ("Lock", "RLock")


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    return request.param


@pytest.fixture
def wrapping():
    """A middleware with `wrap_lock_classes=True`."""
    with asking(wrap_lock_classes=True):
        yield


def replaced() -> bool:
    """Return whether both names are replaced; fail if only one of them is."""
    now = threading.Lock, threading.RLock
    assert now in (ORIGINALS, (RecordedLock, RecordedRLock))
    return now != ORIGINALS


def test_setting_rates_alone_replaces_nothing(kind):
    """A window or a middleware without the argument does not either. Other waits are recorded."""
    waits = threading.Condition.wait
    with recording():
        assert not replaced()
        assert type(make(kind)) in (_thread.LockType, _thread.RLock)
        assert threading.Condition.wait is not waits
    with ContentionCollector(contention, "block").window():
        assert not replaced()
    with asking(block=1, mutex=1):
        assert not replaced()
        assert threading.Condition.wait is not waits


@pytest.mark.parametrize("rates", [{"block_profile_rate": 1}, {"mutex_profile_fraction": 1}])
@pytest.mark.parametrize(
    "make_app",
    [PprofApp, lambda **arguments: PprofMiddleware(lambda *_: None, **arguments)],
    ids=["app", "middleware"],
)
def test_both_names_are_replaced_while_an_app_that_asks_is_open(make_app, rates):
    """They are the originals again when the app is gone, and always without the argument."""
    app = make_app(**rates)
    assert not replaced()
    del app
    gc.collect()
    app = make_app(wrap_lock_classes=True, **rates)
    assert replaced()
    del app
    gc.collect()
    assert not replaced()


def test_the_argument_replaces_nothing_until_a_rate_is_set(wrapping):
    """It does not matter how the rate is set. A window sets none."""
    assert not replaced()
    with ContentionCollector(contention, "mutex").window():
        assert not replaced()
    set_block_profile_rate(1)
    assert replaced()
    set_block_profile_rate(0)
    assert not replaced()
    with asking(mutex=5):
        assert replaced()
    assert not replaced()


def test_one_of_several_middlewares_with_the_argument_is_enough():
    """The names are replaced until the last one with the argument, or the last rate, is gone."""
    with asking(block=1):
        assert not replaced()
        with asking(wrap_lock_classes=True):
            assert replaced()
            with asking(block=2, wrap_lock_classes=True):
                assert replaced()
            assert replaced()
        assert not replaced()
    with asking(wrap_lock_classes=True), asking(wrap_lock_classes=True):
        with asking(block=1):
            assert replaced()
        assert not replaced()


def make(kind: str):
    """Make a lock as programs do, by the name in `threading`."""
    return getattr(threading, kind)()


@pytest.mark.parametrize("how", ["with", "acquire", "timeout"])
def test_threads_that_queue_for_a_lock_are_one_contention_each(kind, how, wrapping, clock):
    """All waiting time is recorded, and charged to the release by the lock's holder."""

    def contend_j() -> None:
        if how == "with":
            with lock:
                pass
        else:
            assert lock.acquire() if how == "acquire" else lock.acquire(timeout=60)
            lock.release()

    def hold_k() -> None:
        with lock:
            for thread in threads:
                thread.start()
            until(lambda: len(lock._waiters.waiting_ns) == 3)
            clock.advance(HOLD_NS)

    threads = [threading.Thread(target=contend_j) for _ in range(3)]
    with recording() as seen:
        lock = make(kind)
        hold_k()
        for thread in threads:
            thread.join()
    assert seen.of("block", "contend_j") == (3, 3 * HOLD_NS)
    assert seen.stack("block", "contend_j")[0] == f"<threading.{kind}.acquire>"
    (holder,) = [each for each in seen.samples("mutex") if is_in("hold_k", each)]
    assert holder.values == (1, 3 * HOLD_NS)
    assert names(holder)[0] == f"<threading.{kind}.release>"
    assert names(holder)[1].endswith("hold_k")


def test_only_the_last_release_of_a_reentrant_lock_is_charged(wrapping, clock):
    """Inner releases grant nothing. A condition that gives up the lock releases it."""

    def contend_l() -> None:
        with lock:
            condition.notify()

    with recording() as seen:
        lock = threading.RLock()
        condition = threading.Condition(lock)
        thread = threading.Thread(target=contend_l)
        with lock:
            with lock:
                thread.start()
                until(lambda: lock._waiters.waiting_ns)
            with lock:
                clock.advance(HOLD_NS)
            condition.wait()
        thread.join()
    charged = [each for each in seen.samples("mutex") if is_in("<threading.RLock.release>", each)]
    (sample,) = [each for each in charged if not is_in("contend_l", each)]
    assert sample.values == (1, HOLD_NS)
    assert names(sample)[1] == "Condition.wait"


def test_locks_that_are_free_or_must_not_wait_are_not_recorded(kind, wrapping):
    """Results and errors are those of the real locks, for invalid arguments too."""
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


def test_recorded_locks_pass_for_real_ones(kind, wrapping):
    """They do so in isinstance, repr, weak references, pickling, copying and conditions."""
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
            assert not condition.wait(0.001)
            condition.notify_all()


def test_the_standard_library_gets_real_locks(kind, wrapping):
    """Its queues, events and conditions have the same kinds of lock as without recording."""
    with recording():
        assert type(queue.Queue().mutex) is _thread.LockType
        assert type(threading.Event()._cond._lock) is _thread.LockType
        assert type(threading.Condition()._lock) is _thread.RLock
        assert type(make(kind)).__name__ == f"Recorded{kind}"


def test_only_locks_made_while_a_rate_is_set_are_recorded(kind, wrapping):
    """A real lock's type cannot be changed. A recorded lock stays one, and delegates while off."""
    before = make(kind)
    assert type(before) in (_thread.LockType, _thread.RLock)
    with recording():
        lock = make(kind)
        factory = getattr(threading, kind)
    assert type(make(kind)) is type(before)
    assert type(factory()) is type(before)  # the factory was looked up while the name was replaced
    with ContentionCollector(contention, "block").window():
        assert type(factory()) is type(before)
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


def test_names_that_another_library_has_replaced_stay(monkeypatch, wrapping):
    """Its lock is not wrapped, and no lock delegates to itself."""

    def theirs():
        return _thread.allocate_lock()

    monkeypatch.setattr(threading, "Lock", theirs)
    with recording():
        assert threading.Lock is theirs
        assert not isinstance(theirs(), RecordedLock) or type(theirs()) is _thread.LockType
    assert threading.Lock is theirs
