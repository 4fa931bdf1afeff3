"""The walk through docs/hanging.md: its commands find each fault, with the output it shows."""

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


def steps():
    """Return (title, command, excerpt of what it prints) of every step of the page."""
    found = []
    for section in PAGE.split("\n## ")[1:]:
        blocks = BLOCK.findall(section)
        assert [kind for kind, _ in blocks[0::2]] == ["sh"] * (len(blocks) // 2)
        title = section.splitlines()[0]
        for (_, command), (kind, excerpt) in zip(blocks[0::2], blocks[1::2], strict=True):
            assert kind == "text"
            found.append(pytest.param(command, excerpt, id=f"{title}: {command.split('/')[-1]}"))
    return found


def as_compared(line):
    """Leave out what differs from one machine, Python and run to the next."""
    line = re.sub(r"\bgoroutine \d+|Task-\d+|0x[0-9a-f]+|\t+", " ", line)
    line = re.sub(r" /\S+/", " ", line).replace("docs.demo.", "")
    line = re.sub(r"^\d+ (?=\d+ @ )", "N ", line)  # nanoseconds
    line = re.sub(r"^(loop_stalls_total\S*) [1-9]\d*$", r"\1 N", line)  # a slow machine's too
    if "stuck" not in line:
        line = re.sub(r"\+ |:\d+", "", line)  # lines of other people's files
    if " @ " in line:
        line = line.partition(" @ ")[0]  # addresses are of lines, too
    return " ".join(line.split())


@pytest.fixture(scope="module", params=["asyncio", "uvloop"])
def stuck(request):
    """The service, with all its faults brought about."""
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
            server.process.kill()  # it would wait for its requests for ever
            server.process.communicate()


@pytest.mark.parametrize(("command", "excerpt"), steps())
def test_the_fault_is_found(stuck, command, excerpt):
    """The command prints the lines that the page shows, in that order."""
    arguments = shlex.split(command.replace("localhost:8000", f"localhost:{stuck.port}"))
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


def test_what_is_found_is_the_whole_of_it(stuck):
    """Two leaks, two tasks at the second lock, forty threads, and two tasks that wait for one."""
    leaks = stuck.get("goroutineleak?debug=1").text
    assert leaks.startswith("goroutineleak profile: total 2\n")
    dump = stuck.get("goroutine?debug=2").text
    assert dump.count(" [Lock.acquire] ") == 2
    assert dump.count("<worker thread>") == 40
    assert dump.count('[waiting for a thread] {method: GET, route: /print, task: "Task-') == 2
    assert dump.count('workers: "40 of 40 busy"') == 2
