"""Attributes of other modules and classes, replaced while contention is recorded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from asgi_pprof.collectors.contention.recording import Recording
from asgi_pprof.runtime.chains import wrappers

Wrap = Callable[[Recording, Callable[..., Any]], Callable[..., Any]]
"""Returns a wrapper of an original for one recording, or the original to leave it in place."""


@dataclass(frozen=True, slots=True)
class Target:
    """
    An attribute to replace.

    Args:
        owner: The class or module.
        name: The attribute. If the class inherits it, it is added, and later deleted.
        wrap: Makes the wrapper.
    """

    owner: Any
    name: str
    wrap: Wrap


@dataclass(frozen=True, slots=True)
class _Patch:
    owner: Any
    name: str
    original: Any
    ours: Any
    inherited: bool


class PatchGroup:
    """Attributes that are replaced and put back together."""

    def __init__(self) -> None:
        self._patches: list[_Patch] = []
        self._is_installed = False

    def install(self, recording: Recording, *targets: Callable[[], list[Target]]) -> None:
        """Replace the targets that exist, unless this is done already; pair with `remove`."""
        if self._is_installed:
            return
        self.remove()  # what was replaced when this was cut off, such as by a fork
        for target in [each for listed in targets for each in listed()]:
            original = getattr(target.owner, target.name, None)
            if original is None:
                continue  # another version of that library
            ours = target.wrap(recording, original)
            if ours is original:
                continue
            wrappers.add(ours)
            inherited = target.name not in vars(target.owner)
            # Listed before it is replaced, so that `remove` finds it whatever happens in between.
            self._patches.append(_Patch(target.owner, target.name, original, ours, inherited))
            setattr(target.owner, target.name, ours)
        self._is_installed = True

    def remove(self) -> None:
        """
        Put back the originals.

        If another library has wrapped our wrapper meanwhile, it stays in place
        and only delegates.
        """
        self._is_installed = False
        while self._patches:
            patch = self._patches.pop()
            if vars(patch.owner).get(patch.name) is not patch.ours:
                continue
            if patch.inherited:
                delattr(patch.owner, patch.name)
            else:
                setattr(patch.owner, patch.name, patch.original)
