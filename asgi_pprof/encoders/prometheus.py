"""
Figures in Prometheus's text format 0.0.4, without its comments.

Source: Prometheus, exposition_formats.md.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

_BREAKS_LINES = re.compile(r"[\s\x00-\x1f\x7f]")


class Figure(NamedTuple):
    """One line: a name, label names and values, and a number."""

    name: str
    labels: tuple[tuple[str, str], ...]
    value: float

    def line(self) -> str:
        """Return the line."""
        labels = ",".join(f'{name}="{_escaped(value)}"' for name, value in self.labels)
        series = f"{self.name}{{{labels}}}" if labels else self.name
        return f"{series} {_number(self.value)}"


def figures_text(figures: Iterable[Figure], names: Sequence[str]) -> str:
    """Return figures as text, sorted by name in the order of `names`, then by their labels."""
    in_order = sorted(figures, key=lambda each: (names.index(each.name), each.labels))
    return "".join(f"{each.line()}\n" for each in in_order)


def label_value(text: str) -> str:
    """Return a text as one word on one line: white space and control characters become `_`."""
    return _BREAKS_LINES.sub("_", text.encode("utf-8", "replace").decode())


def unique(names: Sequence[str]) -> list[str]:
    """Return the names with a number added to each that has come before: `name#2`."""
    taken: dict[str, None] = {}
    numbers: Counter[str] = Counter()
    for name in names:
        new = name
        while new in taken:
            numbers[name] += 1
            new = f"{name}#{numbers[name] + 1}"
        taken[new] = None
    return list(taken)


def quantile_label(quantile: float) -> tuple[str, str]:
    """Return the label of a quantile between 0 and 1."""
    return "quantile", _number(quantile)


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"')


def _number(value: float) -> str:
    if math.isinf(value):
        return "+Inf"
    return str(int(value)) if value == int(value) else repr(value)
