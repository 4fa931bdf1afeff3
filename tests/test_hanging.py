"""The commands of docs/hanging.md find each fault, and print the output shown there."""

from __future__ import annotations

import contextlib
import re
import shlex
import subprocess

import pytest

from tests.servers import ROOT, ServerProcess, ask, leaving_client, until

pytestmark = pytest.mark.server

PAGE = (ROOT / "docs" / "hanging.md").read_text()
BLOCK = re.compile(r"^```(sh|text)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def steps(service):
    """Return the commands of the page for this service, each with an excerpt of its output."""
    found = []
    for section in PAGE.split("\n## ")[1:]:
        if ("demo/orders.py" in section) is not (service == "orders"):
            continue
        blocks = BLOCK.findall(section)
        assert [kind for kind, _ in blocks[0::2]] == ["sh"] * (len(blocks) // 2)
        title = section.splitlines()[0]
        for (_, command), (kind, excerpt) in zip(blocks[0::2], blocks[1::2], strict=True):
            assert kind == "text"
            found.append(pytest.param(command, excerpt, id=f"{title}: {command.split('/')[-1]}"))
    return found


def as_compared(line):
    """Return the line without the parts that depend on the machine, the Python or the run."""
    line = re.sub(r"\bgoroutine \d+|Task-\d+|0x[0-9a-f]+|\t+", " ", line)
    line = re.sub(r" /\S+/", " ", line).replace("docs.demo.", "")
    line = re.sub(r"^\d+ (?=\d+ @ )", "N ", line)  # nanoseconds
    line = re.sub(r"^(loop_stalls_total\S*) [1-9]\d*$", r"\1 N", line)  # more if it is slow
    if "stuck" not in line and "orders" not in line:
        line = re.sub(r"\+ |:\d+", "", line)  # line numbers in files of other packages
    if " @ " in line:
        line = line.partition(" @ ")[0]  # addresses depend on line numbers
    return " ".join(line.split())


@pytest.fixture(scope="module", params=["asyncio", "uvloop"])
def stuck(request):
    """The service, after all its faults have been triggered."""
    server = ServerProcess("docs.demo.stuck:app", request.param, (), {})
    with contextlib.ExitStack() as clients:
        with contextlib.suppress(AssertionError):
            server.__enter__()
        try:
            for path in ("/transfer/1/2", "/transfer/2/1", "/report", *["/print"] * 42):
                clients.enter_context(leaving_client(server.port, path))
            ask(server.port, "/subscribe")
            until(lambda: server.get("goroutine?debug=2").text.count("stuck.transfer(") == 2)
            until(lambda: server.get("goroutine?debug=2").text.count("stuck.report(") == 1)
            until(lambda: "2 tasks wait for a thread" in server.get("goroutine?debug=1").text)
            assert ask(server.port, "/invoice/1").text == "1"
            yield server
        finally:
            server.process.kill()  # a shutdown would wait for its requests for ever
            server.process.communicate()


def find(server, command, excerpt):
    """Run a command of the page, and look for the lines that are shown there, in their order."""
    arguments = shlex.split(command.replace("localhost:8000", f"localhost:{server.port}"))
    done = subprocess.run(
        [*arguments, "--fail", "--silent", "--show-error"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    lines = iter([as_compared(line) for line in done.stdout.splitlines()])
    for line in excerpt.splitlines():
        if line not in ("...", "") and not line.startswith("goroutineleak profile:"):
            assert as_compared(line) in lines, f"not found, or not in order: {line}"


@pytest.mark.parametrize(("command", "excerpt"), steps("stuck"))
def test_the_fault_is_found(stuck, command, excerpt):
    """The command prints the lines shown on the page, in the same order."""
    find(stuck, command, excerpt)


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
@pytest.mark.parametrize(("command", "excerpt"), steps("orders"))
def test_the_exhausted_connection_pool_is_found(loop, command, excerpt):
    """Five requests have a connection, and two wait for one inside a greenlet of SQLAlchemy's."""
    pytest.importorskip("aiosqlite")
    pytest.importorskip("sqlalchemy")
    server = ServerProcess("docs.demo.orders:app", loop, (), {}).__enter__()
    with contextlib.ExitStack() as clients:
        try:
            for number in range(7):
                clients.enter_context(leaving_client(server.port, f"/order/{number}"))
            until(lambda: server.get("goroutine?debug=2").text.count("QueuePool._do_get(") == 2)
            until(lambda: server.get("goroutine?debug=2").text.count("[Event.wait]") == 5)
            find(server, command, excerpt)
        finally:
            server.process.kill()  # a shutdown would wait for its requests for ever
            server.process.communicate()


def test_nothing_else_is_found(stuck):
    """There are two leaks, two tasks at the second lock, forty threads and two waiting tasks."""
    leaks = stuck.get("goroutineleak?debug=1").text
    assert leaks.startswith("goroutineleak profile: total 2\n")
    dump = stuck.get("goroutine?debug=2").text
    assert dump.count(" [Lock.acquire] ") == 2
    assert dump.count("<worker thread>") == 40
    assert dump.count('[waiting for a thread] {method: GET, route: /print, task: "Task-') == 2
    assert dump.count('workers: "40 of 40 busy"') == 2
