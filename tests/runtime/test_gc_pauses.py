"""Garbage collections are timed by a timer in C, or by one in Python."""

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
    """The timer of the C core, or the one in Python."""
    if TIMERS[request.param] is None:
        pytest.skip("needs the C core")
    return TIMERS[request.param]()


@pytest.fixture
def timed(timer):
    """A GcPauses that only this test uses."""
    return GcPauses(timer)


def latest(timed):
    """Return the latest timed pause from its place in the ring."""
    return timed.pauses()[(timed.count + RING - 1) % RING]


# Timing


def test_a_pause_has_its_place_its_length_and_its_end(timed):
    """Its place depends on the number of all collections; it is no longer than the call."""
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
    """It accepts only `gc`'s arguments, and only the phase "start" starts a pause."""
    timer.begin(7)
    assert timer("stop", {}) is None  # its start was not seen
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
    # `map` and the calls are in C, so only the timer can release the GIL.
    before, _, after = map(operator.call, calls)
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
    gc.disable()  # otherwise a collection would call other callbacks in Python
    yield
    gc.enable()
    sys.setswitchinterval(interval)
    end.set()
    thread.join()


@pytest.mark.usefixtures("another_thread_counts")
def test_only_a_timer_in_python_lets_other_threads_run(timer):
    """A callback runs inside any allocation, so the C core has a timer in C."""
    if isinstance(timer, PythonTimer):
        assert any(lets_another_thread_run(timer) for _ in range(100_000))
    else:
        assert not any(lets_another_thread_run(timer) for _ in range(20_000))


def test_the_python_timers_frame_is_recognized():
    """It is recognized by its code; the timer in C has no frame."""
    assert is_timing(PythonTimer.__call__.__code__)
    assert not is_timing(latest.__code__)


# Switching


def test_enabling_and_disabling_restores_the_callbacks(timed):
    """The list has the same objects in the same order."""
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


def test_other_callbacks_stay_in_their_places(timed):
    """A callback that is added while ours is there stays too."""
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


def test_a_callback_that_was_removed_causes_no_error(timed):
    """The application may call `gc.callbacks.clear()`."""
    others = list(gc.callbacks)
    timed.enable()
    gc.callbacks[:] = others
    timed.disable()
    assert gc.callbacks == others


def test_no_collection_is_timed_while_timing_is_off(timed):
    """The earlier times are kept."""
    timed.enable()
    gc.collect()
    timed.disable()
    known = timed.total_ns, timed.last_end_ns, timed.pauses()
    gc.collect()
    assert (timed.total_ns, timed.last_end_ns, timed.pauses()) == known


def test_pauses_have_the_right_places_after_timing_was_off(timed):
    """The place of a pause depends on the number of all collections."""
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
def test_timing_may_be_switched_on_during_a_collection(timed, earlier_pauses):
    """A finalizer switches it on. That collection has no pause; the next one is in its place."""
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


def test_importing_the_package_starts_no_timing():
    """The process's timer is off until a middleware switches it on."""
    assert not gc_pauses.is_on()
