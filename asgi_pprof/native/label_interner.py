"""
Stores the labels of native samples, which outlive the label sets they were taken under.

A sample has the number of its label set. A set that dies after it was sampled is
stored here, with the labels it has by then. A living set is asked for its labels
when the profile is read, because its route may still become known.
"""

from __future__ import annotations

from collections.abc import Iterable

from asgi_pprof.labels import LabelSet, Pairs, current, resolve
from asgi_pprof.native.core import native

_MAX_LABELS = 65_536  # different sets of pairs; routes and methods need far fewer


class LabelInterner:
    """Numbers the different pairs of dead label sets. These numbers are called labels."""

    def __init__(self) -> None:
        self._pairs: list[Pairs] = [()]
        self._labels: dict[Pairs, int] = {(): 0}
        self._by_number: dict[int, Pairs] = {}

    def store(self, label_set: LabelSet, number: int, marked: bool) -> int:
        """
        Store the pairs of a dying label set, and return their label.

        Called in the middle of the set's deallocation, so it does nothing else. The
        set is `marked` if CPU samples may have its number.
        """
        pairs = resolve(label_set)
        if marked:
            self._by_number[number] = pairs
        label = self._labels.get(pairs)
        if label is None:
            if len(self._pairs) >= _MAX_LABELS:
                return 0
            label = self._labels[pairs] = len(self._pairs)
            self._pairs.append(pairs)
        return label

    def pairs(self, label: int) -> Pairs:
        """Return the pairs of a label."""
        return self._pairs[label]

    def by_number(self, living: Iterable[LabelSet]) -> dict[int, Pairs]:
        """Return pairs by the number of their set, for CPU samples that have just ended."""
        asked = {label_set.number: resolve(label_set) for label_set in living}
        return {**self._by_number, **asked}

    def forget_cpu(self) -> None:
        """Drop what only the samples of the last CPU profile needed."""
        self._by_number.clear()


book = LabelInterner()
if native:
    native.use_labels(current, book.store)
