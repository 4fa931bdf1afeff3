"""Short runs of the soak, in subprocesses: a crash there fails a test, not the test run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from asgi_pprof.native.core import native, reason

_ROOT = Path(__file__).parents[2]


def soak(*arguments: str, **variables: str) -> None:
    """Run the soak; the assertion's message is its output."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.soak", *arguments, "--verbose"],
        cwd=_ROOT,
        env={**os.environ, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=280,
    )
    assert done.returncode == 0, done.stdout[-20_000:]


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.skipif(native is None, reason=f"no native core: {reason}")
def test_nothing_torn_crashed_or_hanging():
    """Run the slice `samplers` for 8 seconds; `make soak` is the long form."""
    soak("--seconds", "8")


WHILE_LOOKED_AT = {
    "threads": "threads,short_threads,stacks,greenlets",
    "collections": "collections,closed_generators,freed_code,variables,garbage",
    "interpreters": "interpreters,own_gils,stacks",
}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("what", WHILE_LOOKED_AT)
def test_looking_at_threads_crashes_nobody(what):
    """Stacks are read while threads run dangerous code and finalizers run during the reads."""
    sampling = () if native else ("--no-sampling",)
    soak("--only", f"looks,profiles,{WHILE_LOOKED_AT[what]}", "--seconds", "3", *sampling)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.skipif(native is None, reason=f"no native core: {reason}")
def test_a_thousand_threads_at_once():
    """They wait, run, end and are replaced, beside other interpreters."""
    soak("--slice", "crowd", "--seconds", "3")


@pytest.mark.timeout(300)
@pytest.mark.skipif(sys.version_info < (3, 12), reason="interpreters share the GIL")
def test_without_the_c_core_nobody_is_looked_at_beside_other_interpreters():
    """`sys._current_frames` would touch the frames of all interpreters, so it is not called."""
    only = f"looks,profiles,{WHILE_LOOKED_AT['interpreters']}"
    soak("--only", only, "--seconds", "3", "--no-sampling", ASGI_PPROF_NATIVE="0")
