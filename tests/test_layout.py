"""The rules of which module may import which are checked by reading the imports."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import asgi_pprof

pytestmark = pytest.mark.once

ROOT = Path(asgi_pprof.__file__).parent
KNOW_ASGI = {
    "asgi_pprof",
    *(
        f"asgi_pprof.{name}"
        for name in (
            "app errors guard middleware params paths registry request_labels responses".split()
        )
    ),
}
"""Modules that may use scope, receive and send, or the classes of starlette."""


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FORMER_NAMES = {"asgi_pprof.collectors.heap_native"}
"""Modules that only import names from their new places."""
TREES = {name_of(path): ast.parse(path.read_text()) for path in ROOT.rglob("*.py")}
for former in FORMER_NAMES:
    assert all(isinstance(node, ast.ImportFrom | ast.Expr) for node in TREES.pop(former).body)


def imports(name: str) -> set[str]:
    """Return all modules that a module imports, wherever it does; of packages, what is taken."""
    found = set()
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} imports relatively"
            taken = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {each if each in TREES else str(node.module) for each in taken}
    return found


OURS = {name: imports(name) & TREES.keys() for name in TREES}


def room(name: str) -> str:
    """Return which profile's a module is: collectors.heap.sampler is of collectors.heap."""
    parts = name.split(".")
    return ".".join(parts[:3]) if parts[1:2] == ["collectors"] and len(parts) > 2 else ""


def below(package: str) -> set[str]:
    return {name for name in TREES if name == package or name.startswith(f"{package}.")}


def test_there_is_something_to_read():
    assert {"asgi_pprof.app", "asgi_pprof.collectors.heap.sampler"} <= TREES.keys()
    assert "asgi_pprof.profile" in OURS["asgi_pprof.encoders.protobuf"]


def test_collectors_do_not_import_one_another_across_rooms():
    across = {
        (name, other)
        for name in filter(room, TREES)
        for other in filter(room, OURS[name])
        if room(name) != room(other)
    }
    assert across == set()


@pytest.mark.parametrize("package", ["runtime", "encoders", "web", "native"])
def test_collectors_are_not_imported_from_below(package):
    names = below(f"asgi_pprof.{package}")
    assert names
    assert {(name, other) for name in names for other in filter(room, OURS[name])} == set()


def test_only_the_outermost_modules_know_asgi():
    knowing = {
        name
        for name, tree in TREES.items()
        if any(other.partition(".")[0] == "starlette" for other in imports(name))
        or any(
            node.arg in ("scope", "receive", "send")
            for node in ast.walk(tree)
            if isinstance(node, ast.arg)
        )
    }
    assert {"asgi_pprof.middleware", "asgi_pprof.app"} <= knowing
    assert knowing - KNOW_ASGI == set()
    inner = TREES.keys() - KNOW_ASGI - {"asgi_pprof.recorders"}
    assert {(name, other) for name in inner for other in OURS[name] & KNOW_ASGI} == {
        (name, "asgi_pprof.errors") for name in inner if "asgi_pprof.errors" in OURS[name]
    }


def test_only_recorders_keeps_recorders():
    """A recorder is for the whole process: there is one list of them."""
    bases = {
        node.name: {base.id for base in node.bases if isinstance(base, ast.Name)}
        for tree in TREES.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    }
    kinds = {"Recorder"}
    while more := {name for name, above in bases.items() if above & kinds} - kinds:
        kinds |= more
    assert len(kinds) > 3
    kept = {
        (name, node.value.func.id)
        for name, tree in TREES.items()
        for node in tree.body
        if isinstance(node, ast.Assign | ast.AnnAssign)
        and isinstance(node.value, ast.Call)
        and isinstance(node.value.func, ast.Name)
        and node.value.func.id in kinds
    }
    assert {name for name, _ in kept} == {"asgi_pprof.recorders"}


def test_no_module_imports_itself_in_a_circle():
    try:
        list(TopologicalSorter(OURS).static_order())
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))
