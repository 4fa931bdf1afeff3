"""The heap collector uses the engine that is on; its notes and comments name the engine."""

from __future__ import annotations

import asyncio
import tracemalloc

import pytest

from asgi_pprof.collectors.heap.collector import HeapCollector
from asgi_pprof.collectors.heap.tracing import Peaks
from asgi_pprof.native.core import native, reason
from asgi_pprof.recorders import UsedRecorders, heap_sampler, heap_tracing
from tests.valid import check_valid

needs_native = pytest.mark.skipif(not native, reason="needs the C core")


@pytest.fixture
def collector():
    return HeapCollector(heap_sampler, heap_tracing, Peaks())


def comments(collector):
    profile = asyncio.run(collector.snapshot())()
    check_valid(profile)
    return profile.comments


@needs_native
def test_the_native_engine_is_used_while_it_samples(collector):
    """Tracing that starts later does not change that."""
    heap_sampler.enable(1)
    try:
        assert collector.note() == "engine: native"
        assert comments(collector)[0].startswith("engine: native")
        assert collector.count() > 0
        with heap_tracing.on():
            assert collector.note() == "engine: native"
            assert comments(collector)[0].startswith("engine: native")
    finally:
        heap_sampler.disable()


def test_tracemalloc_is_used_while_it_traces(collector):
    """The native engine is not started on top of tracemalloc."""
    with heap_tracing.on():
        heap_sampler.enable(1)
        try:
            assert collector.note() == "engine: tracemalloc"
            assert comments(collector)[0].startswith("engine: tracemalloc")
            assert collector.count() > 0
        finally:
            heap_sampler.disable()


def test_note_and_comment_say_that_no_engine_is_on(collector):
    """There are no samples, and the note says how to get some."""
    profile = asyncio.run(collector.snapshot())()
    assert profile.samples == ()
    assert collector.count() == 0
    assert collector.note().startswith("off: no allocations are seen")
    assert "heap?seconds=N" in profile.comments[0]


@pytest.mark.skipif(bool(native), reason="needs to be without the C core")
def test_without_the_c_core_the_note_says_why(collector):
    """The reason does not depend on the rate."""
    heap_sampler.enable(1)
    try:
        assert f"no native engine: {reason}" in collector.note()
        assert not heap_sampler.is_on()
        assert heap_sampler.counters() is None
    finally:
        heap_sampler.disable()


def test_a_window_traces_while_the_sampler_is_off(collector):
    """Tracing stops at the end of the window."""
    with collector.window():
        assert tracemalloc.is_tracing()
    assert not tracemalloc.is_tracing()


@needs_native
def test_a_window_does_not_trace_while_the_sampler_is_on(collector):
    """The samples of the native engine are enough."""
    heap_sampler.enable(1)
    try:
        with collector.window():
            assert not tracemalloc.is_tracing()
    finally:
        heap_sampler.disable()


@pytest.mark.parametrize("engine", ["native", "", "TRACEMALLOC", 1])
def test_the_heap_argument_accepts_only_tracemalloc(engine):
    """The error message repeats any other value."""
    with pytest.raises(ValueError, match=f'heap is None or "tracemalloc", not {engine!r}'):
        UsedRecorders(engine, 1)


def test_tracemalloc_is_used_if_the_heap_argument_says_so():
    """Tracing is on all the time, and the sampler is never on."""
    switches = UsedRecorders("tracemalloc", 1)
    switches.on()
    try:
        assert HeapCollector(heap_sampler, heap_tracing, Peaks()).note() == "engine: tracemalloc"
        assert not heap_sampler.is_on()
    finally:
        switches.off()
    assert not tracemalloc.is_tracing()
