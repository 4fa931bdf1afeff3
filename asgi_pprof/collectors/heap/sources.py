"""
Finds functions by file and line, because tracemalloc records nothing else.

Names and lines are those of the code objects in the compiled module. The module's
loader returns its code, normally from the .pyc file; without a loader the source is
compiled again.
"""

from __future__ import annotations

import linecache
from collections.abc import Iterator
from functools import lru_cache
from types import CodeType
from typing import Any

from asgi_pprof.offload import yield_gil
from asgi_pprof.profile import Function, Location
from asgi_pprof.runtime.modules import loaded_modules
from asgi_pprof.stacks import Symbols

_MAX_LOCATIONS = 16_384


class LineNames:
    """Locations by file and line, of which 16,384 are remembered."""

    def __init__(self) -> None:
        self._symbols = Symbols()
        self._locations: dict[tuple[str, int], Location] = {}

    def begin(self) -> None:
        """Look at the modules that are loaded now; call it before each profile."""
        self._symbols = Symbols()
        if len(self._locations) >= _MAX_LOCATIONS:
            self._locations.clear()

    def location(self, filename: str, line: int) -> Location:
        """Return the location of a line in the innermost function that has the line."""
        known = self._locations.get((filename, line))
        if known is None:
            yield_gil()
            qualname, start_line = _functions(filename).get(line, ("<unknown>", 0))
            name = self._symbols.qualify(filename, qualname)
            known = Location(Function(name, filename, start_line), line)
            self._locations[filename, line] = known
        return known


@lru_cache(maxsize=64)  # some 40 kB a file of 1,000 lines
def _functions(filename: str) -> dict[int, tuple[str, int]]:
    """Return the qualified name and the first line of the innermost function, by line."""
    functions: dict[int, tuple[str, int]] = {}
    code = _module_code(filename)
    for nested in _nested_codes(code) if code else ():
        function = nested.co_qualname, nested.co_firstlineno
        functions.update(dict.fromkeys(_own_lines(nested), function))
    return functions


def _nested_codes(code: CodeType) -> Iterator[CodeType]:
    """Yield the code and all code defined in it, outer before inner."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _nested_codes(constant)


def _own_lines(code: CodeType) -> set[int]:
    lines = {line for _, _, line in code.co_lines() if line is not None}
    if len(lines) > 1:
        # The first line of a function belongs to the code that defines it.
        lines.discard(code.co_firstlineno)
    return lines if code.co_name != "<module>" else lines | {code.co_firstlineno}


def _module_code(filename: str) -> CodeType | None:
    module = next((module for file, _, module in loaded_modules() if file == filename), None)
    loader: Any = getattr(module, "__loader__", None)
    # Under `python -m` the loader accepts the module's real name only, not `__main__`.
    name = getattr(getattr(module, "__spec__", None), "name", None) or "__main__"
    try:
        code = loader.get_code(name) if hasattr(loader, "get_code") else None
        if isinstance(code, CodeType):
            return code
        source = "".join(linecache.getlines(filename))
        return compile(source, filename, "exec", dont_inherit=True) if source else None
    except Exception:
        # There is no source, or a loader raises errors of its own: the line stays unnamed.
        return None
