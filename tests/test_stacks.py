"""Live frames and chains of awaits become stacks of locations, leaf first."""

import asyncio
import importlib.util
import sys
import threading
import types

import pytest

from asgi_pprof.profile import Function, Location, pseudo_location
from asgi_pprof.runtime.chains import await_chain
from asgi_pprof.stacks import (
    MAX_DEPTH,
    TRUNCATED,
    UNKNOWN,
    StackCounter,
    StackKey,
    Symbols,
    capture,
    chain_stack,
    name_totals,
    stack_key,
)

HERE = __name__


def names(stack):
    """Return the names of a stack's functions, without the name of this module."""
    return [location.function.name.removeprefix(f"{HERE}.") for location in stack]


def stack_here():
    """Return the stack of the caller."""
    return Symbols().stack(capture(sys._getframe(1)))


# Call stacks


def call_leaf():
    return stack_here()


def call_middle():
    return call_leaf()


def test_a_call_stack_is_leaf_first():
    """The innermost function comes first, with the line it is at."""
    stack = call_middle()
    assert names(stack)[:3] == [
        "call_leaf",
        "call_middle",
        "test_a_call_stack_is_leaf_first",
    ]
    leaf_code = call_leaf.__code__
    function = Function(f"{HERE}.call_leaf", leaf_code.co_filename, leaf_code.co_firstlineno)
    assert stack[0] == Location(function, leaf_code.co_firstlineno + 1)


def test_a_thread_without_a_frame_has_no_stack():
    """It is a thread that has just ended."""
    assert Symbols().stack(capture(None)) == ()


def recurse(depth, leaf):
    return recurse(depth - 1, leaf) if depth else leaf()


@pytest.mark.parametrize("extra", [0, 1, 200])
def test_a_deep_call_stack_is_cut_at_its_root(extra):
    """The stack has 128 frames, and ends with TRUNCATED if there were more."""

    def frames_below(frame):
        return 1 + frames_below(frame.f_back) if frame else 0

    def leaf():
        return stack_here()

    depth = MAX_DEPTH + extra - frames_below(sys._getframe()) - 2
    stack = recurse(depth, leaf)
    assert MAX_DEPTH == 128
    assert (stack[-1] == TRUNCATED) == (extra > 0)
    assert len(stack) == MAX_DEPTH + (extra > 0)
    assert names(stack)[1] == "recurse"


def test_a_cut_stack_is_marked():
    """The outermost location says it, in angle brackets."""
    assert TRUNCATED.function.name == "<truncated: outer frames not recorded>"


# Names


def test_names_are_qualified_by_module_and_class():
    """Names are those of `__qualname__`."""

    class Cart:
        def total(self):
            return stack_here()

    assert names(Cart().total())[0] == (
        "test_names_are_qualified_by_module_and_class.<locals>.Cart.total"
    )


def test_two_lambdas_on_a_line_keep_their_own_names():
    """They share a line, but not a function."""
    stack = (lambda: (lambda: stack_here())())()
    prefix = "test_two_lambdas_on_a_line_keep_their_own_names.<locals>.<lambda>"
    assert names(stack)[:2] == [f"{prefix}.<locals>.<lambda>", prefix]
    assert stack[0].line == stack[1].line
    assert stack[0].address != stack[1].address


def load(tmp_path, name, source):
    """Write a module to a file and import it."""
    path = tmp_path / f"{name}.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def twins(tmp_path, monkeypatch):
    """Return two modules with the same source in different files."""
    source = "def run(leaf):\n    return leaf()\n"
    modules = []
    for name in ("twin_a", "twin_b"):
        (tmp_path / name).mkdir()
        monkeypatch.setitem(sys.modules, name, None)
        modules.append(load(tmp_path / name, name, source))
    return modules


def test_equal_codes_in_different_files_get_their_own_names(twins):
    """Equal code objects compare equal: a cache by equality would mix them up."""
    first, second = twins
    assert first.run.__code__ == second.run.__code__
    stack = first.run(lambda: second.run(lambda: stack_here()))
    runs = [place.function for place in stack if place.function.name.startswith("twin_")]
    assert runs == [
        Function("twin_b.run", second.__file__, 1),
        Function("twin_a.run", first.__file__, 1),
    ]


def test_code_of_no_loaded_module_has_a_name_without_module():
    """This is code of exec and of removed modules."""
    namespace = {"leaf": stack_here}
    exec(compile("def run():\n\n    return leaf()\n", "<made up>", "exec"), namespace)
    assert namespace["run"]()[0] == Location(Function("run", "<made up>", 1), 3)


def test_a_module_that_loads_lazily_is_not_loaded(tmp_path, monkeypatch):
    """Naming code must not load modules that the application loads lazily."""
    path = tmp_path / "put_off.py"
    path.write_text("raise AssertionError('loaded')\n")
    spec = importlib.util.spec_from_file_location("put_off", path)
    spec.loader = importlib.util.LazyLoader(spec.loader)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "put_off", module)
    spec.loader.exec_module(module)
    lazy_type = type(module)
    assert Symbols().qualify(str(path), "run") == "put_off.run"
    assert type(module) is lazy_type is not types.ModuleType


class Hostile:
    """An entry of sys.modules that raises on attribute access."""

    def __getattribute__(self, name):
        raise AssertionError(name)


def test_odd_entries_of_sys_modules_are_ignored(monkeypatch):
    """They are None, objects that are not modules, and modules whose `__file__` is not a string."""
    odd = types.ModuleType("odd")
    odd.__file__ = None
    for name, module in {"odd": odd, "hostile": Hostile(), "nothing": None}.items():
        monkeypatch.setitem(sys.modules, name, module)
    assert Symbols().qualify(__file__, "run") == f"{HERE}.run"
    assert Symbols().qualify("/nowhere.py", "run") == "run"


def test_a_captured_stack_shows_the_lines_of_its_moment():
    """The lines are those of the capture, although the frame has moved on when they are named."""
    first = capture(sys._getframe())
    second = capture(sys._getframe())
    symbols = Symbols()
    assert symbols.stack(second)[0].line == symbols.stack(first)[0].line + 1
    assert symbols.stack(second)[1:] == symbols.stack(first)[1:]


# Await stacks


@types.coroutine
def suspend():
    """Wait until a value is sent."""
    yield


def chain_of(awaitable, symbols):
    return chain_stack(await_chain(awaitable), symbols)


def suspended_stack(coroutine):
    """Run a coroutine until it waits, and return its await stack."""
    coroutine.send(None)
    try:
        return chain_of(coroutine, Symbols())
    finally:
        coroutine.close()


async def wait_leaf():
    await suspend()


async def wait_middle():
    await wait_leaf()


async def wait_root():
    await wait_middle()


def test_a_chain_of_coroutines_is_leaf_first():
    """The chain ends at the generator that waits; each coroutine is at the line of its await."""
    stack = suspended_stack(wait_root())
    assert names(stack) == ["suspend", "wait_leaf", "wait_middle", "wait_root"]
    for place in stack[1:]:
        assert place.line == place.function.start_line + 1


@pytest.mark.parametrize("waitable", [None, 7, "text", object()])
def test_an_awaitable_without_frames_has_no_stack(waitable):
    """Futures of extension modules have no frames."""
    assert chain_of(waitable, Symbols()) == ()


def test_a_coroutine_that_has_not_begun_is_at_its_first_line():
    """A new task has such a coroutine."""
    coroutine = wait_root()
    try:
        (place,) = chain_of(coroutine, Symbols())
    finally:
        coroutine.close()
    assert names([place]) == ["wait_root"]
    assert place.line == place.function.start_line


def test_a_coroutine_that_has_ended_has_no_stack():
    """Its frame is gone."""
    coroutine = wait_root()
    coroutine.close()
    assert chain_of(coroutine, Symbols()) == ()


def test_generators_made_awaitable_are_followed():
    """They are made by types.coroutine and connected by `yield from`."""

    @types.coroutine
    def relay():
        yield from suspend()

    async def await_relay():
        await relay()

    stack = names(suspended_stack(await_relay()))
    assert [name.rpartition(".")[2] for name in stack] == ["suspend", "relay", "await_relay"]


async def stream_waiting():
    await wait_leaf()
    yield


async def iterate_stream():
    async for _ in stream_waiting():
        pass


async def comprehend_stream():
    return [item async for item in stream_waiting()]


async def comprehend_waiting():
    return [await wait_leaf() for _ in range(3)]


async def generator_expression():
    async for _ in (item async for item in stream_waiting()):
        pass


async def next_of_stream():
    await anext(stream_waiting())


async def next_of_stream_or_default():
    await anext(stream_waiting(), None)


async def asend_to_stream():
    await stream_waiting().asend(None)


async def close_stream():
    stream = stream_closing_slowly()
    await anext(stream)
    await stream.aclose()


async def throw_into_stream():
    stream = stream_closing_slowly()
    await anext(stream)
    await stream.athrow(KeyError)


async def stream_closing_slowly():
    try:
        yield
    finally:
        await wait_leaf()


class OwnAwait:
    """Awaits a coroutine by its `__await__`."""

    def __init__(self, make):
        self._make = make

    def __await__(self):
        return self._make().__await__()


class GeneratorAwait:
    """Its `__await__` is a generator."""

    def __await__(self):
        yield from suspend()


class IteratorAwait:
    """Its `__await__` returns an iterator that cannot be inspected."""

    def __await__(self):
        return iter([None])


async def await_object():
    await OwnAwait(wait_leaf)


async def await_object_with_generator():
    await GeneratorAwait()


async def await_object_with_iterator():
    await IteratorAwait()


async def enter_manager():
    async with SlowManager():
        pass


class SlowManager:
    async def __aenter__(self):
        await wait_leaf()

    async def __aexit__(self, *exc_info):
        pass


INLINED = sys.version_info >= (3, 12)  # PEP 709: comprehensions have no frame


@pytest.mark.parametrize(
    ("root", "between"),
    [
        (iterate_stream, ["stream_waiting"]),
        (
            comprehend_stream,
            ["stream_waiting", *([] if INLINED else ["comprehend_stream.<locals>.<listcomp>"])],
        ),
        (comprehend_waiting, [] if INLINED else ["comprehend_waiting.<locals>.<listcomp>"]),
        (generator_expression, ["stream_waiting", "generator_expression.<locals>.<genexpr>"]),
        (next_of_stream, ["stream_waiting"]),
        (next_of_stream_or_default, ["stream_waiting"]),
        (asend_to_stream, ["stream_waiting"]),
        (close_stream, ["stream_closing_slowly"]),
        (throw_into_stream, ["stream_closing_slowly"]),
        (await_object, []),
        (enter_manager, ["SlowManager.__aenter__"]),
    ],
)
def test_the_chain_goes_through_everything_that_can_be_awaited(root, between):
    """These are async generators, asend() and anext(), comprehensions, objects with `__await__`."""
    stack = names(suspended_stack(root()))
    assert stack == ["suspend", "wait_leaf", *between, root.__name__]


def test_a_generator_that_is_an_objects_await_is_followed():
    """The generator is part of the chain."""
    stack = names(suspended_stack(await_object_with_generator()))
    assert stack == ["suspend", "GeneratorAwait.__await__", "await_object_with_generator"]


def test_a_chain_ends_at_an_iterator_that_cannot_be_inspected():
    """The iterator's location has the name of its class."""
    stack = suspended_stack(await_object_with_iterator())
    assert names(stack) == ["<builtins.list_iterator>", "await_object_with_iterator"]


def test_a_task_that_waits_for_a_future_ends_at_its_innermost_coroutine():
    """This is how asyncio's tasks wait."""

    async def main():
        future = asyncio.get_running_loop().create_future()

        async def wait_for_future():
            await future

        task = asyncio.create_task(wait_for_future())
        await asyncio.sleep(0)
        stack = chain_of(task.get_coro(), Symbols())
        future.set_result(None)
        await task
        return stack

    (place,) = asyncio.run(main())
    assert place.function.name.endswith("wait_for_future")
    assert place.line == place.function.start_line + 1


async def dive(depth):
    if depth:
        await dive(depth - 1)
    else:
        await wait_leaf()


def with_room_for_frames(function, frames):
    """Run a function on a thread whose C stack has room for that many frames."""
    outcome = []

    def run():
        try:
            outcome.append(function())
        except BaseException as error:
            outcome.append(error)

    size, limit = threading.stack_size(512 * 2**20), sys.getrecursionlimit()
    sys.setrecursionlimit(3 * frames)
    try:
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    finally:
        sys.setrecursionlimit(limit)
        threading.stack_size(size)
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return outcome[0]


@pytest.mark.parametrize("depth", [MAX_DEPTH - 3, MAX_DEPTH - 2, 10_000])
def test_a_deep_chain_of_awaits_is_cut_at_its_root(depth):
    """The 128 locations nearest to the leaf stay, before TRUNCATED if there were more."""
    for _ in range(50):
        suspended_stack(dive(20))  # awaits that have run some times need no C stack
    stack = with_room_for_frames(lambda: suspended_stack(dive(depth)), 10_000)
    in_all = depth + 3
    kept = min(in_all, MAX_DEPTH)
    assert names(stack)[:kept] == ["suspend", "wait_leaf", *["dive"] * (kept - 2)]
    assert stack[kept:] == ((TRUNCATED,) if in_all > MAX_DEPTH else ())


def test_a_cyclic_chain_ends():
    """Such a chain cannot be awaited, but it can be built, and must not hang the process."""

    class Endless:
        pass

    class Carrier(list):
        pass

    Carrier.__name__ = "coroutine_wrapper"
    tail = Carrier()
    tail.append(tail)
    assert chain_of(tail, Symbols()) == ()


def here(lasti: int = 2) -> StackKey:
    return stack_key(((sys._getframe().f_code, lasti),))


def test_a_counter_adds_up_by_stack_labels_and_leaf():
    counter = StackCounter(UNKNOWN)
    leaf = pseudo_location("waiting")
    for labels in ((), (("tenant", "acme"),)):
        counter.add(here(), (1, 0.75), labels)
        counter.add(here(), (1, 0.75), labels, leaf)
        counter.add(here(), (1, 0.75), labels, leaf)
    assert len(counter) == 4
    assert [total.values for total in counter.totals()] == [(1, 0), (2, 1)] * 2
    assert counter.count() == 6
    stacks = [sample.stack for sample in name_totals(counter.totals())]
    assert [stack[0] == leaf for stack in stacks] == [False, True] * 2
    assert all(stack[-1].function.name.endswith(".here") for stack in stacks)


def test_a_counter_is_bounded_and_loses_nothing():
    """New stacks beyond the limit share a total; known stacks keep their own."""
    counter = StackCounter(pseudo_location("other stacks"), max_stacks=2)
    for lasti in (2, 4, 6, 8, 2):
        counter.add(here(lasti), (1, 10))
    totals = counter.totals()
    assert [total.values for total in totals] == [(2, 20), (1, 10), (2, 20)]
    assert totals[-1].sample(Symbols()).stack == (pseudo_location("other stacks"),)
    assert (len(counter), counter.overflowed, counter.count()) == (3, 2, 5)


def test_a_counter_distinguishes_equal_code_of_different_files():
    source = "def function(): pass"
    codes = [compile(source, name, "exec").co_consts[0] for name in ("a.py", "a.py", "b.py")]
    counter = StackCounter(UNKNOWN)
    for code in codes:
        counter.add(stack_key(((code, 0),)), (1,))
    assert len(counter) == 3
    files = [sample.stack[0].function.filename for sample in name_totals(counter.totals())]
    assert files == ["a.py", "b.py"]


def test_a_stack_without_frames_is_unknown():
    counter = StackCounter(pseudo_location("other stacks"))
    counter.add(StackKey(), (1,))
    assert [sample.stack for sample in name_totals(counter.totals())] == [(UNKNOWN,)]


def test_totals_are_copied_without_a_copy_of_each_stack():
    """A loop copies them. For 4,096 stacks of 30 frames, copies would take tens of milliseconds."""
    key = here()
    counter = StackCounter(UNKNOWN)
    counter.add(key, (1,))
    assert counter.totals()[0].stack is key
