"""The C extension, where it can be had; all else is in pyproject.toml."""

import os
import sys
import sysconfig
from glob import glob

from setuptools import Extension, setup

# It reads the frames of CPython with a GIL, on the timers and files of Linux.
# Everywhere else, and where it does not compile, the engines in Python serve.
supported = (
    sys.platform == "linux"
    and sys.implementation.name == "cpython"
    and not sysconfig.get_config_var("Py_GIL_DISABLED")
)
native = Extension(
    "asgi_pprof._native",
    sources=sorted(glob("asgi_pprof/_native/*.c")),
    depends=sorted(glob("asgi_pprof/_native/*.h")),
    extra_compile_args=["-std=gnu11", "-O2", "-Wall", "-Wextra", "-fvisibility=hidden"],
    libraries=["m", "pthread", "rt"],  # of their own until glibc 2.34
    optional=os.environ.get("ASGI_PPROF_REQUIRE_NATIVE") != "1",
)

setup(ext_modules=[native] if supported else [])
