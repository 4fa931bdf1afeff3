"""Who may have SIGPROF: one profile at a time, and the application before us."""

from __future__ import annotations

import os
import signal

import pytest

from asgi_pprof.collectors.cpu import sigprof
from asgi_pprof.errors import ProfileBusy


@pytest.fixture(autouse=True)
def _default_action():
    """Put the action back to what it was, and release."""
    before = signal.getsignal(signal.SIGPROF)
    yield
    sigprof.release()
    signal.signal(signal.SIGPROF, before)


def handle(signum, frame):
    """Be the application's handler."""


def test_a_claim_holds_until_its_release():
    """The second is refused in Go's words."""
    sigprof.claim()
    with pytest.raises(ProfileBusy) as caught:
        sigprof.claim()
    assert str(caught.value) == "Could not enable CPU profiling: cpu profiling already in use"
    assert caught.value.status == 500
    sigprof.release()
    sigprof.claim()


def test_a_handler_is_somebodys_use():
    """Unless it is one of ours, left over by a fork."""
    signal.signal(signal.SIGPROF, handle)
    with pytest.raises(ProfileBusy, match="the application handles SIGPROF with .*handle"):
        sigprof.claim()
    sigprof.claim(lambda handler: handler is handle)


@pytest.mark.parametrize("action", [signal.SIG_DFL, signal.SIG_IGN])
def test_no_handler_is_nobodys_use(action):
    """Ignored or not."""
    signal.signal(signal.SIGPROF, action)
    sigprof.claim()


def test_a_timer_is_somebodys_use():
    """Though nobody handles its signal."""
    signal.signal(signal.SIGPROF, signal.SIG_IGN)
    signal.setitimer(signal.ITIMER_PROF, 1000)
    try:
        with pytest.raises(ProfileBusy, match="the application uses ITIMER_PROF"):
            sigprof.claim()
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    sigprof.claim()


def test_a_refused_claim_claims_nothing():
    """The next one may."""
    signal.signal(signal.SIGPROF, handle)
    with pytest.raises(ProfileBusy):
        sigprof.claim()
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    sigprof.claim()


def test_a_claim_of_the_parent_is_none_of_a_childs(monkeypatch):
    """A process that was forked in the middle of a profile may take its own."""
    sigprof.claim()
    parent = os.getpid()
    monkeypatch.setattr(os, "getpid", lambda: parent + 1)
    sigprof.claim()
