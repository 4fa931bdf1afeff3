"""The CPU collector uses the best engine that works, and its note says which one."""

from __future__ import annotations

import asyncio

import pytest

from asgi_pprof.collectors.cpu import native_engine as cpu_native
from asgi_pprof.collectors.cpu import signal_engine as cpu_signal
from asgi_pprof.collectors.cpu.collector import CpuCollector
from asgi_pprof.errors import ProfileUnavailable
from asgi_pprof.native.core import native, reason
from tests.valid import check_valid


class NoProcessVm:
    """A C core in a sandbox that forbids process_vm_readv."""

    @staticmethod
    def check():
        raise PermissionError(1, "Operation not permitted")


def collect(hz=100):
    profile = asyncio.run(CpuCollector().collect(0.01, asyncio.Event(), hz))()
    check_valid(profile)
    return profile


@pytest.mark.skipif(not native, reason="needs the C core")
def test_the_native_engine_is_used_where_it_works():
    """It samples every thread at the requested frequency."""
    assert CpuCollector().note() == "engine: native"
    profile = collect(hz=50)
    assert profile.comments[0].startswith("engine: native, every thread at 50 Hz")
    assert profile.period == 20_000_000


@pytest.mark.skipif(bool(native), reason="needs to be without the C core")
def test_without_the_c_core_the_signal_engine_is_used():
    """The note says why the native engine is not used."""
    assert reason in CpuCollector().note()
    assert collect().comments[0].startswith("engine: signal")


def test_the_signal_engine_is_used_where_the_native_one_does_not_work(monkeypatch):
    """It samples at the requested frequency. The note says what it misses, and the reason."""
    monkeypatch.setattr(cpu_native, "why_not", lambda: "the moon is full")
    assert CpuCollector().note() == (
        "engine: signal, which samples the main thread only (no native one: the moon is full)"
    )
    profile = collect(hz=50)
    assert profile.comments[0].startswith("engine: signal, main thread at 50 Hz")
    assert profile.period == 20_000_000


def test_without_process_vm_readv_the_reason_is_the_systems(monkeypatch):
    """That happens under a strict seccomp filter, for example."""
    monkeypatch.setattr(cpu_native, "native", NoProcessVm)
    assert cpu_native.why_not() == "process_vm_readv: Operation not permitted"
    assert "process_vm_readv" in CpuCollector().note()
    assert collect().comments[0].startswith("engine: signal")


def test_without_an_engine_the_profile_is_unavailable(monkeypatch):
    """The error has status 501 and both reasons. The note says it before a profile is requested."""
    monkeypatch.setattr(cpu_native, "why_not", lambda: "the moon is full")
    monkeypatch.setattr(cpu_signal, "is_supported", lambda: False)
    assert CpuCollector().note().startswith("unavailable: needs SIGPROF")
    with pytest.raises(ProfileUnavailable, match="the moon is full.*SIGPROF") as caught:
        collect()
    assert caught.value.status == 501
