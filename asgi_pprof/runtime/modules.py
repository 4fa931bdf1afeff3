"""
The loaded modules, and the file names that their code has.

A module's `__file__` is not always what its code says. Code that was compiled before
it was installed (a program without sources, a frozen one) has the name that its
source had then, and modules that CPython has frozen have `<frozen os>`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import FunctionType, ModuleType
from typing import Any

_FROZEN = "<frozen "


def loaded_modules() -> Iterator[tuple[str, str, ModuleType]]:
    """Yield the file name, the name and the module for each entry of `sys.modules` with a file."""
    # A copy, which no other code changes: creating the pairs may collect garbage (3.11).
    for name, module in sys.modules.copy().items():
        # Normal attribute access could load a lazy module, or the target of a proxy.
        if issubclass(type(module), ModuleType):
            filename = code_filename(module)
            if filename:
                yield filename, name, module


def frozen_module(filename: str) -> str:
    """Return the name of the module whose code CPython has frozen under this file name, or ""."""
    return filename[len(_FROZEN) : -1] if filename.startswith(_FROZEN) else ""


def code_filename(module: ModuleType | None) -> str:
    """Return the file name that the code of a module's functions has, "" for no module or file."""
    if module is None:
        return ""
    namespace: dict[str, Any] = object.__getattribute__(module, "__dict__")
    filename = namespace.get("__file__")
    if not isinstance(filename, str):
        return ""
    return _filename_of(namespace, namespace.get("__name__")) or filename


def _filename_of(namespace: dict[str, Any], module: object) -> str:
    for value in namespace.copy().values():
        if type(value) is type and value.__module__ == module:
            value = next(filter(_is_function, vars(value).copy().values()), None)
        # A decorator's function has the name of another, and code of its own.
        if type(value) is FunctionType and value.__module__ == module:
            code = value.__code__
            is_generated = code.co_filename.startswith("<")  # or frozen
            if code.co_qualname == value.__qualname__ and not is_generated:
                return code.co_filename
    return ""


def _is_function(value: object) -> bool:
    return type(value) is FunctionType
