"""Runs programs in subprocesses, for tests that could crash or must exit."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap

from tests.servers import ROOT

QUIET = ("-X", "dev", "-W", "error")

# In development mode asyncio reports callbacks over 100 ms, which a busy machine causes.
_SLOW_CALLBACK = re.compile(r"^Executing <.* took \d+\.\d+ seconds\n?", re.MULTILINE)


def run_program(
    source: str,
    *arguments: str,
    options: tuple[str, ...] = QUIET,
    timeout: float = 150,
    status: int = 0,
    errors: str = "",
    **variables: str,
) -> str:
    """
    Run a Python program, and return what it prints.

    It must exit with this status and print nothing but `errors` on stderr.

    Args:
        source: The program.
        arguments: Its `sys.argv[1:]`.
        options: The interpreter's; development mode with warnings as errors unless given.
        timeout: Seconds after which it hangs.
        status: What it exits with; negative for a signal.
        errors: A part of its stderr; "" means that there must be none.
        variables: Added to the environment.
    """
    done = subprocess.run(
        [sys.executable, *options, "-c", textwrap.dedent(source), *arguments],
        cwd=ROOT,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        errors="replace",
        timeout=timeout,
        check=False,
    )
    said = _SLOW_CALLBACK.sub("", done.stderr).strip()
    assert done.returncode == status, f"status {done.returncode}: {said[-4000:]}"
    if errors:
        assert errors in said
    else:
        assert said == ""
    return done.stdout
