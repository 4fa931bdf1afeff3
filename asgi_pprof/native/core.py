"""
Loads the C core `asgi_pprof._native`, or says why it is missing.

It is built for CPython 3.11 to 3.15 on Linux, if there is a wheel or a C
compiler. Without it the pure Python engines are used, and nothing else changes.
`ASGI_PPROF_NATIVE=0` in the environment switches it off.
"""

from __future__ import annotations

import atexit
import os
from typing import TYPE_CHECKING, Any

_SWITCH = "ASGI_PPROF_NATIVE"


def _load() -> tuple[Any, str]:
    if os.environ.get(_SWITCH) == "0":
        return None, f"switched off by {_SWITCH}=0"
    try:
        # An import statement, so that tools that freeze programs find the module.
        import asgi_pprof._native as found
    except ImportError as error:
        return None, str(error)
    module: Any = found
    if not hasattr(module, "cpu_start"):  # in a source tree the name finds the C sources' folder
        return None, "not built for this Python"
    # Nothing may be sampled while the interpreter is finalized.
    atexit.register(module.close)
    return module, ""


# Any, because no type can describe a module that may be missing.
native, reason = _load()
"""The module or None, and why it is None."""

if TYPE_CHECKING:

    class LabelNode:
        """The base class of label sets, by which the C core recognizes them."""

        number: int

else:
    LabelNode = native.LabelSet if native else object
