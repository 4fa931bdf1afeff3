"""The sdist contains the extension's sources, and installs without a compiler too."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from tests.servers import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.once]

WHAT_IS_BUILT = ["asgi_pprof", "pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"]
MADE = shutil.ignore_patterns("*.so", "__pycache__")
NO_COMPILER = {"CC": "false"}

has_extension = pytest.mark.skipif(
    sys.platform != "linux"
    or sys.implementation.name != "cpython"
    or bool(sysconfig.get_config_var("Py_GIL_DISABLED")),
    reason="no extension on this platform",
)


def run(*command: str | Path, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a command in an environment that has nothing of ours but `variables`."""
    ours = ("ASGI_PPROF_NATIVE", "ASGI_PPROF_REQUIRE_NATIVE", "PYTHONPATH", "CC", "CFLAGS")
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    return subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env={**environment, **variables},
        capture_output=True,
        text=True,
        check=False,
        timeout=170,
    )


def build_wheel(sdist: Path, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Build a wheel from the sdist into the folder, with the setuptools we have."""
    pip = (sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps")
    return run(*pip, "--wheel-dir", folder, sdist, cwd=sdist.parent, **variables)


def install(wheel: Path, folder: Path) -> Path:
    """Make a virtual environment with the wheel and our starlette; return its interpreter."""
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index")
    done = run(*pip, wheel, cwd=folder)
    assert done.returncode == 0, done.stderr
    # Its dependencies. Path files found there are not read, so this checkout is not importable.
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    return python


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """The source distribution, made from a copy of the project."""
    folder = tmp_path_factory.mktemp("sdist")
    project = folder / "project"
    project.mkdir()
    for name in WHAT_IS_BUILT:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, project / name, ignore=MADE)
        else:
            shutil.copy(source, project / name)
    build = f"from setuptools.build_meta import build_sdist; build_sdist({str(folder)!r})"
    done = run(sys.executable, "-c", build, cwd=project)
    assert done.returncode == 0, done.stderr
    (made,) = folder.glob("*.tar.gz")
    return made


def test_sdist_has_the_sources(sdist):
    """It has every C file and header of the checkout, and the build files."""
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "asgi_pprof/_native").iterdir()}
    assert {name for name in sources if name.endswith(".c")}
    assert {"setup.py", "pyproject.toml", *sources} <= names


@has_extension
def test_wheel_has_the_extension_and_no_sources(sdist, tmp_path):
    """It has one shared object and no C sources."""
    done = build_wheel(sdist, tmp_path, ASGI_PPROF_REQUIRE_NATIVE="1")
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert [name for name in names if name.endswith(".so")] == [
        "asgi_pprof/_native" + sysconfig.get_config_var("EXT_SUFFIX")
    ]
    assert [name for name in names if name.endswith((".c", ".h"))] == []
    python = install(wheel, tmp_path / "venv")
    done = run(python, ROOT / "tests/smoke.py", "native", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert str(tmp_path) in done.stdout


def test_installs_without_a_compiler(sdist, tmp_path):
    """Then the engines in Python serve, and `native.reason` says why."""
    done = build_wheel(sdist, tmp_path, **NO_COMPILER)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    python = install(wheel, tmp_path / "venv")
    done = run(python, ROOT / "tests/smoke.py", "python", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert str(tmp_path) in done.stdout
    find = "from importlib.util import find_spec; print(find_spec('asgi_pprof._native'))"
    assert run(python, "-c", find, cwd=tmp_path).stdout == "None\n"


@has_extension
def test_failing_to_compile_can_be_an_error(sdist, tmp_path):
    """With ASGI_PPROF_REQUIRE_NATIVE=1 the build fails; tests and wheels use that."""
    done = build_wheel(sdist, tmp_path, ASGI_PPROF_REQUIRE_NATIVE="1", **NO_COMPILER)
    assert done.returncode != 0
    assert not list(tmp_path.glob("*.whl"))
