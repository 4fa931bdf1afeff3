"""Fixtures for the tests of block and mutex."""

from __future__ import annotations

import pytest

from asgi_pprof.collectors.contention import (
    asyncio_waits,
    lock_classes,
    threading_waits,
    under_way,
)
from tests.collectors.contention.recorded import Clock, identical, patched


@pytest.fixture(autouse=True)
def in_one_slice():
    """Let profiles be read without a loop, to which the reading could yield."""
    before, under_way._SLICE_S = under_way._SLICE_S, 3600
    yield
    under_way._SLICE_S = before


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
    for module in (asyncio_waits, threading_waits, lock_classes, under_way):
        monkeypatch.setattr(module, "clock", clock)
    return clock
