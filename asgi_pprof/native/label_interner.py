"""
Stores the labels of native samples, which outlive the label sets they were taken under.

A sample has the number of its label set. When a sampled set dies, the labels that
it has by then are stored here. The labels of a living set are read when the profile
is read, because its route may still become known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from asgi_pprof.forks import Renewed
from asgi_pprof.labels import LabelSet, Pairs, current, resolve
from asgi_pprof.native.core import native

_MAX_LABELS = 8_192  # different sets of pairs; routes and methods need far fewer

_LABEL_BYTES = 400  # of three pairs, one of whose values nobody else has


class LabelInterner(Renewed):
    """
    Numbers the different pairs of dead label sets. These numbers are called labels.

    Their number is bounded: a label that no sample has any more is used again.

    Args:
        used_labels: Gets a limit, and returns for each label below it whether a sample has it.
    """

    def __init__(self, used_labels: Callable[[int], bytes]) -> None:
        super().__init__()
        self._used_labels = used_labels
        self._pairs: list[Pairs] = [()]
        self._labels: dict[Pairs, int] = {(): 0}
        self._unused: list[int] = []
        self._retry_at = 0
        self._renew_after_fork()
        self._by_number: dict[int, Pairs] = {}
        self.reuses = 0
        """How often labels have been released; each time, some may stand for other pairs."""
        self.refused = 0
        """The number of label sets for which there was no label."""

    def _renew_after_fork(self) -> None:
        self._active: list[int] = []  # numbers of the sets that are being stored

    def store(self, label_set: LabelSet, number: int, marked: bool, waited_for: bool) -> int:
        """
        Store the pairs of a dying label set, and return their label.

        This is called during the set's deallocation. The set is `marked` if CPU samples
        have its number, and `waited_for` if memory samples wait for its label. If none
        waits, the result is 0.
        """
        active = self._active
        active.append(number)
        try:
            pairs = resolve(label_set)
            if marked:
                self._by_number[number] = pairs
            return self._label(pairs) if waited_for else 0
        finally:
            active.pop()

    def _label(self, pairs: Pairs) -> int:
        label = self._labels.get(pairs)
        if label is None:
            label = self._new_label()
            if label:
                self._labels[pairs] = label
                self._pairs[label] = pairs
        return label

    def _new_label(self) -> int:
        if not self._unused and len(self._pairs) >= _MAX_LABELS:
            self._release()
        if self._unused:
            return self._unused.pop()
        if len(self._pairs) < _MAX_LABELS:
            self._pairs.append(())
            return len(self._pairs) - 1
        self.refused += 1
        return 0

    def _release(self) -> None:
        """Release the labels that no sample has. This is not tried again for every refused set."""
        if self.refused < self._retry_at or len(self._active) > 1:
            return  # another set that is being stored may have a label that no sample has yet
        used = self._used_labels(len(self._pairs))
        self._unused = [label for label in range(1, len(used)) if not used[label]]
        for label in self._unused:
            del self._labels[self._pairs[label]]
            self._pairs[label] = ()
        self.reuses += bool(self._unused)
        if len(self._unused) < _MAX_LABELS // 64:  # nearly all are of memory that is alive
            self._retry_at = self.refused + _MAX_LABELS // 64

    def memory_bytes(self) -> int:
        """Return about how much memory the labels take."""
        return _LABEL_BYTES * len(self._labels)

    def pairs(self, label: int) -> Pairs:
        """Return the pairs of a label."""
        return self._pairs[label]

    def by_number(self, living: Iterable[LabelSet]) -> dict[int, Pairs]:
        """Return pairs by the number of their set, for the samples of the last CPU profile."""
        asked = {label_set.number: resolve(label_set) for label_set in living}
        return {**self._by_number, **asked}

    def forget_cpu(self) -> None:
        """Forget the pairs that were stored only for the samples of the last CPU profile."""
        self._by_number.clear()


book = LabelInterner(lambda end: native.heap_used_labels(end))
if native:
    native.use_labels(current, book.store)
