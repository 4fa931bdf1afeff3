"""
What wrapped primitives report to, and how they are wrapped and put back.

A wrapper belongs to one watch. When that has ended, a wrapper that somebody
still holds (a bound method, a wrapper of theirs around ours) only passes on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import CodeType, FrameType
from typing import Any

from asgi_pprof.collectors.contention.records import (
    Contended,
    ContentionRecords,
    weigh_release,
    weigh_wait,
)
from asgi_pprof.collectors.contention.stacks import (
    Leaf,
    calling_stack,
    know_wrapper,
    waiting_stack,
)

block = ContentionRecords(weigh_wait)
mutex = ContentionRecords(weigh_release)

Wrap = Callable[["Watch", Callable[..., Any]], Callable[..., Any]]
"""What makes a wrapper of an original, for one watch; the original itself to leave it alone."""


class Watch:
    """
    One stretch of time in which contention is recorded.

    Its methods are called in the application's path: they never raise and
    never wait.
    """

    __slots__ = ("on",)

    def __init__(self, on: bool = True) -> None:
        self.on = on

    def waited(self, nanoseconds: int, leaf: Leaf, wrapper: FrameType) -> None:
        """Record that the caller of a wrapped method has waited."""
        try:
            if self.on and (weight := block.weigh(nanoseconds)):
                stack = waiting_stack(leaf, wrapper)
                if stack is not None:
                    block.add(stack, weight)
        except Exception:
            block.lost += 1

    def waited_elsewhere(self, nanoseconds: int, contended: Contended) -> None:
        """Record a wait of a stack that was captured when it began."""
        try:
            if self.on and (weight := block.weigh(nanoseconds)):
                block.add(contended, weight)
        except Exception:
            block.lost += 1

    def released(self, nanoseconds: int, leaf: Leaf, wrapper: FrameType) -> None:
        """Record that the caller of a wrapped method has let others wait so long."""
        try:
            if self.on and (weight := mutex.weigh(nanoseconds)):
                mutex.add(calling_stack(leaf, wrapper), weight)
        except Exception:
            mutex.lost += 1


@dataclass(frozen=True, slots=True)
class Target:
    """
    An attribute to be wrapped.

    Args:
        owner: The class or module.
        name: The attribute; one that is inherited is added, and deleted again.
        wrap: What makes the wrapper.
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


class Patches:
    """A group of attributes that are wrapped and put back together."""

    def __init__(self) -> None:
        self._patches: list[_Patch] = []

    def install(self, watch: Watch, targets: Callable[[], list[Target]]) -> None:
        """Wrap what there is of the targets, unless they are wrapped; pair with `remove`."""
        if self._patches:
            return
        for target in targets():
            original = getattr(target.owner, target.name, None)
            if original is None:
                continue  # another version of that library
            ours = target.wrap(watch, original)
            if ours is original:
                continue
            know_wrapper(ours)
            inherited = target.name not in vars(target.owner)
            # Noted first: what has begun can always be put back.
            self._patches.append(_Patch(target.owner, target.name, original, ours, inherited))
            setattr(target.owner, target.name, ours)

    def remove(self) -> None:
        """Put back the originals; whoever has wrapped ours meanwhile keeps it, passing on."""
        while self._patches:
            patch = self._patches.pop()
            if vars(patch.owner).get(patch.name) is not patch.ours:
                continue
            if patch.inherited:
                delattr(patch.owner, patch.name)
            else:
                setattr(patch.owner, patch.name, patch.original)


def code_of(function: object) -> CodeType | None:
    """Return a function's code; None for what is not written in Python."""
    code = getattr(function, "__code__", None)
    return code if isinstance(code, CodeType) else None
