"""
Whose wait it was: the stack that is blamed for one, from the frames of a wrapper.

The leaf is the method of the primitive that was called, not what that one
uses inside (a queue's condition, a barrier's); then come its callers, down to
the task's own coroutine: the event loop's frames below say nothing.

Waits that are no contention are left out: workers with nothing to do, timers,
and servers that wait for their client behind an event or a queue.
"""

from __future__ import annotations

import asyncio
import dis
from collections.abc import Iterable
from itertools import pairwise
from types import CodeType, FrameType, FunctionType

from asgi_pprof.collectors.contention.records import Contended
from asgi_pprof.runtime.chains import wrappers
from asgi_pprof.stacks import MAX_DEPTH, StackKey

WORKER = "waiting for a worker thread"

Leaf = CodeType | str | None
"""The method that was called: its code, or the name of one written in C."""

_ENTERING = ("__enter__", "__exit__", "__aenter__", "__aexit__")
_LOOP_STEP = asyncio.Handle._run.__code__

_IDLE = {
    # Who waits for work: by function, the end of its file's name, and the name that it calls
    # for that; what else it calls may be the application's own, such as `event.wait`.
    "WorkerThread.run": ("anyio/_backends/_asyncio.py", "get"),
    "_worker": ("concurrent/futures/thread.py", "get"),
    "Queue._feed": ("multiprocessing/queues.py", "nwait"),
    "QueueListener._monitor": ("logging/handlers.py", "dequeue"),
    "Timer.run": ("threading.py", "wait"),
    # A pause before the next address is tried.
    "connect_tcp": ("anyio/_core/_sockets.py", "wait"),
}
_NETWORK = ("/uvicorn/protocols/", "/uvicorn/lifespan/")  # events stand for bytes there
_ANYIO_WORKERS = "AsyncIOBackend.run_sync_in_worker_thread"

# By identity; a code's own hash is slow, and these live as long as the process.
_primitives: dict[int, CodeType] = {}
_entering: dict[int, CodeType] = {}
_judged: dict[int, CodeType] = {}
_pseudo_frames: dict[int, str] = {}
_idle: set[tuple[int, int]] = set()  # and the bytecode offset

_MAX_JUDGED = 4096


def know_primitives(classes: Iterable[object]) -> None:
    """Note the methods of primitives, so that what they use inside is not the leaf."""
    for each in classes:
        for name, value in dict(vars(each)).items():
            if isinstance(value, FunctionType) and id(value.__code__) not in wrappers:
                known = _entering if name in _ENTERING else _primitives
                known[id(value.__code__)] = value.__code__


def know_wrapper(wrapper: object) -> None:
    """Note a wrapper of ours, to leave its frames out."""
    code = getattr(wrapper, "__code__", None)
    if isinstance(code, CodeType):
        wrappers[id(code)] = code


def waiting_stack(leaf: Leaf, wrapper: FrameType) -> Contended | None:
    """
    Return who waited, None if that was no contention.

    Args:
        leaf: The method that was called; None to begin with its caller.
        wrapper: The frame of our wrapper of it.
    """
    outermost = task_frame()
    pseudo, code = _split(leaf)
    innermost = code, 0
    frame = _caller(wrapper, outermost)
    while frame is not None and (key := id(frame.f_code)) in _primitives:
        innermost = _primitives[key], frame.f_lasti
        frame = _caller(frame, outermost)
    caller = frame
    while caller is not None and id(caller.f_code) in _entering:
        caller = _caller(caller, outermost)
    if caller is not None:
        code_id = id(caller.f_code)
        if code_id not in _judged:
            _judge(caller.f_code)
        if (code_id, caller.f_lasti) in _idle:
            return None
        pseudo = pseudo or _pseudo_frames.get(code_id, "")
    return _contended(pseudo, innermost, frame, outermost)


def _judge(caller: CodeType) -> None:
    """Note at which places, if any, waits of a function are no contention, or have a name."""
    if len(_judged) >= _MAX_JUDGED:
        return
    _judged[id(caller)] = caller
    filename, name = caller.co_filename.replace("\\", "/"), caller.co_qualname
    ending, called = _IDLE.get(name, ("\0", ""))
    serves = any(part in filename for part in _NETWORK)
    if serves or filename.endswith(ending):
        instructions = list(dis.get_instructions(caller))
        lines = {_line(each) for each in instructions if serves or each.argval == called}
        for each, following in pairwise(instructions):
            if _line(each) in lines:
                # A call stands on the last of its cache entries in 3.11.
                _idle.update((id(caller), at) for at in range(each.offset, following.offset, 2))
    if name == _ANYIO_WORKERS:
        _pseudo_frames[id(caller)] = WORKER


def _line(instruction: dis.Instruction) -> int | None:
    return instruction.positions.lineno if instruction.positions else None


def waits_for_work(wrapper: FrameType) -> bool:
    """
    Tell before a wait that it will be no contention; only of callers that have been judged.

    That is for workers between two pieces of work, every time, where the
    whole judgement afterwards was 2 % of a `def` endpoint's time.
    """
    getter = wrapper.f_back
    worker = getter.f_back if getter is not None else None
    return worker is not None and (id(worker.f_code), worker.f_lasti) in _idle


def calling_stack(leaf: Leaf, wrapper: FrameType, pseudo: str = "") -> Contended:
    """Return who called, with the method that was called as the leaf, or a pseudo-frame there."""
    outermost = task_frame()
    name, code = _split(leaf)
    return _contended(pseudo or name, (code, 0), _caller(wrapper, outermost), outermost)


def _split(leaf: Leaf) -> tuple[str, CodeType | None]:
    return (leaf, None) if isinstance(leaf, str) else ("", leaf)


def task_frame() -> FrameType | None:
    """Return the frame of the running task's own coroutine, None outside tasks."""
    if asyncio._get_running_loop() is None:
        return None
    task = asyncio.current_task()
    coroutine = task.get_coro() if task is not None else None
    frame: FrameType | None = getattr(coroutine, "cr_frame", None)
    return frame


def _caller(frame: FrameType, outermost: FrameType | None) -> FrameType | None:
    while frame is not outermost:
        below = frame.f_back
        if below is None or below.f_code is _LOOP_STEP:
            return None
        if id(below.f_code) not in wrappers:
            return below
        frame = below
    return None


def _contended(
    pseudo: str,
    innermost: tuple[CodeType | None, int],
    frame: FrameType | None,
    outermost: FrameType | None,
) -> Contended:
    # One loop, without calls: a request of FastAPI is 30 frames deep.
    code, lasti = innermost
    codes = [code] if code is not None else []
    places = [id(code), lasti] if code is not None else []
    while frame is not None and len(codes) <= MAX_DEPTH:  # one more shows that it was cut
        code = frame.f_code
        if code is _LOOP_STEP:
            break
        if id(code) not in wrappers:
            codes.append(code)
            places.append(id(code))
            places.append(frame.f_lasti)
        if frame is outermost:
            break
        frame = frame.f_back
    return pseudo, StackKey(tuple(places), tuple(codes))
