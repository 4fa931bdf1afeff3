"""
The C core `asgi_pprof._native`: the module, or why it is not there.

It is built where CPython 3.11 to 3.15 runs on Linux and there is a wheel or a
C compiler; elsewhere the pure Python engines serve, and nothing else changes.
`ASGI_PPROF_NATIVE=0` in the environment leaves it out.
"""

from __future__ import annotations

import atexit
import importlib
import os
from typing import TYPE_CHECKING, Any

_SWITCH = "ASGI_PPROF_NATIVE"


def _load() -> tuple[Any, str]:
    if os.environ.get(_SWITCH) == "0":
        return None, f"switched off by {_SWITCH}=0"
    try:
        module = importlib.import_module("asgi_pprof._native")
    except ImportError as error:
        return None, str(error)
    if not hasattr(module, "cpu_start"):  # in a source tree the name is that of a folder
        return None, "not built for this Python"
    # While an interpreter takes itself apart nothing may be sampled.
    atexit.register(module.close)
    return module, ""


# Any: a module that may be missing has no type that says what is in it.
native, reason = _load()
"""The module or None, and why it is None."""

if TYPE_CHECKING:

    class LabelNode:
        """The base of label sets, by which the C core knows them."""

        number: int

else:
    LabelNode = native.LabelSet if native else object
