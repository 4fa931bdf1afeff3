"""Garbage collections are timed, by the timer in C and by the one in Python."""

from __future__ import annotations

import functools
import gc
import operator
import sys
import threading
import time

import pytest

from asgi_pprof.native.core import native
from asgi_pprof.recorders import gc_pauses
from asgi_pprof.runtime.gc_pauses import GcPauses, PythonTimer, is_timing

TIMERS = {"native": native.GcTimer if native else None, "pure": PythonTimer}
RING = 256


@pytest.fixture(params=TIMERS)
def timer(request):
    """The timer, with the C core and without."""
    if TIMERS[request.param] is None:
        pytest.skip("needs the C core")
    return TIMERS[request.param]()


@pytest.fixture
def timed(timer):
    """A GcPauses for this test alone."""
    return GcPauses(timer)


def latest(timed):
    """Return the last timed pause, from its place in the ring."""
    return timed.pauses()[(timed.count + RING - 1) % RING]


# Timing


def test_a_pause_has_its_place_its_length_and_its_end(timed):
    """Its place follows the number of all collections; it is no longer than the call."""
    timed.enable()
    began_ns, before_ns = time.perf_counter_ns(), time.time_ns()
    gc.collect()
    took_ns = time.perf_counter_ns() - began_ns
    timed.disable()
    pause_ns, end_ns = latest(timed)
    assert 0 < pause_ns <= took_ns
    assert before_ns <= end_ns <= time.time_ns()
    assert end_ns == timed.last_end_ns
    assert timed.total_ns >= pause_ns
    assert timed.count == sum(each["collections"] for each in gc.get_stats())


def test_the_ring_holds_the_last_256(timed):
    """The oldest are overwritten; the total includes them."""
    timed.enable()
    gc.disable()
    try:
        for _ in range(RING + 10):
            gc.collect(0)
    finally:
        gc.enable()
        timed.disable()
    pauses = timed.pauses()
    assert len(pauses) == RING
    assert all(pause_ns > 0 and end_ns > 0 for pause_ns, end_ns in pauses)
    at = timed.count % RING
    ends = [end_ns for _, end_ns in pauses[at:] + pauses[:at]]
    assert ends == sorted(ends)
    assert timed.total_ns > sum(pause_ns for pause_ns, _ in pauses)


def test_arguments_of_the_timer(timer):
    """It takes `gc`'s arguments only, and no other phase counts as a start."""
    timer.begin(7)
    assert timer("stop", {}) is None  # the start of it was not seen
    assert (timer.count, timer.total_ns) == (8, 0)
    timer("start", {})
    timer("stop", {})
    assert timer.count == 9
    assert timer.total_ns > 0
    with pytest.raises(TypeError):
        timer("start")


def lets_another_thread_run(timer):
    """Return whether another thread ran while the timer was called once."""
    calls = (COUNTER.copy, functools.partial(timer, "start", {}), COUNTER.copy)
    before, _, after = map(operator.call, calls)  # all in C: only the timer can release the GIL
    return before != after


COUNTER = [0]


@pytest.fixture
def another_thread_counts():
    """A thread that counts as fast as it can, with a very short switch interval."""
    end = threading.Event()

    def count():
        while not end.is_set():
            COUNTER[0] += 1

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    thread = threading.Thread(target=count)
    thread.start()
    gc.disable()  # or other callbacks in Python would be called
    yield
    gc.enable()
    sys.setswitchinterval(interval)
    end.set()
    thread.join()


@pytest.mark.usefixtures("another_thread_counts")
def test_only_a_timer_in_python_lets_other_threads_run(timer):
    """It would do so in the middle of any allocation, so the C core's timer is in C."""
    if isinstance(timer, PythonTimer):
        assert any(lets_another_thread_run(timer) for _ in range(100_000))
    else:
        assert not any(lets_another_thread_run(timer) for _ in range(20_000))


def test_a_frame_of_the_timer_is_known():
    """It is recognized by its code; the timer in C has none."""
    assert is_timing(PythonTimer.__call__.__code__)
    assert not is_timing(latest.__code__)


# Switching


def test_enabled_and_disabled_leaves_the_callbacks_as_they_were(timed):
    """The same objects are there, in the same order."""
    others = list(gc.callbacks)
    timed.enable()
    assert len(gc.callbacks) == len(others) + 1
    timed.disable()
    assert gc.callbacks == others


def test_users_are_counted(timed):
    """There is one callback until the last user has left."""
    others = list(gc.callbacks)
    timed.enable()
    timed.enable()
    assert len(gc.callbacks) == len(others) + 1
    timed.disable()
    assert len(gc.callbacks) == len(others) + 1
    timed.disable()
    assert gc.callbacks == others


def test_callbacks_of_others_stay_where_they_are(timed):
    """Also one that is added while ours is there."""
    others = list(gc.callbacks)

    def theirs(phase, info):
        pass

    timed.enable()
    gc.callbacks.append(theirs)
    timed.disable()
    try:
        assert gc.callbacks == [*others, theirs]
    finally:
        gc.callbacks.remove(theirs)


def test_a_callback_that_was_removed_is_no_error(timed):
    """The application may call `gc.callbacks.clear()`."""
    others = list(gc.callbacks)
    timed.enable()
    gc.callbacks[:] = others
    timed.disable()
    assert gc.callbacks == others


def test_nothing_is_timed_while_it_is_off(timed):
    """Earlier times stay."""
    timed.enable()
    gc.collect()
    timed.disable()
    known = timed.total_ns, timed.last_end_ns, timed.pauses()
    gc.collect()
    assert (timed.total_ns, timed.last_end_ns, timed.pauses()) == known


def test_the_ring_catches_up_after_it_was_off(timed):
    """The place of a pause follows the number of all collections."""
    timed.enable()
    timed.disable()
    for _ in range(3):
        gc.collect(0)
    timed.enable()
    gc.disable()
    try:
        gc.collect()
        collections = sum(each["collections"] for each in gc.get_stats())
    finally:
        gc.enable()
        timed.disable()
    assert timed.pauses()[(collections + RING - 1) % RING][1] == timed.last_end_ns > 0


@pytest.mark.parametrize("earlier_pauses", [0, 1])
def test_switched_on_by_a_finalizer_in_the_middle_of_a_collection(timed, earlier_pauses):
    """The start of that collection was missed, so it has no pause; the next one has its place."""
    for _ in range(earlier_pauses):
        timed.enable()
        gc.collect()
        timed.disable()

    class Cyclic:
        def __init__(self):
            self.me = self

        def __del__(self):
            timed.enable()

    gc.disable()
    try:
        Cyclic()
        known = timed.total_ns
        gc.collect()
        assert timed.total_ns == known
        gc.collect()
        collections = sum(each["collections"] for each in gc.get_stats())
    finally:
        gc.enable()
        timed.disable()
    assert timed.pauses()[(collections + RING - 1) % RING][1] == timed.last_end_ns > 0


def test_importing_the_package_switches_nothing_on():
    """The process's own timer is off until a middleware starts it."""
    assert not gc_pauses.is_on()
