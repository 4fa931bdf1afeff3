"""threadcreate: starts of threads are counted by stack."""

from __future__ import annotations

import threading

from asgi_pprof.collectors.threadcreate import ThreadStarts
from asgi_pprof.stacks import UNKNOWN, StackCounter, name_totals


def totals_of(starts):
    totals = {sample.stack: sample.values[0] for sample in name_totals(starts.totals())}
    unknown = totals.pop((UNKNOWN,))
    return totals, unknown


def test_threads_are_counted_by_the_stack_that_started_them():
    """Two starts on one line are one stack. Threads from before are under an unknown stack."""
    starts = ThreadStarts()
    original = threading.Thread.start
    starts.enable()
    try:
        for _ in range(2):
            thread = threading.Thread(target=lambda: None)
            thread.start()
            thread.join()
    finally:
        starts.disable()
    assert threading.Thread.start is original
    totals, unknown = totals_of(starts)
    ((stack, count),) = totals.items()
    assert count == 2
    assert stack[0].function.name.endswith(
        ".test_threads_are_counted_by_the_stack_that_started_them"
    )
    assert unknown >= 1
    assert starts.count() == unknown + 2


def test_counts_are_kept_when_recording_is_switched_off_and_on():
    """Counts never fall. Threads that start while it is off are not counted."""
    starts = ThreadStarts()
    for _ in range(2):
        starts.enable()
        thread = threading.Thread(target=lambda: None)
        thread.start()
        thread.join()
        starts.disable()
        uncounted = threading.Thread(target=lambda: None)
        uncounted.start()
        uncounted.join()
    totals, _ = totals_of(starts)
    assert sum(totals.values()) == 2


def test_threads_of_too_many_different_stacks_count_as_unknown():
    """Memory is bounded, and the sum includes all threads."""
    starts = ThreadStarts(StackCounter(UNKNOWN, max_stacks=1))
    starts.enable()
    before = starts.count()
    one = threading.Thread(target=lambda: None)
    one.start()
    two = threading.Thread(target=lambda: None)
    two.start()
    one.join()
    two.join()
    starts.disable()
    totals, unknown = totals_of(starts)
    assert len(totals) == 1
    assert UNKNOWN not in {stack[0] for stack in totals}
    assert sum(totals.values()) + unknown == before + 2
