"""The package works in programs without sources or files: compiled only, or in a zip archive."""

from __future__ import annotations

import compileall
import shutil
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import pytest

import asgi_pprof
from asgi_pprof.native.core import native

pytestmark = pytest.mark.once

PACKAGE = Path(asgi_pprof.__file__).parent

SERVICE = """
import os, threading, time

class Orders:
    def sort(self, started, seconds):
        started.set()
        end = time.thread_time() + seconds
        while time.thread_time() < end:
            os.environ.get("HOME")

def burn(started, seconds):
    Orders().sort(started, seconds)
"""

PROGRAM = """
import asyncio, sys, threading
import orders, asgi_pprof
from asgi_pprof import PprofMiddleware
from asgi_pprof.native.core import native

async def application(scope, receive, send):
    pass

async def asked(app, name, query=b""):
    sent = []
    async def receive():
        await asyncio.sleep(3600)
    async def send(message):
        sent.append(message)
    scope = {"type": "http", "method": "GET", "path": "/debug/pprof/" + name}
    scope |= {"query_string": query, "headers": [], "client": ("127.0.0.1", 1)}
    await app(scope, receive, send)
    assert sent[0]["status"] == 200, sent
    return b"".join(each["body"] for each in sent[1:]).decode()

async def waits(lock):
    async with lock:
        pass

async def main():
    app = PprofMiddleware(application, memory_profile_rate=0)
    assert "Types of profiles available" in await asked(app, "")
    started, lock = threading.Event(), asyncio.Lock()
    await lock.acquire()
    waiting = asyncio.create_task(waits(lock))
    thread = threading.Thread(target=orders.burn, args=(started, 3))
    thread.start()
    await asyncio.to_thread(started.wait)
    threads = await asked(app, "thread", b"debug=1")
    assert "orders.Orders.sort" in threads, threads
    assert "orders.burn" in threads, threads
    tasks = await asked(app, "goroutine", b"debug=2")
    assert "[Lock.acquire]" in tasks, tasks
    lock.release()
    await waiting
    if native:
        from asgi_pprof.collectors.cpu.collector import CpuCollector
        profile = (await CpuCollector().collect(0.5, asyncio.Event(), 100))()
        names = {place.function.name for each in profile.samples for place in each.stack}
        assert {"orders.burn", "orders.Orders.sort", "os._Environ.__getitem__"} <= names, names
    await asyncio.to_thread(thread.join)
    app._pprof.close()
    print(asgi_pprof.__file__, bool(native))

asyncio.run(main())
"""


@pytest.fixture
def program(tmp_path):
    """A copy of the package and a service that uses it."""
    sources = tmp_path / "built" / "here"
    ignored = shutil.ignore_patterns("__pycache__", "*.c", "*.h")
    shutil.copytree(PACKAGE, sources / "asgi_pprof", ignore=ignored)
    (sources / "orders.py").write_text(SERVICE)
    (tmp_path / "main.py").write_text(textwrap.dedent(PROGRAM))
    return tmp_path


def run(folder: Path, path: Path) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-P", folder / "main.py"],
        env={"PYTHONPATH": str(path), "PATH": "/usr/bin:/bin", "HOME": str(folder)},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout.split()


def test_a_program_without_sources_can_be_profiled(program):
    """`compileall -b` makes such a program. Its code objects have the sources' file names."""
    compileall.compile_dir(program / "built", quiet=2, legacy=True)
    for source in (program / "built").rglob("*.py"):
        source.unlink()
    moved = (program / "built").rename(program / "moved") / "here"
    loaded_from, is_native = run(program, moved)
    assert Path(loaded_from) == moved / "asgi_pprof" / "__init__.pyc"
    assert is_native == str(bool(native))


def test_a_program_in_an_archive_can_be_profiled(program):
    """The package reads none of its own files."""
    archive = program / "all.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for each in (program / "built" / "here").rglob("*.py"):
            file.write(each, each.relative_to(program / "built" / "here"))
    loaded_from, _ = run(program, archive)
    assert loaded_from.startswith(str(archive))
