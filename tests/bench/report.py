"""Markdown tables, and the conditions of their measurement."""

from __future__ import annotations

import os
import platform
import shlex
import statistics
import sys
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path


def conditions(options: Sequence[str]) -> str:
    """Return machine, versions and command line."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("fastapi", "uvicorn", "uvloop"))
    return "\n".join(
        (
            f"- Command: `python -m {shlex.join(['tests.bench', *options])}`",
            f"- Machine: {_processor()}, {os.cpu_count()} cores, {platform.platform()}",
            f"- Python {platform.python_version()}, {packages}, asgi-pprof {version('asgi-pprof')}",
        )
    )


def table(headings: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table in which all columns but the first are numbers."""
    lines = [headings, ["---"] + ["---:"] * (len(headings) - 1), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the first quartile, the median and the third quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    first, median, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, median, third


def say(*lines: str) -> None:
    """Print without buffering, so that a long run can be followed."""
    print(*lines, sep="\n", flush=True)


def progress(text: str) -> None:
    """Print to the terminal, not to the file with the tables."""
    print(text, file=sys.stderr, flush=True)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
