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


def test_forced_collections_have_spans(timed):
    """One that is under way ends now."""

    class Watching:
        def __del__(self):
            seen.extend(timed.forced_spans())

    seen: list[tuple[int, int]] = []
    cycle = [Watching()]
    cycle.append(cycle)
    before_ns = time.monotonic_ns()
    del cycle
    timed.collect()
    ((began_ns, ended_ns),) = timed.forced_spans()
    assert before_ns <= began_ns < ended_ns <= time.monotonic_ns()
    assert [(from_ns, to_ns < ended_ns) for from_ns, to_ns in seen] == [(began_ns, True)]


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


def test_a_long_pause_is_remembered_for_a_minute(timed, monkeypatch):
    """Short collections of the youngest generation do not take its place; each has its own."""
    garbage = [[i] for i in range(300_000)]
    timed.enable()
    gc.disable()
    try:
        gc.collect()
        full_ns, _ = latest(timed)
        for _ in range(RING + 10):
            gc.collect(0)
        young_ns = [pause_ns for pause_ns, _ in timed.pauses()]
    finally:
        gc.enable()
        timed.disable()
    del garbage
    found = timed.quantiles([0.5, 1.0])
    assert found[2] == [full_ns, full_ns]
    assert max(young_ns) <= found[0][1] < full_ns
    median_ns = sorted(young_ns)[len(young_ns) // 2]
    assert median_ns / 2 < found[0][0] < median_ns * 2


def test_quantiles_are_rounded_up_by_an_eighth_at_most(timer):
    """The durations here are 100 us at least, of which the resolution is far below an eighth."""
    for delay_s in (0.0001, 0.0003, 0.001, 0.01):
        timer("start", {"generation": 1})
        time.sleep(delay_s)
        timer("stop", {"generation": 1})
    true_ns = [pause_ns for pause_ns, _ in timer.pauses() if pause_ns]
    timed = GcPauses(timer)
    assert list(timed.quantiles([1.0])) == [1]
    found_ns = timed.quantiles([0.25, 0.5, 0.75, 1.0])[1]
    assert found_ns[-1] == max(true_ns)
    for true, found in zip(sorted(true_ns), found_ns, strict=True):
        assert true <= found <= true * 9 / 8 + 1


@pytest.mark.parametrize("info", [{}, {"generation": "x"}, {"generation": 3}, {"generation": -1}])
def test_a_collection_of_no_known_generation_is_in_the_total_alone(timer, info):
    timer("start", info)
    timer("stop", info)
    assert timer.total_ns > 0
    assert GcPauses(timer).quantiles([1.0]) == {}


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
