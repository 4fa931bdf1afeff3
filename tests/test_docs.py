"""The code in the docs runs, and the commands in them work on a real service."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gotool import go_pprof
from tests.servers import ROOT

pytestmark = pytest.mark.once

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(language):
    """Return all fenced blocks of a language, as parameters with page and line as id."""
    found = []
    for page in PAGES:
        text = page.read_text()
        for match in re.finditer(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
            line = text.count("\n", 0, match.start()) + 1
            found.append(pytest.param(match[1], id=f"{page.name}:{line}"))
    return found


def commands():
    """Return every line of the shell blocks: each is a command."""
    return [
        pytest.param(line, id=f"{block.id}:{number}")
        for block in blocks("sh")
        for number, line in enumerate(block.values[0].splitlines())
    ]


def headings(page):
    """Return the names by which links reach the headings of a page, as GitHub makes them."""
    lines = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", line.lower()).replace(" ", "-") for line in lines}


def test_every_block_names_its_language():
    """No test would run a block without a language."""
    for page in PAGES:
        fences = re.findall(r"^```(.*)$", page.read_text(), re.MULTILINE)
        assert all(fences[0::2]), page
        assert set(fences[0::2]) <= {"python", "sh", "text"}, page


@pytest.mark.parametrize("code", blocks("python"))
def test_code_runs(code, tmp_path):
    """Each block is a whole program and runs in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.server
@pytest.mark.go
@pytest.mark.parametrize("command", commands())
def test_command_works(command, any_shop, tmp_path):
    """curl and go tool pprof work as printed on a running service."""
    arguments = [
        each.replace("localhost:8000", f"localhost:{any_shop.port}")
        for each in shlex.split(command)
    ]
    if arguments[:2] == ["pip", "install"]:
        assert 'name = "asgi-pprof"' in (ROOT / "pyproject.toml").read_text()
        assert arguments[2:] == ["asgi-pprof"]
    elif arguments[0] == "curl":
        curl = ["curl", "--fail", "--silent", "--show-error", *arguments[1:]]
        done = subprocess.run(curl, cwd=tmp_path, capture_output=True, check=False, timeout=60)
        assert done.returncode == 0, done.stderr
        assert done.stdout or list(tmp_path.iterdir())
    else:
        assert arguments[:3] == ["go", "tool", "pprof"]
        saved = tmp_path / "before.pb.gz"
        saved.write_bytes(any_shop.get("heap").body)
        arguments = [str(saved) if each == saved.name else each for each in arguments]
        with any_shop.load("/v1/items/5", clients=1):
            go_pprof(tmp_path, *arguments[3:])


def test_links_between_pages_lead_somewhere():
    """The file of every relative link exists, and so does the heading it names."""
    for page in PAGES:
        for link, heading in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", page.read_text()):
            if not link.startswith("http"):
                target = page.parent / link if link else page
                assert target.exists(), f"{page.name}: {link}"
                assert not heading or heading in headings(target), f"{page.name}: #{heading}"


@pytest.mark.parametrize("page", ["contributing.md", "design.md"])
def test_files_that_are_named_exist(page):
    """Paths are from the repository, or from the package."""
    paths = re.findall(r"`([\w/.-]+(?:\.(?:py|[ch])|/))`", (ROOT / "docs" / page).read_text())
    assert len(paths) > 20
    for path in paths:
        assert (ROOT / path).exists() or (ROOT / "asgi_pprof" / path).exists(), path


def test_readme_is_short():
    """The README is read first, so it has about 120 lines."""
    assert len((ROOT / "README.md").read_text().splitlines()) <= 125


def test_make_targets_that_are_named_exist():
    """The Makefile has every target that the pages name."""
    targets = set(re.findall(r"^([a-z-]+):", Path(ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        assert set(re.findall(r"`make ([a-z-]+)", page.read_text())) <= targets, page
