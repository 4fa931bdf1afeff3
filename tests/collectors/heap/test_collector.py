"""Which heap engine serves, and what it says about it."""

from __future__ import annotations

import asyncio
import tracemalloc

import pytest

from asgi_pprof.collectors.heap.collector import HeapCollector
from asgi_pprof.collectors.heap.sampler import heap_sampler
from asgi_pprof.collectors.heap.tracing import Peaks, tracing
from asgi_pprof.native.core import native, reason
from asgi_pprof.profile import check_valid
from asgi_pprof.recorders import Recording

needs_native = pytest.mark.skipif(not native, reason="needs the C core")


@pytest.fixture
def collector():
    return HeapCollector(Peaks())


def comments(collector):
    profile = asyncio.run(collector.snapshot())()
    check_valid(profile)
    return profile.comments


@needs_native
def test_while_memory_is_sampled_the_native_engine_serves(collector):
    """Also when tracemalloc has come on later."""
    heap_sampler.enable(1)
    try:
        assert collector.note() == "engine: native"
        assert comments(collector)[0].startswith("engine: native")
        assert collector.count() > 0
        with tracing.on():
            assert collector.note() == "engine: native"
            assert comments(collector)[0].startswith("engine: native")
    finally:
        heap_sampler.disable()


def test_while_memory_is_traced_the_other_one_serves(collector):
    """The native one is not put on top of it."""
    with tracing.on():
        heap_sampler.enable(1)
        try:
            assert collector.note() == "engine: tracemalloc"
            assert comments(collector)[0].startswith("engine: tracemalloc")
            assert collector.count() > 0
        finally:
            heap_sampler.disable()


def test_while_neither_is_on_that_is_said(collector):
    """No samples, and the way to have some."""
    profile = asyncio.run(collector.snapshot())()
    assert profile.samples == ()
    assert collector.count() == 0
    assert collector.note().startswith("off: no allocations are seen")
    assert "heap?seconds=N" in profile.comments[0]


@pytest.mark.skipif(bool(native), reason="needs to be without the C core")
def test_without_the_c_core_the_note_says_why(collector):
    """Whatever the rate."""
    heap_sampler.enable(1)
    try:
        assert f"no native engine: {reason}" in collector.note()
        assert not heap_sampler.is_on()
        assert heap_sampler.counters() is None
    finally:
        heap_sampler.disable()


def test_a_window_traces_where_nothing_samples(collector):
    """And stops at its end."""
    with collector.window():
        assert tracemalloc.is_tracing()
    assert not tracemalloc.is_tracing()


@needs_native
def test_a_window_does_not_trace_where_something_samples(collector):
    """What is there anyhow is enough."""
    heap_sampler.enable(1)
    try:
        with collector.window():
            assert not tracemalloc.is_tracing()
    finally:
        heap_sampler.disable()


@pytest.mark.parametrize("engine", ["native", "", "TRACEMALLOC", 1])
def test_only_tracemalloc_can_be_asked_for(engine):
    """Else sampling is what there is; the message has what came."""
    with pytest.raises(ValueError, match=f'heap is None or "tracemalloc", not {engine!r}'):
        Recording(engine, 1)


def test_tracemalloc_that_is_asked_for_is_used_though_sampling_could_be():
    """The whole time, and no sampler beside it."""
    switches = Recording("tracemalloc", 1)
    switches.on()
    try:
        assert HeapCollector(Peaks()).note() == "engine: tracemalloc"
        assert not heap_sampler.is_on()
    finally:
        switches.off()
    assert not tracemalloc.is_tracing()
