"""SIGPROF is used by one profile at a time, and never while the application uses it."""

from __future__ import annotations

import os
import signal

import pytest

from asgi_pprof.collectors.cpu.sigprof import SigprofClaim
from asgi_pprof.errors import ProfileBusy


@pytest.fixture
def sigprof():
    """A claim of its own; the action of SIGPROF is put back afterwards."""
    before = signal.getsignal(signal.SIGPROF)
    yield SigprofClaim()
    signal.signal(signal.SIGPROF, before)


def handle(signum, frame):
    """The application's handler."""


def test_a_claim_holds_until_its_release(sigprof):
    """A second claim is refused in Go's words."""
    sigprof.claim()
    with pytest.raises(ProfileBusy) as caught:
        sigprof.claim()
    assert str(caught.value) == "Could not enable CPU profiling: cpu profiling already in use"
    assert caught.value.status == 500
    sigprof.release()
    sigprof.claim()


def test_a_signal_handler_refuses_a_claim(sigprof):
    """Unless it is one of ours, left over by a fork."""
    signal.signal(signal.SIGPROF, handle)
    with pytest.raises(ProfileBusy, match="the application handles SIGPROF with .*handle"):
        sigprof.claim()
    sigprof.claim(lambda handler: handler is handle)


@pytest.mark.parametrize("action", [signal.SIG_DFL, signal.SIG_IGN])
def test_a_signal_without_a_handler_can_be_claimed(sigprof, action):
    """Whether the signal is ignored or not."""
    signal.signal(signal.SIGPROF, action)
    sigprof.claim()


def test_a_running_timer_refuses_a_claim(sigprof):
    """Even if its signal is ignored."""
    signal.signal(signal.SIGPROF, signal.SIG_IGN)
    signal.setitimer(signal.ITIMER_PROF, 1000)
    try:
        with pytest.raises(ProfileBusy, match="the application uses ITIMER_PROF"):
            sigprof.claim()
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    sigprof.claim()


def test_a_refused_claim_claims_nothing(sigprof):
    """The next claim succeeds."""
    signal.signal(signal.SIGPROF, handle)
    with pytest.raises(ProfileBusy):
        sigprof.claim()
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    sigprof.claim()


def test_a_forked_child_does_not_inherit_the_claim(sigprof, monkeypatch):
    """A process that was forked in the middle of a profile may take its own."""
    sigprof.claim()
    parent = os.getpid()
    monkeypatch.setattr(os, "getpid", lambda: parent + 1)
    sigprof.claim()
