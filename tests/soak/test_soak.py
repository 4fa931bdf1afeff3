"""The short form of the soak, in a process of its own: a crash fails this test, not the run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from asgi_pprof.native import native, reason

_SECONDS = 15
_ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.skipif(native is None, reason=f"no native core: {reason}")
def test_nothing_torn_crashed_or_hanging():
    """Everything at once for some seconds; `make soak` is the long form."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.soak", "--seconds", str(_SECONDS), "--verbose"],
        cwd=_ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=280,
    )
    assert done.returncode == 0, done.stdout[-20_000:]
