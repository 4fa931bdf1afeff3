"""
Labels of native samples, which outlive the label sets they were taken under.

A sample carries a label set's number. A set that dies after it was seen is
written down here, by its labels at that time; a living one is asked when the
profile is read, because its route may still become known.
"""

from __future__ import annotations

from collections.abc import Iterable

from asgi_pprof.labels import LabelSet, Pairs, current, resolve
from asgi_pprof.native.core import native

_MAX_LABELS = 65_536  # different sets of pairs; routes and methods need far fewer


class LabelBook:
    """What label sets said before they died."""

    def __init__(self) -> None:
        self._pairs: list[Pairs] = [()]
        self._labels: dict[Pairs, int] = {(): 0}
        self._seen_marked: dict[int, Pairs] = {}

    def write(self, label_set: LabelSet, number: int, marked: bool) -> int:
        """
        Note what a dying set says, and return the label it has from now on.

        Called in the middle of its deallocation, so it does nothing but that.
        """
        pairs = resolve(label_set)
        if marked:
            self._seen_marked[number] = pairs
        label = self._labels.get(pairs)
        if label is None:
            if len(self._pairs) >= _MAX_LABELS:
                return 0
            label = self._labels[pairs] = len(self._pairs)
            self._pairs.append(pairs)
        return label

    def pairs(self, label: int) -> Pairs:
        """Return what a label stands for."""
        return self._pairs[label]

    def by_number(self, living: Iterable[LabelSet]) -> dict[int, Pairs]:
        """Return labels by the number of their set, for CPU samples that have just ended."""
        asked = {label_set.number: resolve(label_set) for label_set in living}
        return {**self._seen_marked, **asked}

    def forget_cpu(self) -> None:
        """Drop what only the samples of the last CPU profile needed."""
        self._seen_marked.clear()


book = LabelBook()
if native:
    native.use_labels(current, book.write)
