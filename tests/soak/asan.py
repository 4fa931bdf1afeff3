"""
Run the soak with a C core compiled with AddressSanitizer and UBSan.

The core is compiled in a temporary copy of the source tree. Only the core's own
reads and writes are instrumented, not the interpreter's.

- `PYTHONMALLOC=malloc`: each object comes from the sanitizer's allocator, so
  reading a freed object is an error. In pymalloc's arenas it would go unnoticed.
- `detect_leaks=0`: CPython never frees static types, interned strings and more.
  The C core never frees the slots of threads, which a late signal may still use.
- No report is suppressed: the signal handler reads with process_vm_readv, which
  fails on unmapped memory and is not checked by the sanitizer.

The sanitizer checks child processes as well. GCC's sanitizer before 14 does not
renew its own locks in a child forked from a process with threads. If a child
hangs, run again with `--without fork,multiprocessing` to see whether that is the
cause. All arguments are passed to the soak.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

_ROOT = Path(__file__).parents[2]
_OPTIONS = {
    "PYTHONMALLOC": "malloc",
    "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1:quarantine_size_mb=128",
    "UBSAN_OPTIONS": "print_stacktrace=1",
}
_FLAGS = (
    "-shared -fPIC -std=gnu11 -O1 -g -fno-omit-frame-pointer -fvisibility=hidden"
    " -fsanitize=address,undefined -fno-sanitize-recover=undefined"
)


def _compile(package: Path, compiler: str) -> None:
    for stale in package.glob("_native.*.so"):
        stale.unlink()
    sources = sorted(map(str, (package / "_native").glob("*.c")))
    output = package / f"_native{sysconfig.get_config_var('EXT_SUFFIX')}"
    headers = sysconfig.get_paths()["include"]
    command = [compiler, *_FLAGS.split(), f"-I{headers}", *sources, "-o", str(output)]
    subprocess.run([*command, "-lm", "-lpthread", "-lrt"], check=True)


def _find(compiler: str, library: str) -> str:
    asked = subprocess.run(
        [compiler, f"-print-file-name={library}"], check=True, capture_output=True, text=True
    )
    return asked.stdout.strip()


def main() -> int:
    """Compile the core, run the soak, and return its exit code."""
    compiler = os.environ.get("CC", "gcc")
    # libstdc++ is preloaded too. The sanitizer looks up the function that throws C++ exceptions
    # only while it is loaded; without it, the first C++ exception (greenlet's) ends the process.
    libraries = [_find(compiler, name) for name in ("libasan.so", "libstdc++.so.6")]
    with tempfile.TemporaryDirectory() as folder:
        for name in ("asgi_pprof", "tests"):
            shutil.copytree(_ROOT / name, Path(folder, name))
        _compile(Path(folder, "asgi_pprof"), compiler)
        environment = {**os.environ, **_OPTIONS, "LD_PRELOAD": " ".join(libraries)}
        command = [sys.executable, "-m", "tests.soak", *sys.argv[1:]]
        return subprocess.run(command, cwd=folder, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
