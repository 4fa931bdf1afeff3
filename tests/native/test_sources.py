"""The C sources include one another in one direction only."""

from __future__ import annotations

import graphlib
import re

import pytest

from tests.servers import ROOT

SOURCES = ROOT / "asgi_pprof/_native"

pytestmark = pytest.mark.once


def includes() -> dict[str, set[str]]:
    """Return which others each file includes; a .c and its .h are one file."""
    found: dict[str, set[str]] = {}
    for path in SOURCES.glob("*.[ch]"):
        names = re.findall(r'^#include "(\w+)\.h"', path.read_text(), re.MULTILINE)
        found.setdefault(path.stem, set()).update(names)
    return {name: others - {name} for name, others in found.items()}


def test_no_file_includes_itself_by_way_of_others():
    """So a file calls only into the files that it includes, and these do not know it."""
    graph = includes()
    assert graph["heap_sampler"] >= {"hooks", "labels"}, "includes are found"
    order = list(graphlib.TopologicalSorter(graph).static_order())
    assert order[-1] == "module"


def test_the_comment_in_module_c_names_the_includes_of_every_file():
    """The comment is the entry to the C core for a reader."""
    comment = (SOURCES / "module.c").read_text().partition("*/")[0]
    lines = re.findall(r"^ \*   (\w+):(.*(?:\n \*    .*)*)$", comment, re.MULTILINE)
    assert {name: set(re.findall(r"\w+", others)) for name, others in lines} == includes()
