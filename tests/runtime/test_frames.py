"""Stacks of threads and suspended coroutines are read, with the C core and without."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib
import os
import sys
import threading
import time
import types
import weakref
from concurrent.futures import ThreadPoolExecutor

import anyio.from_thread
import anyio.to_thread
import pytest

from asgi_pprof.native.core import native
from asgi_pprof.runtime import frames
from asgi_pprof.runtime.frames import MAX_DEPTH, frame_local
from tests.programs import run_program
from tests.proxy import Proxy
from tests.threads import in_a_thread

needs_native = pytest.mark.skipif(native is None, reason="needs the C core")
CORES = {
    "native": native,
    "pure": types.SimpleNamespace(
        awaited=frames._awaited,
        current_frames=frames._read_frame_objects,
        generator_frame=frames._generator_frame,
        generator_local=frames._generator_local,
        running_frames=frames._running_frames,
    ),
}


@pytest.fixture(params=CORES)
def core(request, monkeypatch):
    """The functions that read frames: those of the C core, or those in Python."""
    for name in frames._MAKE_INTERPRETERS:  # another test may have loaded them
        monkeypatch.delitem(sys.modules, name, raising=False)
    if CORES[request.param] is None:
        pytest.skip("needs the C core")
    return CORES[request.param]


def code_in(code, name):
    """Return the code of a function that is defined in another one."""
    return next(each for each in code.co_consts if getattr(each, "co_name", "") == name)


def names(places):
    return [code.co_qualname.rpartition(".")[2] for code, _ in places]


def wait_in_here(ready, end):
    ready.set()
    end.wait(30)


# Threads


def test_all_threads_are_read_leaf_first(core):
    """The calling thread's stack begins with the function that calls the reader."""
    with in_a_thread(wait_in_here) as thread:
        stacks = core.current_frames()
        assert {thread.ident, threading.get_ident()} <= set(stacks)
        assert len(stacks) == len(list(stacks)) == len(stacks.values())
        waiting = names(stacks[thread.ident].places())
        assert waiting[-3:] == ["run", "_bootstrap_inner", "_bootstrap"]
        assert waiting[-4] == "wait_in_here"
        own = stacks[threading.get_ident()].places()
        assert own[0][0] is sys._getframe().f_code
        assert [code for code, _ in own[1:3]] == [
            sys._getframe(1).f_code,
            sys._getframe(2).f_code,
        ]


def test_offsets_are_those_of_frames(core):
    """An offset belongs to the line of the call that reads the stack."""
    (place, *_), here = core.current_frames()[threading.get_ident()].places(), sys._getframe()
    lines = {line for start, end, line in here.f_code.co_lines() if start <= place[1] < end}
    assert lines == {here.f_lineno - 1} or lines == {here.f_code.co_firstlineno + 2}


def test_selected_threads_and_a_few_frames_are_read(core):
    """Only the requested threads are read, and no more frames than requested."""
    with in_a_thread(wait_in_here) as thread:
        stacks = core.current_frames((thread.ident,), depth=2)
        ((ident, stack),) = stacks.items()
        assert ident == thread.ident
        assert len(stack) == len(stack.places()) == 2
        assert stack.code(1) is stack.places()[1][0]
        assert stack.code(2) is None
        assert stacks.get(threading.get_ident()) is None
        with pytest.raises(KeyError):
            stacks[threading.get_ident()]
    assert list(core.current_frames(())) == []


def recurse(depth, function):
    return recurse(depth - 1, function) if depth else function()


def test_the_innermost_frames_of_a_deep_stack_are_kept(core):
    """One frame more than shown is kept. Variables are found in frames further out too."""
    ident = threading.get_ident()

    def deep(depth, *wanted):
        def read():
            return core.current_frames((ident,), locals_of=wanted)[ident]

        return recurse(depth, read)

    stack = deep(300, (deep.__code__, "depth"))
    assert len(stack) == MAX_DEPTH + 1
    assert stack.found == 302
    assert stack.local("depth") == 300
    assert deep(300, (deep.__code__, "depth"), (recurse.__code__,)).found == 1
    assert deep(300, (in_a_thread.__wrapped__.__code__,)).found == -1


def kept_in_a_frame(ready, end, target=None):
    absent_until_later = None
    del absent_until_later
    target = target or [0]
    shared = [1]

    def inner(argument=target):
        cell_of_outer = shared
        own_cell = {"a": 1}
        unset = (lambda: own_cell) and None
        del unset
        ready.set()
        end.wait(30)
        return cell_of_outer, argument

    inner()


def test_variables_of_another_threads_frames_are_read(core):
    """These are arguments, variables, own and outer cells. An unset or unknown one is None."""
    outer = kept_in_a_frame.__code__
    inner = code_in(outer, "inner")
    with in_a_thread(kept_in_a_frame) as thread:

        def read(code, *names):
            stacks = core.current_frames((thread.ident,), locals_of=((code, *names),))
            stack = stacks[thread.ident]
            assert stack.code(stack.found) is code
            return [stack.local(name) for name in names]

        assert read(inner, "argument", "cell_of_outer", "shared", "own_cell") == [
            [0],
            [1],
            [1],
            {"a": 1},
        ]
        assert read(inner, "unset", "no such name") == [None, None]
        assert read(outer, "shared", "absent_until_later", "target") == [[1], None, [0]]
        stack = core.current_frames(locals_of=((inner, "argument"),))[thread.ident]
        assert stack.local("shared") is None  # it was not requested
        elsewhere = core.current_frames(locals_of=((inner, "argument"),))[threading.get_ident()]
        assert (elsewhere.found, elsewhere.local("argument")) == (-1, None)


def test_a_value_does_not_outlive_its_variable(core):
    """Reading a value leaves no reference in the frame, which may live as long as its thread."""
    read, dropped = threading.Event(), threading.Event()
    references = []

    class Value:
        pass

    def holder(ready, end):
        value = Value()
        references.append(weakref.ref(value))
        ready.set()
        read.wait(30)
        del value
        dropped.set()
        end.wait(30)

    with in_a_thread(holder) as thread:
        stacks = core.current_frames(locals_of=((holder.__code__, "value"),))
        assert type(stacks[thread.ident].local("value")) is Value
        stacks.clear()
        del stacks
        read.set()
        assert dropped.wait(30)
        assert references[0]() is None


def test_the_work_of_an_executors_thread_is_read(core):
    """The work item is the `self` of a frame that runs."""
    ready, end = threading.Event(), threading.Event()
    run = importlib.import_module("concurrent.futures.thread")._WorkItem.run.__code__
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(wait_in_here, ready, end)
        assert ready.wait(30)
        (thread,) = pool._threads
        stack = core.current_frames(locals_of=((run, "self"),))[thread.ident]
        end.set()
    assert stack.local("self").future is future


def test_the_work_of_an_anyio_thread_is_read(core):
    """The future of its result is a local variable of a frame that runs."""
    found = []

    async def main():
        ready, end = asyncio.Event(), threading.Event()

        def work():
            found.append(threading.current_thread())
            anyio.from_thread.run_sync(ready.set)
            end.wait(30)

        task = asyncio.create_task(anyio.to_thread.run_sync(work))
        await ready.wait()
        run = sys.modules["anyio._backends._asyncio"].WorkerThread.run.__code__
        stack = core.current_frames(locals_of=((run, "future"),))[found[0].ident]
        future = stack.local("future")
        pending = isinstance(future, asyncio.Future) and not future.done()
        end.set()
        await task
        return pending

    assert asyncio.run(main())
    deadline = time.monotonic() + 30
    while found[0].is_alive() and time.monotonic() < deadline:
        time.sleep(0.01)


@needs_native
def test_reading_creates_no_object_that_the_garbage_collector_tracks():
    """So reading never causes a garbage collection."""
    with in_a_thread(wait_in_here) as thread:
        wanted = ((wait_in_here.__code__, "ready", "end"),)
        idents = (thread.ident, threading.get_ident())
        gc.disable()
        try:
            before = gc.get_count()[0]
            stacks = native.current_frames(idents, 129, wanted)
            stack = stacks[thread.ident]
            stack.code(0), stack.local("ready"), stack.found
            after = gc.get_count()[0]
        finally:
            gc.enable()
        assert stack.local("ready") is not None
        assert after == before
        assert not gc.is_tracked(stacks)
        assert not gc.is_tracked(stack)


@needs_native
def test_references_are_released():
    """A thousand reads change no reference count, even after `clear` and errors."""
    code, value = wait_in_here.__code__, object()
    wanted = ((code, "ready", "end", "nothing"), (recurse.__code__, "function"))

    def read_often():
        ident = threading.get_ident()
        for _ in range(1000):
            stacks = native.current_frames(None, 5, wanted)
            stack = stacks[ident]
            stack.places(), stack.local("function"), stacks.items(), stacks.values()
            stacks.clear()
            assert (stack.places(), len(stack), len(stacks), stack.code(0)) == ((), 0, 0, None)
            with pytest.raises(ValueError, match="tuples of a code"):
                native.current_frames(None, 5, ((code, 1),))
        return value

    with in_a_thread(wait_in_here):
        counted = [code, recurse.__code__, wanted, wanted[0], read_often]
        recurse(3, read_often)
        gc.collect()  # until then, the tracebacks of `pytest.raises` keep their frames
        before = list(map(sys.getrefcount, counted))
        recurse(3, read_often)
        gc.collect()
        assert list(map(sys.getrefcount, counted)) == before


@needs_native
@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ((5,), TypeError),
        ((["no number"],), TypeError),
        ((None, 0), ValueError),
        ((None, 1, [(1,)]), TypeError),
        ((None, 1, (("no code",),)), ValueError),
        ((None, 1, ((recurse.__code__, *"abcde"),)), ValueError),
        ((None, 1, ((),)), ValueError),
    ],
)
def test_wrong_arguments_are_refused(arguments, error):
    """They raise an exception."""
    with pytest.raises(error):
        native.current_frames(*arguments)


# Coroutines and generators


def generator(argument):
    value = [argument]
    yield value
    yield value


async def coroutine(argument):
    value = [argument]
    await suspend(value)


async def async_generator(argument):
    value = [argument]
    await suspend(value)
    yield value


@types.coroutine
def suspend(value):
    yield value


def names_of(awaited):
    return None if awaited is None else awaited.__qualname__


class Ended(Exception):
    """Raised in a suspended generator."""


def begin(suspended):
    """Run the object until it is suspended; return the object that resumes it."""
    going_on = suspended
    if isinstance(suspended, types.AsyncGeneratorType):
        going_on = suspended.asend(None)
    going_on.send(None)
    return going_on


@pytest.mark.parametrize("make", [generator, coroutine, async_generator])
def test_a_suspended_frame_is_read(core, make):
    """It is read before it starts, while it is suspended, and after it has ended."""
    made = make(7)
    code, offset = core.generator_frame(made)
    assert code is make.__code__
    assert offset == frames._frame_object(made).f_lasti
    waiting = begin(made)
    assert core.generator_frame(made) == (code, frames._frame_object(made).f_lasti)
    assert names_of(core.awaited(made)) == {generator: None, coroutine: "suspend"}.get(
        make, "suspend"
    )
    if core is native or not frames._ENDED_GENERATORS_CRASH:
        assert core.generator_local(made, "value") == [7]
        assert core.generator_local(made, "argument") == 7
    assert core.generator_local(made, "nothing") is None
    with contextlib.suppress(StopIteration, Ended):
        if make is async_generator:
            waiting.throw(Ended())
        else:
            made.close()
    assert core.generator_frame(made) is None
    assert core.awaited(made) is None
    assert core.generator_local(made, "value") is None
    assert core.running_frames(made) == ()


def test_the_frames_of_a_running_coroutine_are_read(core):
    """The coroutine may run in any thread. A suspended one has no running frames."""

    async def outer(ready, end):
        inner(ready, end)

    def inner(ready, end):
        wait_in_here(ready, end)

    made = []

    def run(ready, end):
        made.append(outer(ready, end))
        with contextlib.suppress(StopIteration):
            made[0].send(None)

    with in_a_thread(run):
        running = names(core.running_frames(made[0]))
        assert running[-3:] == ["wait_in_here", "inner", "outer"]
        assert core.generator_frame(made[0])[0] is outer.__code__
        assert core.awaited(made[0]) is None
    waiting = coroutine(1)
    begin(waiting)
    assert core.running_frames(waiting) == ()
    waiting.close()


def test_the_frames_of_the_calling_coroutine_are_read(core):
    """The reader's own frames are left out."""

    def inner():
        return core.running_frames(asyncio.current_task().get_coro())

    async def outer():
        return inner()

    async def main():
        return await outer()

    assert names(asyncio.run(main())) == ["inner", "outer", "main"]


@needs_native
def test_objects_without_a_frame_are_refused():
    """These functions read memory, so they check the type first."""
    for function in (native.awaited, native.generator_frame, native.running_frames):
        with pytest.raises(TypeError, match="no generator or coroutine"):
            function(object())
    with pytest.raises(TypeError, match="no generator or coroutine"):
        native.generator_local(object(), "value")


# Frames that end while they are read


@needs_native
def test_variables_that_are_being_released_are_not_read():
    """Before 3.11.2 a returning frame is still linked, and has the addresses of freed objects."""
    said = run_program(
        """
        import gc, sys, threading
        from asgi_pprof.native.core import native

        class Waits:
            def __del__(self):
                dying.set()
                read.wait(30)

        def leaf(first, second):
            first = list(range(100))   # released before `second`, whose finalizer waits
            second = Waits()

        def caller():
            leaf(None, None)

        dying, read = threading.Event(), threading.Event()
        thread = threading.Thread(target=caller)
        thread.start()
        dying.wait(30)
        garbage = [bytes(800) for _ in range(1000)]  # reuses the list's memory
        wanted = ((leaf.__code__, "first", "second"),)
        stack = native.current_frames(locals_of=wanted)[thread.ident]
        print(stack.local("first"), stack.local("second"))
        names = [code.co_name for code, _ in stack.places()]
        print("caller" in names, "__del__" in names)
        read.set()
        thread.join()
        """
    )
    assert said.splitlines() == ["None None", "True True"]


@needs_native
def test_code_that_is_being_freed_is_in_no_stack():
    """A weakref callback may run then, and before 3.11.2 the frame is still linked."""
    said = run_program(
        """
        import gc, threading, weakref
        from asgi_pprof.native.core import native

        def waits(_):
            dying.set()
            read.wait(30)

        references = []

        def run():
            namespace = {}
            exec("def freed(): namespace.clear()", namespace)
            namespace["namespace"] = namespace
            references.append(weakref.ref(namespace["freed"].__code__, waits))
            namespace.pop("freed")()

        dying, read = threading.Event(), threading.Event()
        thread = threading.Thread(target=run)
        thread.start()
        dying.wait(30)
        for _ in range(100):
            names = [code.co_name for code, _ in native.current_frames()[thread.ident].places()]
        print("freed" in names, "waits" in names, references[0]() is None)
        read.set()
        thread.join()
        gc.collect()
        """
    )
    assert said == "False True True\n"


@pytest.mark.parametrize("shift", [0, 1])
def test_a_stack_is_of_one_moment_although_garbage_is_collected(shift):
    """
    The thread returns from all its frames during a garbage collection, and reuses their memory.

    On 3.11 making a frame object collected garbage, and then other objects were read as
    frames: `'int' object has no attribute 'f_code'`, or a crash.
    """
    said = run_program(
        """
        import gc, sys, threading
        from asgi_pprof.runtime.frames import capture, current_frames

        waiting, gate, unwound, end = (threading.Event() for _ in range(4))
        names = " = ".join(f"v{number}" for number in range(1200))
        exec(f"def use_their_memory():\\n {names} = 12345\\n unwound.set()\\n end.wait(30)\\n")

        def down(depth):
            if depth:
                return down(depth - 1) + depth
            waiting.set()
            gate.wait(30)
            return 0

        def run():
            down(60)
            use_their_memory()

        def callback(phase, info):
            global calls
            calls += 1
            if shift and calls == 4:
                kept.append([])  # moves all later collections by one allocation
            if calls == 20:
                gate.set()
                unwound.wait(30)

        shift, calls, kept = int(sys.argv[1]), 0, []
        thread = threading.Thread(target=run)
        thread.start()
        waiting.wait(30)
        before = gc.get_threshold()
        gc.callbacks.append(callback)
        gc.set_threshold(1)
        names = [code.co_name for code, _ in capture(current_frames()[thread.ident])]
        gc.set_threshold(*before)
        gc.callbacks.remove(callback)
        print(names.count("down"), "run" in names, "use_their_memory" in names)
        gate.set()
        end.set()
        thread.join()
        """,
        str(shift),
    )
    assert said == "61 True False\n"


# Coroutines that end while they are read


@needs_native
def test_what_a_coroutine_awaits_is_not_read_while_it_is_released():
    """A weakref callback may run at that moment, while another thread's loop cancels the task."""
    said = run_program(
        """
        import asyncio, threading, weakref
        from asgi_pprof.collectors.goroutine.collector import TaskCollector

        ending, has_been_read, references = threading.Event(), threading.Event(), []

        def ended(_):
            ending.set()
            has_been_read.wait(30)

        async def inner():
            await asyncio.sleep(60)

        def make():
            made = inner()
            references.append(weakref.ref(made, ended))
            return made

        async def outer():
            unset = await make()
            return unset

        async def cancel():
            task = asyncio.create_task(outer())
            await asyncio.sleep(0.05)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

        async def read():
            profile = (await TaskCollector(answer_s=0.1).snapshot())()
            return [[place.function.name for place in each.stack] for each in profile.samples]

        thread = threading.Thread(target=asyncio.run, args=(cancel(),))
        thread.start()
        ending.wait(30)
        print(any("outer" in stack for stack in asyncio.run(read())))
        has_been_read.set()
        thread.join()
        """,
        options=("-W", "error"),
    )
    assert said == "True\n"


@needs_native
def test_what_a_coroutine_awaits_is_not_read_while_it_raises():
    """3.11 may collect garbage while it makes the traceback; the frame's stack is empty then."""
    said = run_program(
        """
        import gc, threading
        from asgi_pprof.runtime.chains import await_chain

        class Waits:
            def __await__(self):
                return iter([1, 2])

        async def waits():
            unset = await Waits()
            return unset

        def callback(phase, info):
            global left
            left -= 1
            if left == 0:
                ready.set()
                read.wait(30)

        def run():
            error, throw = ValueError(), coroutine.throw
            gc.collect()
            gc.callbacks.append(callback)
            before = gc.get_threshold()
            gc.set_threshold(1)
            try:
                throw(error)
            except ValueError:
                pass
            finally:
                gc.set_threshold(*before)
                gc.callbacks.remove(callback)
                ready.set()

        for left in range(1, 7):
            ready, read = threading.Event(), threading.Event()
            coroutine = waits()
            coroutine.send(None)
            thread = threading.Thread(target=run)
            thread.start()
            ready.wait(30)
            print(len(await_chain(coroutine)) < 3)
            read.set()
            thread.join()
        """
    )
    assert said == "True\n" * 6


# Other interpreters


@pytest.mark.skipif(sys.version_info < (3, 12), reason="interpreters share the GIL")
@pytest.mark.parametrize("switch", ["1", "0"])
def test_threads_of_other_interpreters_are_not_read(switch, tmp_path):
    """Another GIL guards their frames. Without the C core no other thread is read meanwhile."""
    said = run_program(
        """
        import importlib, os, sys, textwrap, threading, time
        from asgi_pprof.native.core import native
        from asgi_pprof.runtime.frames import current_frames, why_not

        SCRIPT = '''
        import os, time
        def only_in_another_interpreter():
            os.close(os.open(STARTED, os.O_CREAT))
            while not os.path.exists(END):
                time.sleep(0.001)
        only_in_another_interpreter()
        '''

        def run():
            try:
                module = importlib.import_module("_interpreters")
            except ImportError:
                module = importlib.import_module("_xxsubinterpreters")
            number = module.create()
            execute = getattr(module, "exec", None) or module.run_string
            execute(number, f"STARTED, END = {sys.argv[1:]!r}" + textwrap.dedent(SCRIPT))
            module.destroy(number)

        def read():
            names = {
                code.co_name for stack in current_frames().values() for code, _ in stack.places()
            }
            assert "only_in_another_interpreter" not in names
            assert threading.get_ident() in current_frames()
            return waiting.ident in current_frames(), why_not()

        started, end = sys.argv[1:]
        stop = threading.Event()
        waiting = threading.Thread(target=stop.wait)
        waiting.start()
        thread = threading.Thread(target=run)
        thread.start()
        while not os.path.exists(started):
            time.sleep(0.001)
        print(native is not None, *read())
        open(end, "w").close()
        thread.join()
        print(*read())
        stop.set()
        """,
        str(tmp_path / "started"),
        str(tmp_path / "end"),
        ASGI_PPROF_NATIVE=switch,
    )
    meanwhile, afterwards = map(str.strip, said.splitlines())
    is_native, could_read, *why = meanwhile.split(maxsplit=2)
    assert could_read == is_native
    assert bool(why) == (is_native == "False")
    # From 3.14 on the private module is always loaded, so that does not show that it is used.
    as_before = is_native == "False" and sys.version_info < (3, 14)
    assert afterwards == (meanwhile.partition(" ")[2] if as_before else "True")


# Frame objects, which are used without the C core


def test_locals_of_a_module_and_a_class():
    """The values are read from the dict that holds the variables."""
    scope = {"frame_local": frame_local, "sys": sys, "value": 1, "seen": []}
    source = """
seen.append(frame_local(sys._getframe(), "value"))
class Body:
    attribute = 2
    seen.append(frame_local(sys._getframe(), "attribute"))
    seen.append(frame_local(sys._getframe(), "none", 3))
"""
    exec(source, scope)
    assert scope["seen"] == [1, 2, 3]


def test_a_cleared_frame_has_no_locals():
    """A frame that is kept after its function has returned has its locals until it is cleared."""

    def function():
        value = object()
        return sys._getframe(), value

    frame, value = function()
    assert frame_local(frame, "value") is value
    frame.clear()
    assert frame_local(frame, "value") is None


def test_a_dict_that_locals_returned_stays_complete():
    """Before 3.13 the frame keeps the dict that `locals()` returns. Reading does not empty it."""
    value = [1]
    mine = locals()
    assert frame_local(sys._getframe(), "value") is value
    assert mine["value"] is value


@pytest.mark.parametrize("install", ["settrace", "setprofile"])
def test_a_traced_frame_keeps_its_variables(install):
    """After a trace function the interpreter copies the dict back into the frame."""

    def traced(argument):
        variable = 2
        return argument, variable

    def trace(frame, event, argument):
        frame_local(frame, "argument")
        return trace

    before = getattr(sys, install.replace("set", "get"))()
    getattr(sys, install)(trace)
    try:
        result = traced(1)
    finally:
        getattr(sys, install)(before)
    assert result == (1, 2)


def test_garbage_is_not_collected_while_frame_objects_are_made():
    """This is so on 3.11. Afterwards collection is on again, unless the application had it off."""
    off = sys.version_info < (3, 12)
    with frames.frame_objects(sys._getframe()):
        assert gc.isenabled() is not off
    assert gc.isenabled()
    with pytest.raises(KeyError), frames.frame_objects(sys._getframe()):
        raise KeyError
    assert gc.isenabled()
    gc.disable()
    try:
        with frames.frame_objects(sys._getframe()):
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="only 3.11 collects garbage there")
def test_the_last_of_several_readers_switches_collection_on_again():
    """A child that is forked meanwhile collects garbage too."""
    collecting = frames._Collecting()
    collecting.off()
    collecting.off()
    collecting.on()
    assert not gc.isenabled()
    child = os.fork()
    if child == 0:
        os._exit(0 if gc.isenabled() else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    collecting.on()
    assert gc.isenabled()


def test_proxies_of_coroutines_are_unwrapped():
    """Proxies such as wrapt's claim the class of their object. Other values stay as they are."""

    class Fails:
        def __getattr__(self, name):
            raise RuntimeError(name)

    made = coroutine(1)
    assert not frames.is_generator(Proxy(made))
    assert frames.unwrapped(Proxy(made)) is made
    assert frames.unwrapped(made) is made
    for other in (Fails(), 5, None, Proxy(7)):
        assert frames.unwrapped(other) is other
    made.close()
