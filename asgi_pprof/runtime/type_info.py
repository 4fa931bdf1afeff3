"""
What a type says about itself, read without running code of its own.

A class may define `__name__` or `__mro__` itself, and its metaclass may define
`__eq__`, `__hash__` and `__getattribute__`. So types are told apart by their
address, and their attributes are read by the descriptors of `type` itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

mro: Callable[[type], tuple[type, ...]] = type.__dict__["__mro__"].__get__
base: Callable[[type], type | None] = type.__dict__["__base__"].__get__
name: Callable[[type], str] = type.__dict__["__name__"].__get__
qualname: Callable[[type], str] = type.__dict__["__qualname__"].__get__
flags: Callable[[type], int] = type.__dict__["__flags__"].__get__
namespace: Callable[[type], Any] = type.__dict__["__dict__"].__get__
_own_module: Callable[[type], object] = type.__dict__["__module__"].__get__


def module(of: type) -> str:
    """Return the name of a type's module, "" if the type gives something else for it."""
    found = _own_module(of)
    return found if type(found) is str else ""


def addresses(*types: object) -> frozenset[int]:
    """Return types as a set that can be asked about any type without comparing or hashing it."""
    return frozenset(map(id, types))


def is_subclass(of: type, bases: frozenset[int]) -> bool:
    """Return whether a type has one of the types with these addresses in its MRO."""
    return not bases.isdisjoint(map(id, mro(of)))
