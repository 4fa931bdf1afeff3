"""
The stack that a wait or a release is recorded with, from the frames of our wrapper.

The leaf is the method of the primitive that was called, not what it uses
internally (a queue's condition, a barrier's). Below it are its callers, down to
the task's own coroutine: the event loop's frames further down say nothing.

Some waits are no contention and are left out: workers with nothing to do,
timers, and servers and sockets that wait for the other side by way of an event or a
queue. So are the profiler's own waits, and those of middlewares for its answers.
"""

from __future__ import annotations

import asyncio
import dis
from collections.abc import Iterable, Sequence
from itertools import pairwise
from types import CodeType, FrameType, FunctionType

from asgi_pprof.collectors.contention.records import ContendedStack
from asgi_pprof.runtime.chains import wrappers
from asgi_pprof.runtime.own_work import awaits_own_request, is_own, is_own_context
from asgi_pprof.stacks import MAX_DEPTH, StackKey, stack_key

WORKER = "waiting for a worker thread"

Leaf = CodeType | str | None
"""The method that was called: its code, or its name if it is written in C."""

_ENTERING = ("__enter__", "__exit__", "__aenter__", "__aexit__")
_LOOP_STEP = asyncio.Handle._run.__code__

_IDLE = {
    # Functions that wait for work: the end of the file's name, and the name of the call that
    # waits. Other calls in them may lead to the application's own code, such as `event.wait`.
    "WorkerThread.run": ("anyio/_backends/_asyncio.py", "get"),
    "_worker": ("concurrent/futures/thread.py", "get"),
    "Queue._feed": ("multiprocessing/queues.py", "nwait"),
    "QueueListener._monitor": ("logging/handlers.py", "dequeue"),
    "Timer.run": ("threading.py", "wait"),
    # An event stands for bytes here.
    "SocketStream.receive": ("anyio/_backends/_asyncio.py", "wait"),
    "SocketStream.send": ("anyio/_backends/_asyncio.py", "wait"),
    "UDPSocket.receive": ("anyio/_backends/_asyncio.py", "wait"),
    "UDPSocket.send": ("anyio/_backends/_asyncio.py", "wait"),
    "ConnectedUDPSocket.receive": ("anyio/_backends/_asyncio.py", "wait"),
    "ConnectedUDPSocket.send": ("anyio/_backends/_asyncio.py", "wait"),
    # A pause before the next address is tried.
    "connect_tcp": ("anyio/_core/_sockets.py", "wait"),
}
_NETWORK = ("/uvicorn/protocols/", "/uvicorn/lifespan/")  # events stand for bytes there
_ANYIO_WORKERS = "AsyncIOBackend.run_sync_in_worker_thread"

_MAX_CALLERS = 4096


class StackRules:
    """
    Knows the code of primitives and of their callers, and takes stacks accordingly.

    The tables go by the identity of code, since the hash of a code object is
    slow; they keep the code alive, so that no id is used twice.
    """

    def __init__(self) -> None:
        self._primitives: dict[int, CodeType] = {}
        self._entering: dict[int, CodeType] = {}
        self._leaves: dict[int, CodeType] = {}
        self._callers: dict[int, CodeType] = {}  # those that `_classify` has seen
        self._pseudo_frames: dict[int, str] = {}
        self._idle: set[tuple[int, int]] = set()  # with the bytecode offset

    def add_primitives(self, classes: Iterable[object]) -> None:
        """Add the methods of primitives: what they call internally is not the leaf."""
        for each in classes:
            for name, value in dict(vars(each)).items():
                if isinstance(value, FunctionType) and id(value.__code__) not in wrappers.by_id:
                    known = self._entering if name in _ENTERING else self._primitives
                    known[id(value.__code__)] = value.__code__

    def add_leaf(self, leaf: Leaf) -> None:
        """Add a method that is wrapped: it is shown as a whole, without the line that waits."""
        if isinstance(leaf, CodeType):
            self._leaves[id(leaf)] = leaf

    def add_methods(self, methods: Iterable[object]) -> None:
        """Add single methods of primitives that have other methods too."""
        for method in methods:
            if isinstance(method, FunctionType):
                self._primitives[id(method.__code__)] = method.__code__

    def suspended_stack(
        self, raw: Sequence[tuple[CodeType, int]], name: str = ""
    ) -> ContendedStack | None:
        """
        Return the stack of a wait that is under way; None if there is none, or no contention.

        Args:
            raw: The stack of a suspended task or of a thread, leaf first.
            name: Of a primitive whose methods are not to be seen in the stack.
        """
        places = [each for each in raw if id(each[0]) not in wrappers.by_id]
        for depth, (code, _) in enumerate(places):
            if code is _LOOP_STEP:
                del places[depth:]
                break
        depth = 0
        while depth < len(places) and self._waits_in(places[depth][0]):
            depth += 1
        if (depth == 0 and not name) or is_own(code for code, _ in places):
            return None
        if depth:
            code, lasti = places[depth - 1]
            places[:depth] = [(code, 0 if id(code) in self._leaves else lasti)]
        callers = places[1:] if depth else places
        pseudo = name
        for code, lasti in callers:
            if id(code) in self._entering:
                continue
            if id(code) not in self._callers:
                self._classify(code)
            if (id(code), lasti) in self._idle:
                return None
            pseudo = pseudo or self._pseudo_frames.get(id(code), "")
            break
        del places[MAX_DEPTH + 1 :]
        return pseudo, stack_key(tuple(places))

    def _waits_in(self, code: CodeType) -> bool:
        return id(code) in self._primitives or id(code) in self._leaves

    def waiting_stack(self, leaf: Leaf, wrapper: FrameType) -> ContendedStack | None:
        """
        Return the stack of a wait, None if it was no contention.

        Args:
            leaf: The method that was called; None to begin with its caller.
            wrapper: The frame of our wrapper of it.
        """
        if is_own_context():
            return None
        outermost = _task_frame()
        pseudo, code = _split(leaf)
        innermost = code, 0
        primitives = self._primitives
        frame = _caller(wrapper, outermost)
        while frame is not None and (key := id(frame.f_code)) in primitives:
            innermost = primitives[key], frame.f_lasti
            frame = _caller(frame, outermost)
        caller = frame
        while caller is not None and id(caller.f_code) in self._entering:
            caller = _caller(caller, outermost)
        if caller is not None:
            code_id = id(caller.f_code)
            if code_id not in self._callers:
                self._classify(caller.f_code)
            if (code_id, caller.f_lasti) in self._idle:
                return None
            pseudo = pseudo or self._pseudo_frames.get(code_id, "")
        stack = _stack(pseudo, innermost, frame, outermost)
        return None if is_own(stack[1].codes) or awaits_own_request(frame) else stack

    def _classify(self, caller: CodeType) -> None:
        """Find the calls in a function whose waits are no contention, and its pseudo-frame."""
        if len(self._callers) >= _MAX_CALLERS:
            return
        self._callers[id(caller)] = caller
        filename, name = caller.co_filename.replace("\\", "/"), caller.co_qualname
        ending, called = _IDLE.get(name, ("\0", ""))
        serves = any(part in filename for part in _NETWORK)
        if serves or filename.endswith(ending):
            instructions = list(dis.get_instructions(caller))
            lines = {_line(each) for each in instructions if serves or each.argval == called}
            for each, following in pairwise(instructions):
                if _line(each) in lines:
                    # In 3.11, the offset of a running call is that of its last cache entry.
                    offsets = range(each.offset, following.offset, 2)
                    self._idle.update((id(caller), offset) for offset in offsets)
        if name == _ANYIO_WORKERS:
            self._pseudo_frames[id(caller)] = WORKER

    def waits_for_work(self, wrapper: FrameType) -> bool:
        """
        Return whether a wait that is about to begin is known to be no contention.

        It is known once the caller has been classified after an earlier wait.
        Workers wait so between any two pieces of work; classifying these waits
        only afterwards took 2 % of a `def` endpoint's time.
        """
        getter = wrapper.f_back
        worker = getter.f_back if getter is not None else None
        return worker is not None and (id(worker.f_code), worker.f_lasti) in self._idle

    def calling_stack(
        self, leaf: Leaf, wrapper: FrameType, pseudo: str = ""
    ) -> ContendedStack | None:
        """
        Return the stack of a call: a pseudo-frame if given, the method called, its callers.

        None if the profiler itself has called the method.
        """
        if is_own_context():
            return None
        outermost = _task_frame()
        name, code = _split(leaf)
        stack = _stack(pseudo or name, (code, 0), _caller(wrapper, outermost), outermost)
        return None if is_own(stack[1].codes) else stack


rules = StackRules()


def _line(instruction: dis.Instruction) -> int | None:
    return instruction.positions.lineno if instruction.positions else None


def _split(leaf: Leaf) -> tuple[str, CodeType | None]:
    return (leaf, None) if isinstance(leaf, str) else ("", leaf)


def _task_frame() -> FrameType | None:
    """Return the frame of the running task's own coroutine, None outside tasks."""
    if asyncio._get_running_loop() is None:
        return None
    task = asyncio.current_task()
    coroutine = task.get_coro() if task is not None else None
    frame: FrameType | None = getattr(coroutine, "cr_frame", None)
    return frame


def _caller(frame: FrameType, outermost: FrameType | None) -> FrameType | None:
    hidden = wrappers.by_id
    while frame is not outermost:
        below = frame.f_back
        if below is None or below.f_code is _LOOP_STEP:
            return None
        if id(below.f_code) not in hidden:
            return below
        frame = below
    return None


def _stack(
    pseudo: str,
    innermost: tuple[CodeType | None, int],
    frame: FrameType | None,
    outermost: FrameType | None,
) -> ContendedStack:
    # One loop, without calls: a request of FastAPI is 30 frames deep.
    hidden = wrappers.by_id
    code, lasti = innermost
    codes = [code] if code is not None else []
    places = [id(code), lasti] if code is not None else []
    while frame is not None and len(codes) <= MAX_DEPTH:  # one more shows that it was cut
        code = frame.f_code
        if code is _LOOP_STEP:
            break
        if id(code) not in hidden:
            codes.append(code)
            places.append(id(code))
            places.append(frame.f_lasti)
        if frame is outermost:
            break
        frame = frame.f_back
    return pseudo, StackKey(tuple(places), tuple(codes))
