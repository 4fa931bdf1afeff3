"""The heap profiles of the tracemalloc engine."""

from __future__ import annotations

import asyncio
import tracemalloc

import pytest

from asgi_pprof.collectors.heap.collector import HeapCollector
from asgi_pprof.collectors.heap.tracing import Peaks
from asgi_pprof.errors import PprofError, ProfileUnavailable
from asgi_pprof.merge import subtract
from asgi_pprof.recorders import heap_sampler, heap_tracing
from tests.valid import check_valid


def keep_blocks(count, size):
    return [bytearray(size) for _ in range(count)]


def restart_tracing(frames):
    tracemalloc.stop()
    tracemalloc.start(frames)


def deep_keep(depth):
    return deep_keep(depth - 1) if depth else keep_blocks(1, 5000)


def snapshot(collector):
    return asyncio.run(collector.snapshot())()


def of(profile, function):
    """Return the values and labels of the samples whose leaf is in a function."""
    return [
        (sample.values, dict(sample.labels))
        for sample in profile.samples
        if sample.stack[0].function.name.endswith(f".{function}")
        or f".{function}.<locals>" in sample.stack[0].function.name
    ]


def test_live_blocks_are_counted_with_their_size_class():
    """Ten blocks of 900 bytes are ten objects, somewhat over 9,000 bytes, in class 960."""
    collector = HeapCollector(heap_sampler, heap_tracing, Peaks())
    with heap_tracing.on():
        kept = keep_blocks(10, 900)
        profile = snapshot(collector)
        del kept
    check_valid(profile)
    large = [values for values, label in of(profile, "keep_blocks") if label["bytes"] == 960]
    assert sum(values[2] for values in large) == 10
    assert 9_000 <= sum(values[3] for values in large) < 10_000
    assert profile.period == 1


def test_freed_blocks_are_not_in_use_but_stay_allocated():
    """The live numbers fall to 0, the allocated ones never fall."""
    collector = HeapCollector(heap_sampler, heap_tracing, Peaks())
    with heap_tracing.on():
        kept = keep_blocks(10, 900)
        before = snapshot(collector)
        del kept
        after = snapshot(collector)
    was = [values for values, label in of(before, "keep_blocks") if label["bytes"] == 960]
    now = [values for values, label in of(after, "keep_blocks") if label["bytes"] == 960]
    assert sum(values[3] for values in was) >= 9_000
    assert sum(values[3] for values in now) == 0
    assert sum(values[1] for values in now) == sum(values[1] for values in was)
    shrunk = [
        values
        for values, label in of(subtract(after, before), "keep_blocks")
        if label["bytes"] == 960
    ]
    assert sum(values[2] for values in shrunk) == -10


def test_a_new_window_counts_from_nothing():
    """Allocations of an earlier window are not in the next one."""
    collector = HeapCollector(heap_sampler, heap_tracing, Peaks())
    for _ in range(2):
        with heap_tracing.on():
            before = snapshot(collector)
            kept = keep_blocks(4, 2000)
            after = snapshot(collector)
            del kept
        grown = [values for values, _ in of(subtract(after, before), "keep_blocks")]
        assert sum(values[1] for values in grown) >= 8000


def test_deep_stacks_say_that_they_are_cut():
    """TRUNCATED replaces the frames beyond the traceback limit."""
    collector = HeapCollector(heap_sampler, heap_tracing, Peaks())
    with heap_tracing.on():
        kept = deep_keep(40)
        profile = snapshot(collector)
        del kept
    stacks = [
        sample.stack for sample in profile.samples if "keep_blocks" in sample.stack[0].function.name
    ]
    assert stacks
    assert all("truncated" in stack[-1].function.name for stack in stacks)
    assert all(len(stack) == 17 for stack in stacks)


def test_off_is_said_and_empty():
    """There are no samples, the count is 0, and comment and note say how to switch it on."""
    collector = HeapCollector(heap_sampler, heap_tracing, Peaks())
    profile = snapshot(collector)
    check_valid(profile)
    assert profile.samples == ()
    assert "heap?seconds=N" in profile.comments[0]
    assert collector.count() == 0
    assert collector.note().startswith("off: ")


def test_tracing_that_the_application_started_is_left_on():
    """Our window neither restarts nor stops it."""
    tracemalloc.start(3)
    try:
        with heap_tracing.on():
            assert tracemalloc.get_traceback_limit() == 3
        assert tracemalloc.is_tracing()
    finally:
        tracemalloc.stop()


def test_an_exception_in_a_window_stops_the_tracing():
    """Tracing stops however the window ends."""
    with pytest.raises(LookupError), heap_tracing.on():
        raise LookupError
    assert not tracemalloc.is_tracing()


def test_allocs_is_the_same_data_with_another_default():
    """Only the default sample type differs."""
    peaks = Peaks()
    heap, allocs = (
        HeapCollector(heap_sampler, heap_tracing, peaks, kind) for kind in ("", "alloc_space")
    )
    with heap_tracing.on():
        profiles = snapshot(heap), snapshot(allocs)
    assert [profile.default_sample_type for profile in profiles] == ["", "alloc_space"]
    assert profiles[0].sample_types == profiles[1].sample_types


def test_sites_are_bounded(monkeypatch):
    """The largest have a sample each, and the sums of all others stay right and never fall."""
    monkeypatch.setattr("asgi_pprof.collectors.heap.tracing._MAX_SITES", 2)
    collector = HeapCollector(heap_sampler, heap_tracing, Peaks())
    with heap_tracing.on():
        kept = [keep_blocks(10, 900), keep_blocks(10, 90_000), keep_blocks(10, 700)]
        first = snapshot(collector)
        del kept[1:]
        second = snapshot(collector)
    assert [len(profile.samples) for profile in (first, second)] == [3, 3]
    before, after = (
        {sample.stack[0].function.name: sample.values for sample in profile.samples}
        for profile in (first, second)
    )
    assert all(name in after for name in before)
    assert any("keep_blocks" in name for name in before)
    assert before["<other stacks: beyond the 16,384 largest>"][2] >= 20
    for name, values in before.items():
        assert after[name][0] >= values[0] >= values[2]
        assert after[name][1] >= values[1] >= values[3]


def test_tracing_of_the_applications_own_is_not_copied_without_a_bound(monkeypatch):
    """To copy millions of traces would stop the process; ours, which was asked for, is copied."""
    monkeypatch.setattr("asgi_pprof.collectors.heap.tracing._MAX_TRACES", 1000)
    collector = HeapCollector(heap_sampler, heap_tracing, Peaks())
    tracemalloc.start()
    try:
        few = snapshot(collector)
        kept = keep_blocks(2000, 10)
        with pytest.raises(ProfileUnavailable, match="traces up to [0-9,]+ blocks"):
            snapshot(collector)
    finally:
        tracemalloc.stop()
    with heap_tracing.on():
        kept = keep_blocks(2000, 10)
        assert snapshot(collector).total("inuse_objects") >= len(kept)
    assert few.samples


def test_tracing_stopped_by_the_application_fails_the_window():
    """There is no profile in which all memory seems freed; new tracing is left on."""
    with pytest.raises(PprofError, match="stopped meanwhile"), heap_tracing.on():
        tracemalloc.stop()
    with pytest.raises(PprofError, match="stopped meanwhile"), heap_tracing.on():
        restart_tracing(7)
    assert tracemalloc.get_traceback_limit() == 7
    tracemalloc.stop()


def test_our_own_memory_is_left_out():
    """Memory that the profiler allocates is not in the profile."""
    collector = HeapCollector(heap_sampler, heap_tracing, Peaks())
    with heap_tracing.on():
        snapshot(collector)
        profile = snapshot(collector)
    ours = [
        sample
        for sample in profile.samples
        if any("asgi_pprof.collectors" in place.function.name for place in sample.stack)
    ]
    assert ours == []
