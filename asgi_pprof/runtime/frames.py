"""
Where threads are, and suspended coroutines: code objects, bytecode offsets, single variables.

Other threads go on as soon as they can, so everything of one moment is read in one
call. The C core reads the interpreter's own frames; it makes no frame object and
runs nobody's code meanwhile, and looks at threads of this interpreter only.

Without it frame objects have to do, with these dangers. On CPython 3.11 making one
may collect garbage, whose finalizers let other threads run: a frame that is being
read may be freed. So no garbage is collected from the first frame to the last.
Before 3.11.2 frames that return can be seen while they are let go of, so no other
thread is read. From 3.12 on `sys._current_frames` looks at the threads of all
interpreters, without the GIL that guards them: no other thread is read once a
module that makes interpreters is loaded. What a coroutine in another thread awaits
is asked of CPython, which up to 3.12 may crash if that thread is just about to let
go of it, in an exception that was thrown in, and runs a finalizer meanwhile.

Source: CPython, Python/pystate.c, _PyThread_CurrentFrames; Objects/frameobject.c,
Objects/genobject.c; gh-106883, gh-99729.
"""

from __future__ import annotations

import gc
import inspect
import itertools
import operator
import os
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import AsyncGeneratorType, CodeType, CoroutineType, FrameType, GeneratorType
from typing import Any, Protocol, TypeAlias, TypeGuard, cast

from asgi_pprof.native.core import native

MAX_DEPTH = 128  # as Go's profstackdepth; go tool pprof -top reads deeper ones, slowly

RawStack = tuple[tuple[CodeType, int], ...]
"""Codes and bytecode offsets, leaf first: what is cheap to note and to name later."""

LocalsOf = tuple[tuple[Any, ...], ...]
"""(code, name, ...): variables that are wanted of the innermost frame of one of these codes."""

_MAX_STEPS = 20_000  # frames of one thread that are walked

# The locals of a generator's or coroutine's frame that has just ended crash (gh-125723,
# mended in 3.13.6), and the frames of other threads end at any time.
_ENDED_GENERATORS_CRASH = (3, 13) <= sys.version_info < (3, 13, 6)
_GENERATOR = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR


class ThreadStack(Protocol):
    """What one thread was at."""

    @property
    def found(self) -> int:
        """How many frames are above the one whose variables were wanted; -1 if there is none."""

    def __len__(self) -> int:
        """Return how many frames were kept."""

    def code(self, depth: int) -> CodeType | None:
        """Return the code of a frame, 0 for the innermost; None beyond those that were kept."""

    def places(self) -> RawStack:
        """Return the frames that were kept, leaf first."""

    def local(self, name: str) -> Any:
        """Return the value of a wanted variable; None if it was unset or there is none."""


class ThreadStacks(Protocol):
    """What threads were at, by their numbers."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[int]: ...
    def __getitem__(self, ident: int, /) -> ThreadStack: ...
    def get(self, ident: int, /) -> ThreadStack | None: ...
    def values(self) -> Collection[ThreadStack]: ...
    def items(self) -> Collection[tuple[int, ThreadStack]]: ...
    def clear(self) -> None: ...


class CurrentFrames(Protocol):
    """Reads threads: `current_frames`, or a test's."""

    def __call__(
        self,
        idents: Sequence[int] | None = None,
        depth: int = MAX_DEPTH + 1,
        locals_of: LocalsOf = (),
    ) -> ThreadStacks:
        """
        Return what the threads of this interpreter are at, the calling one included.

        One that runs no Python code is left out. About 10 ns a frame with the C core,
        a tenth of a microsecond without; the GIL is held meanwhile.

        Args:
            idents: The threads to read; None for all.
            depth: How many frames of each to keep; one more than are shown tells
                that a stack was cut.
            locals_of: Codes, and the names of at most four variables of each. Values
                are of the innermost frame of any of these codes.
        """


class _Stack:
    """A stack of frame objects, copied."""

    __slots__ = ("_locals", "_places", "found")

    def __init__(self, frame: FrameType | None, depth: int, locals_of: LocalsOf) -> None:
        wanted = {id(code): names for code, *names in locals_of}
        self.found = -1
        self._locals: dict[str, object] = {}
        places: list[tuple[CodeType, int]] = []
        for above in range(_MAX_STEPS):
            if frame is None or (len(places) == depth and not wanted):
                break
            code = frame.f_code
            if len(places) < depth:
                places.append((code, frame.f_lasti))
            if id(code) in wanted:
                self.found = above
                self._locals = {name: frame_local(frame, name) for name in wanted[id(code)]}
                wanted = {}
            frame = frame.f_back
        self._places = tuple(places)

    def __len__(self) -> int:
        return len(self._places)

    def code(self, depth: int) -> CodeType | None:
        return self._places[depth][0] if depth < len(self._places) else None

    def places(self) -> RawStack:
        return self._places

    def local(self, name: str) -> Any:
        return self._locals.get(name)


def _read_frame_objects(
    idents: Sequence[int] | None = None, depth: int = MAX_DEPTH + 1, locals_of: LocalsOf = ()
) -> ThreadStacks:
    stacks: dict[int, _Stack] = {}
    with frame_objects(sys._getframe(1)) as frames:
        for ident, frame in frames.items():
            if idents is None or ident in idents:
                stacks[ident] = _Stack(frame, depth, locals_of)
    return cast(ThreadStacks, stacks)


current_frames: CurrentFrames = native.current_frames if native else _read_frame_objects


@contextmanager
def frame_objects(own: FrameType) -> Iterator[dict[int, FrameType]]:
    """
    Give the innermost frame of each thread, by the thread's number, for as long as it is entered.

    Only for what the C core does not read. Nothing to be kept: it holds the
    caller's own frame, and so itself. The calling thread alone where `why_not`
    says why.

    Args:
        own: The calling thread's; as it is found it would end in this very function.
    """
    with no_collections():
        frames = _frames_if_safe() | {threading.get_ident(): own}
        try:
            yield frames
        finally:
            frames.clear()


def no_collections() -> AbstractContextManager[None]:
    """Return a manager that keeps garbage from being collected where making a frame does that."""
    return nullcontext() if sys.version_info >= (3, 12) else _collecting_off()


class _Collecting:
    """Whether garbage is collected: not while anybody reads frames; and what it was before."""

    def __init__(self) -> None:
        self._begin()
        self._renewed_by_fork = False

    def _begin(self) -> None:
        self._lock = threading.RLock()  # a finalizer may read frames in the middle of anything
        self._readers = 0
        self._was_enabled = False

    def _renew(self) -> None:
        if self._readers and self._was_enabled:
            gc.enable()  # who read does not exist in the child
        self._begin()

    def off(self) -> None:
        if not self._renewed_by_fork and hasattr(os, "register_at_fork"):
            self._renewed_by_fork = True
            os.register_at_fork(after_in_child=self._renew)
        with self._lock:
            if self._readers == 0:
                self._was_enabled = gc.isenabled()
                gc.disable()
            self._readers += 1

    def on(self) -> None:
        with self._lock:
            self._readers -= 1
            if self._readers == 0 and self._was_enabled:
                gc.enable()


_collecting = _Collecting()


@contextmanager
def _collecting_off() -> Iterator[None]:
    _collecting.off()
    try:
        yield
    finally:
        _collecting.on()


_FRAMES_SEEN_DYING = sys.version_info < (3, 11, 2)
_SEES_ALL_INTERPRETERS = sys.version_info >= (3, 12)  # before, they share one GIL
_MAKE_INTERPRETERS = (
    "_xxsubinterpreters",
    "concurrent.interpreters",
    "concurrent.futures.interpreter",
    "anyio.to_interpreter",
    # From 3.14 on it is always loaded, by concurrent.futures.
    *(["_interpreters"] if sys.version_info < (3, 14) else []),
)


def _other_interpreters() -> Iterator[object]:
    """
    Return an iterator, all in C, that gives anything if there may be other interpreters.

    To list them is no safe way to find out: one that ends meanwhile is read after it is
    freed. So it is the last, for who uses the private module on 3.14 and later.
    """
    loaded = filter(sys.modules.__contains__, _MAKE_INTERPRETERS)
    if sys.version_info < (3, 14):
        return loaded
    module: Any = sys.modules.get("_interpreters")
    if module is None:
        return loaded
    main = module.get_main()
    return itertools.chain(loaded, iter(module.list_all, [main]))


def _frames_if_safe() -> dict[int, FrameType]:
    if _FRAMES_SEEN_DYING:
        return {}
    if not _SEES_ALL_INTERPRETERS:
        return sys._current_frames()
    # All of it in one call: between two, another thread could make an interpreter.
    frames = map(operator.call, (sys._current_frames,))
    found = next(itertools.chain(_other_interpreters(), frames))
    return found if isinstance(found, dict) else {}


def why_not() -> str:
    """Return why other threads are not read, "" if they are."""
    if native:
        return ""
    if _FRAMES_SEEN_DYING:
        return "threads are not read without the C core before CPython 3.11.2"
    if _SEES_ALL_INTERPRETERS and next(_other_interpreters(), None) is not None:
        return "threads are not read without the C core where there may be sub-interpreters"
    return ""


def frame_local(frame: FrameType, name: str, default: object = None) -> object:
    """
    Return the value of a frame's local, of any thread, or the default.

    For frame objects, so without the C core. No value outlives its variable by this.
    """
    code = frame.f_code
    if not code.co_flags & inspect.CO_OPTIMIZED:  # a module's or class's are a dict anyhow
        return frame.f_locals.get(name, default)
    if name not in (*code.co_varnames, *code.co_cellvars, *code.co_freevars):
        return default
    if sys.version_info >= (3, 13):
        if _ENDED_GENERATORS_CRASH and code.co_flags & _GENERATOR:
            return default
        return frame.f_locals.get(name, default)
    return _local_of_snapshot(frame, name, default)


def _local_of_snapshot(frame: FrameType, name: str, default: object) -> object:
    """
    Return a local by way of `f_locals`, which before 3.13 is a dict the frame keeps.

    It would keep all values alive as long as the frame: for a worker thread's
    outermost ones, for ever. So it is emptied, unless that could be noticed: by
    whoever else has it (`locals()` gives the very same dict), or by the frame.
    After a trace or profile function has returned, the interpreter writes the
    dict back to the variables, and what is not in it is unset (CPython 3.12,
    Python/sysmodule.c, call_trampoline).
    """
    values = frame.f_locals
    value = values.get(name, default)
    references = sys.getrefcount(values)
    if references == 3 and not _may_be_traced(frame):  # the frame's, ours, the argument's
        values.clear()
    return value


def _may_be_traced(frame: FrameType) -> bool:
    # A thread's own functions are not to be seen from outside: the ones for all
    # threads tell that there is a debugger or a profiler at work.
    return (
        frame.f_trace is not None
        or sys.gettrace() is not None
        or sys.getprofile() is not None
        or threading.gettrace() is not None
        or threading.getprofile() is not None
    )


def capture(at: FrameType | ThreadStack | None) -> RawStack:
    """
    Return where a frame of the calling thread and its callers are, for `Symbols.stack`.

    Of another thread, what `current_frames` has read. About 0.1 us a frame.
    """
    if at is not None and not isinstance(at, FrameType):
        return at.places()
    places: list[tuple[CodeType, int]] = []
    while at is not None and len(places) <= MAX_DEPTH:  # one more shows that it was cut
        places.append((at.f_code, at.f_lasti))
        at = at.f_back
    return tuple(places)


Generator: TypeAlias = (
    "CoroutineType[Any, Any, Any] | GeneratorType[Any, Any, Any] | AsyncGeneratorType[Any, Any]"
)


_GENERATORS = frozenset(map(id, (CoroutineType, GeneratorType, AsyncGeneratorType)))


def is_generator(value: object) -> TypeGuard[Generator]:
    """Tell whether something has a frame of its own that can be suspended; no proxy has."""
    return id(type(value)) in _GENERATORS  # a metaclass may define __eq__


def unwrapped(value: object) -> object:
    """Return the generator or coroutine that a proxy stands for, as wrapt's; else the value."""
    try:
        wrapped = value if is_generator(value) else getattr(value, "__wrapped__", None)
    except Exception:  # a proxy's own
        return value
    return wrapped if is_generator(wrapped) else value


def _frame_object(generator: Generator) -> FrameType | None:
    if isinstance(generator, CoroutineType):
        return generator.cr_frame
    return generator.gi_frame if isinstance(generator, GeneratorType) else generator.ag_frame


def _generator_frame(generator: Generator) -> tuple[CodeType, int] | None:
    with no_collections():
        frame = _frame_object(generator)
        return None if frame is None else (frame.f_code, frame.f_lasti)


def _awaited(generator: Generator) -> object:
    # One that runs has nothing on its stack where CPython looks.
    if isinstance(generator, CoroutineType):
        return None if generator.cr_running else generator.cr_await
    if isinstance(generator, GeneratorType):
        return None if generator.gi_running else generator.gi_yieldfrom
    return generator.ag_await


def _generator_local(generator: Generator, name: str) -> Any:
    with no_collections():
        frame = _frame_object(generator)
        return None if frame is None else frame_local(frame, name)


def _running_frames(generator: Generator) -> RawStack:
    with frame_objects(sys._getframe(1)) as frames:
        outermost = _frame_object(generator)
        for frame in frames.values():
            places = []
            inner: FrameType | None = frame
            while inner is not None:
                places.append((inner.f_code, inner.f_lasti))
                if inner is outermost:
                    return tuple(places[: MAX_DEPTH + 1])
                inner = inner.f_back
    return ()


generator_frame: Callable[[Generator], tuple[CodeType, int] | None] = (
    native.generator_frame if native else _generator_frame
)
"""Return code and bytecode offset of a generator or coroutine; None if it has ended."""

awaited: Callable[[Generator], object] = native.awaited if native else _awaited
"""Return what a suspended one awaits; None if it is not suspended at that."""

generator_local: Callable[[Generator, str], Any] = (
    native.generator_local if native else _generator_local
)
"""Return the value of its variable; None if it is unset or there is none of that name."""

running_frames: Callable[[Generator], RawStack] = (
    native.running_frames if native else _running_frames
)
"""Return the frames from the innermost to its own of one that runs in some thread; else ()."""
