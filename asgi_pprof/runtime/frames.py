"""
Reads where threads and suspended coroutines are: code, bytecode offsets, single variables.

Other threads continue as soon as they can, so everything of one moment is read in one
call. The C core reads the interpreter's own frames. It makes no frame object, runs no
other code meanwhile, and reads the threads of this interpreter only.

Without the C core, frame objects are used, which has dangers. On CPython 3.11 making
one may collect garbage, whose finalizers let other threads run, and the frame that is
being read may be freed. So garbage collection is off from the first frame to the last.
Before 3.11.2 returning frames can be seen while they are released, so no other thread
is read. From 3.12 on `sys._current_frames` reads the threads of all interpreters,
without the GIL that guards them, so no other thread is read once a module that makes
interpreters is loaded. What a coroutine in another thread awaits is asked of CPython.
Up to 3.12 that may crash if the other thread is just releasing it, in an exception
that was thrown in, and runs a finalizer meanwhile.

Source: CPython, Python/pystate.c, _PyThread_CurrentFrames; Objects/frameobject.c,
Objects/genobject.c; gh-106883, gh-99729.
"""

from __future__ import annotations

import gc
import inspect
import itertools
import operator
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import AsyncGeneratorType, CodeType, CoroutineType, FrameType, GeneratorType
from typing import Any, Protocol, TypeAlias, TypeGuard, cast

from asgi_pprof.forks import Renewed, expect_forks
from asgi_pprof.native.core import native

MAX_DEPTH = 128  # as Go's profstackdepth; go tool pprof -top reads deeper ones, slowly

RawStack = tuple[tuple[CodeType, int], ...]
"""Code objects and bytecode offsets, leaf first: cheap to record, and named later."""

LocalsOf = tuple[tuple[Any, ...], ...]
"""(code, name, ...): the variables to read of the innermost frame that runs one of the codes."""

_MAX_STEPS = 20_000  # frames of one thread

# To read locals of a generator's or coroutine's frame that has just ended crashes (gh-125723,
# fixed in 3.13.6), and the frames of other threads end at any time.
_ENDED_GENERATORS_CRASH = (3, 13) <= sys.version_info < (3, 13, 6)
_GENERATOR = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR


class ThreadStack(Protocol):
    """The stack of one thread."""

    @property
    def found(self) -> int:
        """Number of frames above the one whose variables were read; -1 if there is none."""

    def __len__(self) -> int:
        """Return how many frames were kept."""

    def code(self, depth: int) -> CodeType | None:
        """Return the code of a frame, 0 for the innermost; None if that frame was not kept."""

    def places(self) -> RawStack:
        """Return the frames that were kept, leaf first."""

    def local(self, name: str) -> Any:
        """Return the value of a variable; None if it was unset, unknown or not asked for."""


class ThreadStacks(Protocol):
    """The stacks of threads by thread number."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[int]: ...
    def __getitem__(self, ident: int, /) -> ThreadStack: ...
    def get(self, ident: int, /) -> ThreadStack | None: ...
    def values(self) -> Collection[ThreadStack]: ...
    def items(self) -> Collection[tuple[int, ThreadStack]]: ...
    def clear(self) -> None: ...


class CurrentFrames(Protocol):
    """The type of `current_frames`, and of what tests use instead."""

    def __call__(
        self,
        idents: Sequence[int] | None = None,
        depth: int = MAX_DEPTH + 1,
        locals_of: LocalsOf = (),
    ) -> ThreadStacks:
        """
        Return the stacks of the threads of this interpreter, the calling one included.

        Threads that run no Python code are left out. It takes about 10 ns a frame with the
        C core, a tenth of a microsecond without, and holds the GIL.

        Args:
            idents: The threads to read; None for all.
            depth: How many frames of each to keep: one more than are shown, so that
                a cut stack is recognized.
            locals_of: Codes, each with the names of at most four variables. The values
                are read of the innermost frame that runs one of these codes.
        """


class _Stack:
    """A stack, copied from frame objects."""

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
    Return the innermost frame of each thread, by the thread's number, until the manager is left.

    Only for what the C core does not read. The dict must not be kept: it has the
    caller's own frame, and so itself. It has the calling thread alone if `why_not`
    gives a reason.

    Args:
        own: The frame of the calling thread, which would otherwise be this function's.
    """
    with no_collections():
        frames = _frames_if_safe() | {threading.get_ident(): own}
        try:
            yield frames
        finally:
            frames.clear()


def no_collections() -> AbstractContextManager[None]:
    """Return a manager that switches garbage collection off where making a frame may collect."""
    return nullcontext() if sys.version_info >= (3, 12) else collecting_off()


class _Collecting(Renewed):
    """Switches garbage collection off while there are readers of frames, and on again."""

    def __init__(self) -> None:
        super().__init__()
        self._begin()

    def _begin(self) -> None:
        self._lock = threading.RLock()  # a finalizer may read frames at any point, in here too
        self._readers = 0
        self._was_enabled = False

    def _renew_after_fork(self) -> None:
        if self._readers and self._was_enabled:
            gc.enable()  # the child has no reader
        self._begin()

    def off(self) -> None:
        expect_forks()
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
def collecting_off() -> Iterator[None]:
    """Collect no garbage inside the `with`, in any thread."""
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
    Return an iterator, all in C, that is not empty if there may be other interpreters.

    Listing them is not a safe way to find out: one that ends meanwhile is read after it is
    freed. So that comes last, for users of the private module on 3.14 and later.
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
    # All in one call: between two calls another thread could make an interpreter.
    frames = map(operator.call, (sys._current_frames,))
    found = next(itertools.chain(_other_interpreters(), frames))
    return found if isinstance(found, dict) else {}


def why_not() -> str:
    """Return why other threads are not read; "" if they are."""
    if native:
        return ""
    if _FRAMES_SEEN_DYING:
        return "threads are not read without the C core before CPython 3.11.2"
    if _SEES_ALL_INTERPRETERS and next(_other_interpreters(), None) is not None:
        return "threads are not read without the C core where there may be sub-interpreters"
    return ""


def frame_local(frame: FrameType, name: str, default: object = None) -> object:
    """
    Return the value of a frame's local, or the default. The frame may be of any thread.

    For frame objects, so without the C core. It does not make a value outlive its variable.
    """
    code = frame.f_code
    if not code.co_flags & inspect.CO_OPTIMIZED:  # of a module or a class, whose locals are a dict
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
    Return a local from `f_locals`, which before 3.13 is a dict that the frame keeps.

    It would keep all values alive as long as the frame: for ever in the outermost
    frames of a worker thread. So it is emptied, unless the application could notice:
    through another reference to it (`locals()` returns the same dict), or through the
    frame. After a trace or profile function has returned, the interpreter writes the
    dict back to the variables, and unsets those that are not in it (CPython 3.12,
    Python/sysmodule.c, call_trampoline).
    """
    values = frame.f_locals
    value = values.get(name, default)
    references = sys.getrefcount(values)
    if references == 3 and not _may_be_traced(frame):  # the frame's, ours, getrefcount's
        values.clear()
    return value


def _may_be_traced(frame: FrameType) -> bool:
    # The functions of another thread cannot be seen; those for all threads show that a
    # debugger or a profiler is at work.
    return (
        frame.f_trace is not None
        or sys.gettrace() is not None
        or sys.getprofile() is not None
        or threading.gettrace() is not None
        or threading.getprofile() is not None
    )


def capture(at: FrameType | ThreadStack | None) -> RawStack:
    """
    Return the stack of a frame of the calling thread, or of one that `current_frames` has read.

    For `Symbols.stack`. It takes about 0.1 us a frame.
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
    """Return whether a value has a frame of its own that can be suspended; a proxy has none."""
    return id(type(value)) in _GENERATORS  # a metaclass may define __eq__


def unwrapped(value: object) -> object:
    """Return the generator or coroutine that a proxy (such as wrapt's) wraps; else the value."""
    try:
        wrapped = value if is_generator(value) else getattr(value, "__wrapped__", None)
    except Exception:  # raised by a proxy
        return value
    return wrapped if is_generator(wrapped) else value


def is_running(generator: Generator) -> bool:
    """Return whether a generator or coroutine runs: also one that has switched to a greenlet."""
    if isinstance(generator, CoroutineType):
        return generator.cr_running
    return generator.gi_running if isinstance(generator, GeneratorType) else generator.ag_running


def _frame_object(generator: Generator) -> FrameType | None:
    if isinstance(generator, CoroutineType):
        return generator.cr_frame
    return generator.gi_frame if isinstance(generator, GeneratorType) else generator.ag_frame


def _generator_frame(generator: Generator) -> tuple[CodeType, int] | None:
    with no_collections():
        frame = _frame_object(generator)
        return None if frame is None else (frame.f_code, frame.f_lasti)


def _awaited(generator: Generator) -> object:
    # A running one has nothing on its stack where CPython looks.
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
"""Return the code and bytecode offset of a generator or coroutine; None if it has ended."""

awaited: Callable[[Generator], object] = native.awaited if native else _awaited
"""Return what a suspended generator or coroutine awaits; None if it is not suspended there."""

generator_local: Callable[[Generator, str], Any] = (
    native.generator_local if native else _generator_local
)
"""Return the value of a variable of a generator or coroutine; None if unset or unknown."""

running_frames: Callable[[Generator], RawStack] = (
    native.running_frames if native else _running_frames
)
"""Return the frames from the innermost to its own of a running coroutine; () of any other."""
