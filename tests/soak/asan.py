"""
Run the soak with a C core that AddressSanitizer and UBSan watch.

The core is compiled into a temporary copy of the source tree. Only its own
code is instrumented: every read and write it does, not the interpreter's.

- `PYTHONMALLOC=malloc`: objects come from the sanitizer's allocator one by one,
  so that reading one that has been freed is an error. Within pymalloc's arenas
  it would not be.
- `detect_leaks=0`: CPython itself lets static types, interned strings and more
  be until the process ends, and so do we on purpose: names and the slots that a
  late signal may still use.
- no suppressions: the handler reads by process_vm_readv, which fails where there
  is nothing, and a sanitizer has nothing to say about that.

Children are watched as well. The sanitizer of GCC before 14 does not renew its own
locks in a child that is forked from a process with threads; should one hang,
`--without fork,multiprocessing` tells. Arguments go to the soak.
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
    """Compile, run, and return the soak's exit code."""
    compiler = os.environ.get("CC", "gcc")
    # With libstdc++, or the first exception that C++ throws (greenlet does) ends the process:
    # the sanitizer looks for what throws them when it is loaded, and only then.
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
