"""
Run the whole test suite on every CPython that is supported.

    make test-all [ARGS="pytest's arguments"]

Each version has a virtual environment, .venv-3.13 for example, in which the C
extension must compile and import. One more suite runs on the default Python
with ASGI_PPROF_NATIVE=0, that is, with the engines in Python.

One suite follows the other. In each, two tests per processor run side by side,
since most of them wait; those marked timing follow one by one, because they
measure time. A test that fails beside others runs once more, alone; the summary
counts these, and each of them is to be mended. Tests marked once or go run on
the default Python alone, those marked oldest_and_newest on the oldest and the
newest, all of them with the C extension. Tests that run once on each loop run on
uvloop with the oldest and the newest only.

Interpreters are looked for on PATH, among pyenv's, and among those fetched
before; what is missing is fetched into .venv-pythons. One without headers, a
free-threaded one and one that does not start count as missing.

Environment variables:
    EXPECT       The versions to test (default: "3.11 3.12 3.13 3.14 3.15").
    GET_PYTHONS  A command that fetches interpreters: it gets a folder and the
                 missing versions, and prints the path of each interpreter.
                 Default: `uv python install`.
    JOBS         How many tests run side by side (default: two per processor).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parent.parent
UV = Path(sys.prefix) / "bin" / "uv"
"""`make install` puts it beside the interpreter that runs this."""
FETCHED = ROOT / ".venv-pythons"
VERSIONS = "3.11 3.12 3.13 3.14 3.15"
LAST_LINES = 150
"""The number of lines shown of a failing suite's output."""
LIMIT_S = 2400
"""The time limit of a suite. Each test has one too, but that cannot interrupt C code."""

PROBE = """
import ensurepip, json, platform, sys, sysconfig, venv
print(json.dumps({
    "version": platform.python_version(),
    "implementation": sys.implementation.name,
    "free_threaded": bool(sysconfig.get_config_var("Py_GIL_DISABLED")),
    "include": sysconfig.get_path("include"),
}))
"""


class Failed(Exception):
    """The reason why no tests can run."""


@dataclass(frozen=True)
class Interpreter:
    """A CPython to test: its path and full version."""

    path: Path
    version: str


@dataclass
class Suite:
    """All tests on one interpreter with one engine, and their results."""

    name: str
    interpreter: Interpreter
    python: Path
    native: bool
    is_default: bool
    is_outermost: bool
    engine: str = ""
    counts: Counter[str] = field(default_factory=Counter)
    seconds: float = 0
    problems: list[str] = field(default_factory=list)
    alone: int = 0

    @property
    def marks(self) -> str:
        """Return pytest's expression that excludes tests of other suites, with " and ", or ""."""
        left_out = {
            "once": not (self.is_default and self.native),
            "go": not (self.is_default and self.native),
            "oldest_and_newest": not (self.is_outermost and self.native),
        }
        return "".join(f"not {mark} and " for mark, is_out in left_out.items() if is_out)

    @property
    def selection(self) -> tuple[str, ...]:
        """Return pytest's arguments that leave out uvloop; another `-k` takes their place."""
        return () if self.is_outermost else ("-k", "not uvloop")

    @property
    def mode(self) -> tuple[str, ...]:
        """Return the option for development mode, in which the suite with the least C code runs."""
        return () if self.native else ("-X", "dev")

    @property
    def environment(self) -> dict[str, str]:
        return os.environ | ({} if self.native else {"ASGI_PPROF_NATIVE": "0"})


def main() -> None:
    os.environ.pop("ASGI_PPROF_NATIVE", None)
    parser = argparse.ArgumentParser(
        prog="make test-all",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("-m", dest="marks", help="as pytest's; all other arguments go to pytest")
    options, arguments = parser.parse_known_args()
    asked = f"({options.marks}) and " if options.marks else ""
    try:
        suites = prepare(find_or_fetch(os.environ.get("EXPECT", VERSIONS).split()))
    except Failed as error:
        sys.exit(f"test-all: {error}")
    jobs = int(os.environ.get("JOBS") or 2 * (os.cpu_count() or 1))
    for suite in suites:
        workers = f"{jobs}*popen//python={shlex.join([str(suite.python), *suite.mode])}"
        side_by_side = ["--dist", "worksteal", "--tx", workers]
        selected = [*suite.selection, *arguments]
        run(suite, f"{asked}{suite.marks}not timing", [*side_by_side, *selected], selected)
        run(suite, f"{asked}{suite.marks}timing", selected)
        if not suite.counts["passed"]:
            suite.problems.append("no test has passed")
    say(*summary(suites))
    sys.exit(any(suite.problems for suite in suites))


def find_or_fetch(versions: list[str]) -> dict[str, Interpreter]:
    """
    Return an interpreter by version.

    Raises:
        Failed: Some are still missing; says what was found instead.
    """
    found, unfit = find(versions)
    missing = [version for version in versions if version not in found]
    if missing:
        say(f"fetching CPython {' '.join(missing)}")
        more, still_unfit = find(missing, fetch(missing))
        found |= more
        unfit += still_unfit
    missing = [version for version in versions if version not in found]
    if missing:
        wanting = f"no CPython {', '.join(missing)}; expected {' '.join(versions)}"
        raise Failed("\n    ".join([wanting, *dict.fromkeys(unfit)]))
    return {version: found[version] for version in versions}


def find(
    versions: list[str], paths: Iterable[Path] = ()
) -> tuple[dict[str, Interpreter], list[str]]:
    """Return the first suitable interpreter by version, and the problems of the others."""
    found: dict[str, Interpreter] = {}
    unfit = []
    for version in versions:
        for path in filter(Path.exists, [*paths, *candidates(version)]):
            fit = probe(path, version)
            if isinstance(fit, Interpreter):
                found[version] = fit
                break
            unfit.append(f"{path}: {fit}")
    return found, unfit


def candidates(version: str) -> Iterator[Path]:
    """Yield paths where that version may be installed, the likeliest first."""
    name = f"python{version}"
    if version == "{}.{}".format(*sys.version_info):
        yield Path(sys.base_prefix) / "bin" / name
    for folder in os.get_exec_path():
        yield Path(folder) / name
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    yield from pyenv.glob(f"versions/{version}.*/bin/{name}")
    yield from FETCHED.glob(f"*/bin/{name}")


def probe(path: Path, version: str) -> Interpreter | str:
    """Return the interpreter at this path, or the reason why it does not suit this version."""
    try:
        done = subprocess.run(
            [path, "-I", "-c", PROBE], capture_output=True, text=True, timeout=60, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    if done.returncode:
        return f"exit status {done.returncode}: {' '.join(done.stderr.split())[:200]}"
    about = json.loads(done.stdout)
    if about["implementation"] != "cpython" or not about["version"].startswith(f"{version}."):
        return f"is {about['implementation']} {about['version']}"
    if about["free_threaded"]:
        return "is free-threaded"
    if not Path(about["include"], "Python.h").exists():
        return f"has no headers in {about['include']}"
    return Interpreter(path, about["version"])


def fetch(versions: list[str]) -> list[Path]:
    """Fetch interpreters into FETCHED, and return the paths that the command prints."""
    command = os.environ.get("GET_PYTHONS")
    if command:
        fetching = [*shlex.split(command), str(FETCHED / "fetched"), *versions]
    else:
        into = ("--install-dir", str(FETCHED))
        fetching = [str(UV), "python", "install", "--no-bin", *into, *versions]
    done = subprocess.run(fetching, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        say(f"{shlex.join(fetching)}: exit status {done.returncode}")
    return [Path(line) for line in done.stdout.splitlines()]


def prepare(interpreters: dict[str, Interpreter]) -> list[Suite]:
    """
    Return the suites to run, everything installed.

    Raises:
        Failed: uv has failed, or the extension does not compile or import.
    """
    default = "{}.{}".format(*sys.version_info)
    if default not in interpreters:
        default = next(iter(interpreters))
    suites = []
    for version, interpreter in interpreters.items():
        say(f"{version}: installing")
        group = "test" if version == default else "test-without-go"
        python = install(version, interpreter, group)
        where = version == default, version in (next(iter(interpreters)), [*interpreters][-1])
        suites.append(Suite(version, interpreter, python, True, *where))
        if version == default:
            suites.append(Suite(f"{version} pure", interpreter, python, False, *where))
    for suite in suites:
        suite.engine = _engine(suite)
    return suites


def install(version: str, interpreter: Interpreter, group: str) -> Path:
    """Bring the version's virtual environment up to date; return the interpreter in it."""
    folder = ROOT / f".venv-{version}"
    python = folder / "bin" / "python"
    if probe(python, version) != Interpreter(python, interpreter.version):
        _call(version, UV, "venv", "--quiet", "--clear", "--python", interpreter.path, folder)
    pip = (UV, "pip", "install", "--quiet", "--python", python)
    _call(version, *pip, "--editable", ".", "--group", group)
    return python


def _call(what: str, *command: str | Path) -> None:
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "ASGI_PPROF_REQUIRE_NATIVE": "1"}, check=False
    )
    if done.returncode:
        raise Failed(f"{what}: exit status {done.returncode}: {shlex.join(map(str, command))}")


def _engine(suite: Suite) -> str:
    """Return the name of the engine; raise Failed if it is not the suite's."""
    ask = "from asgi_pprof.native.core import native, reason; print('native' if native else reason)"
    done = subprocess.run(
        [suite.python, "-c", ask],
        cwd=ROOT,
        env=suite.environment,
        capture_output=True,
        text=True,
        check=False,
    )
    engine = done.stdout.strip()
    if done.returncode or (engine == "native") != suite.native:
        raise Failed(f"{suite.name}: the engine is wrong: {engine}{done.stderr}")
    return engine if suite.native else "python"


def run(suite: Suite, marks: str, arguments: list[str], alone: list[str] | None = None) -> None:
    """
    Run the tests of a suite that have these marks, and add the result to the suite.

    Args:
        suite: Which one.
        marks: As pytest's `-m`.
        arguments: More for pytest.
        alone: Those for running once more, one by one, what has failed beside others.
            The summary counts these tests: each is to be mended, or marked timing.
    """
    say(f"{suite.name}: {marks}")
    status, counts, lines = pytest(suite, ["-m", marks, *arguments])
    if status == 1 and alone is not None:
        say(*lines[-LAST_LINES:], f"{suite.name}: {marks}: what failed runs once more, alone")
        failed = counts.pop("failed", 0) + counts.pop("error", 0) + counts.pop("errors", 0)
        status, again, lines = pytest(suite, ["-m", marks, "--last-failed", *alone])
        counts += again
        suite.alone += failed
    suite.counts += counts
    if status in (0, 5):  # 5: no test has these marks
        say(f"{suite.name}: {marks}: {counts['passed']} passed")
    else:
        how = f"hangs after {LIMIT_S} s" if status is None else f"exit status {status}"
        suite.problems.append(how)
        say(*lines[-LAST_LINES:], f"{suite.name}: {marks}: {how}")


def pytest(suite: Suite, arguments: list[str]) -> tuple[int | None, Counter[str], list[str]]:
    """Run pytest, and return its exit status (None if it hangs), counts and output."""
    kept = suite.python.parent.parent / f"pytest-{suite.engine}"  # which tests have failed
    start = time.monotonic()
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        try:
            status: int | None = subprocess.run(
                [suite.python, *suite.mode, "-m", "pytest", "-o", f"cache_dir={kept}", *arguments],
                cwd=ROOT,
                env=suite.environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=LIMIT_S,
                check=False,
            ).returncode
        except subprocess.TimeoutExpired:
            status = None
        output.seek(0)
        lines = output.read().splitlines()
    suite.seconds += time.monotonic() - start
    found = re.findall(r"(\d+) (passed|failed|skipped|errors?)\b", (lines or [""])[-1])
    return status, Counter({what: int(number) for number, what in found}), lines


def summary(suites: list[Suite]) -> list[str]:
    """Return the lines of a table."""
    titles = ["suite", "version", "engine", "passed", "failed", "skipped", "seconds", ""]
    rows = [titles]
    for suite in suites:
        count = suite.counts
        numbers = (count["passed"], count["failed"] + count["errors"] + count["error"])
        rows.append(
            [
                suite.name,
                suite.interpreter.version,
                suite.engine,
                *map(str, numbers),
                str(count["skipped"]),
                f"{suite.seconds:.0f}",
                ", ".join(suite.problems or ["ok"])
                + (f", {suite.alone} passed alone only" if suite.alone else ""),
            ]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def say(*lines: str) -> None:
    """Print and flush, so that the progress is visible in CI."""
    sys.stdout.write("\n".join([*lines, ""]))
    sys.stdout.flush()


if __name__ == "__main__":
    main()
