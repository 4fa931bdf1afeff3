"""Fixtures for the tests of block and mutex."""

from __future__ import annotations

import pytest

from asgi_pprof.collectors.contention import asyncio_waits, lock_classes, threading_waits
from tests.collectors.contention.recorded import Clock, identical, patched


@pytest.fixture(autouse=True)
def everything_put_back():
    """Fail a test after which a method or name is still replaced."""
    before = patched()
    yield
    assert identical(patched(), before)


@pytest.fixture
def clock(monkeypatch) -> Clock:
    """The clock that waits are measured with; it moves only when the test moves it."""
    clock = Clock()
    for module in (asyncio_waits, threading_waits, lock_classes):
        monkeypatch.setattr(module, "clock", clock)
    return clock
