"""
Generated code that is run and thrown away, with names that contain a checksum.

Each tag gives a chain of three functions, a -> b -> c. A function's name contains
its tag and a checksum of the tag. The file's name, the first line and the width of
the characters depend on the tag too. So a name that was mixed from two names, or
read from memory that has been reused, is recognised as wrong.
"""

from __future__ import annotations

import re
import unicodedata  # noqa: F401 (compiling non-ASCII names imports it; not during a fork)
import zlib
from collections.abc import Callable

TAGS = 4000  # tags are reused, so that no sampler's table of names gets full
PARTS = "abc"

# Strings of one byte a character (ASCII and Latin-1), of two bytes, and of four.
_LETTERS = ("g", "gé", "gλ", "g𐐀")
_LINES = 4  # of each function
_NAME = re.compile(r"(g\D?)(\d+)_([0-9a-f]{8})_([abc])", re.ASCII)
_FILE = re.compile(r"<soak (g\D?)(\d+)_([0-9a-f]{8})>", re.ASCII)

_SOURCE = """\
def {name}_a(n):
    kept = list(map(str, range(n)))
    kept.append({name}_b(n))
    return kept
def {name}_b(n):
    kept = {{"result": {name}_c(n)}}
    kept["more"] = [{name}_c(n) for _ in (1, 2)] if n < 0 else [n]
    return kept
def {name}_c(n):
    total = bytes(n)
    for i in range(n): total += b"%d" % i
    return total
"""


def spell(tag: int) -> str:
    """Return the beginning of all names of a tag."""
    return f"{_LETTERS[tag % len(_LETTERS)]}{tag}_{zlib.crc32(str(tag).encode()):08x}"


def make_chain(tag: int) -> Callable[[int], object]:
    """Return a new function a, which calls b, which calls c; each has a new code object."""
    name = spell(tag)
    source = "\n" * _shift(tag) + _SOURCE.format(name=name)
    namespace: dict[str, Callable[[int], object]] = {}
    exec(compile(source, f"<soak {name}>", "exec"), namespace)
    return namespace[f"{name}_a"]


def is_generated(filename: str) -> bool:
    """Tell whether a file name looks like that of generated code."""
    return filename.startswith("<soak ")


def read_name(name: str) -> tuple[int, str] | None:
    """Return tag and part of a function's name; None if the name is wrong."""
    match = _NAME.fullmatch(name)
    if match is None or name != f"{spell(int(match[2]))}_{match[4]}":
        return None
    return int(match[2]), match[4]


def fault(name: str, filename: str, first_line: int, line: int) -> str:
    """Return what is wrong with a location in generated code; "" if it is right."""
    match = _FILE.fullmatch(filename)
    if match is None or filename != f"<soak {spell(int(match[2]))}>":
        return "no such file was generated"
    tag = int(match[2])
    last_line = _shift(tag) + _LINES * len(PARTS)
    if name == "<module>":
        return "" if 0 <= line <= last_line else "the line is outside"
    known = read_name(name)
    if known is None:
        # A comprehension is a function of its own before 3.12.
        outer = name.removesuffix(".<locals>.<listcomp>")
        return "" if outer != name and read_name(outer) else "no such function was generated"
    if known[0] != tag:
        return "the function is of another file"
    begins = 1 + _shift(tag) + _LINES * PARTS.index(known[1])
    if first_line != begins:
        return f"begins at {begins}"
    return "" if begins <= line < begins + _LINES else "the line is of another function"


def order_fault(names: list[str]) -> str:
    """
    Return what is wrong with the order of a stack's generated functions; "" if it is right.

    Args:
        names: Names of the stack's functions, leaf first. A stack contains one chain at most.
    """
    found = [(at, *known) for at, name in enumerate(names) if (known := read_name(name))]
    if not found:
        return ""
    if len({tag for _, tag, _ in found}) > 1:
        return "two chains in one stack"
    parts = "".join(part for _, _, part in reversed(found))
    if not PARTS.startswith(parts):
        return f"the order is {parts}"
    if found[-1][0] - found[0][0] != len(found) - 1:
        between = names[found[0][0] : found[-1][0] + 1]
        if not all(read_name(name) or name.endswith("<listcomp>") for name in between):
            return "something else stands between"
    return ""


def _shift(tag: int) -> int:
    return tag % 97
