"""Labels that outlive the sets they were taken under, and places by number."""

from __future__ import annotations

import pytest

from asgi_pprof.labels import current, labels
from asgi_pprof.native.core import native
from asgi_pprof.stacks import TRUNCATED
from tests.programs import run_program

if native:
    from asgi_pprof.native import label_interner as sampled_labels
    from asgi_pprof.native.label_interner import LabelBook
    from asgi_pprof.native.places import Places

pytestmark = pytest.mark.skipif(not native, reason="needs the C core")


class FakeSet:
    """A label set as the book sees it."""

    def __init__(self, number, **own):
        self.number, self.outer, self._own = number, None, own

    def own(self):
        return self._own


def test_sets_that_say_the_same_share_a_label():
    """So that their samples add up; no labels at all are label 0."""
    book = LabelBook()
    first = book.write(FakeSet(1, tenant="acme"), 1, False)
    second = book.write(FakeSet(2, tenant="umbrella"), 2, False)
    third = book.write(FakeSet(3, tenant="acme"), 3, False)
    assert first == third != second
    assert book.pairs(first) == (("tenant", "acme"),)
    assert book.pairs(second) == (("tenant", "umbrella"),)
    assert book.write(FakeSet(4), 4, False) == 0
    assert book.pairs(0) == ()


def test_samples_on_cpu_are_asked_for_by_number():
    """The dead say what they said then, the living what they say now, until forgotten."""
    book = LabelBook()
    living = FakeSet(2, method="GET")
    book.write(FakeSet(1, tenant="acme"), 1, True)
    book.write(FakeSet(3, tenant="other"), 3, False)
    living.own()["route"] = "/carts"
    found = book.by_number([living])
    assert found == {1: (("tenant", "acme"),), 2: (("method", "GET"), ("route", "/carts"))}
    book.forget_cpu()
    assert book.by_number([]) == {}


def test_different_labels_are_bounded(monkeypatch):
    """Beyond a number of them samples have none; those that are known go on."""
    monkeypatch.setattr(sampled_labels, "_MAX_LABELS", 3)
    book = LabelBook()
    written = [book.write(FakeSet(n, shard=str(n)), n, False) for n in range(5)]
    assert written == [1, 2, 0, 0, 0]
    assert book.write(FakeSet(9, shard="1"), 9, False) == 2


def test_each_set_has_a_number_that_was_never_used():
    """Also after others have died."""
    numbers = []
    for _ in range(100):
        with labels(tenant="acme"):
            numbers.append(current.get().number)
    assert len(set(numbers)) == 100
    assert numbers == sorted(numbers)


def test_places_that_are_no_code_have_names():
    """What could not be seen is said in the stack itself."""
    special = [
        native.PLACE_TRUNCATED,
        native.PLACE_UNREADABLE,
        native.PLACE_NO_FRAME,
        native.PLACE_LOST,
    ]
    stack = Places().stack(special)
    assert stack[0] is TRUNCATED
    assert [place.function.name for place in stack[1:]] == [
        "<stack could not be read>",
        "<no Python code>",
        "<lost: too many different names>",
    ]


@pytest.mark.parametrize("place", [-1, 0, 1, 4, 15, 2**32, 2**64, "x", None])
def test_numbers_that_are_no_places_are_refused(place):
    """By an exception, not by a crash."""
    with pytest.raises((ValueError, OverflowError, TypeError)):
        native.describe(place)


def test_set_that_is_sampled_after_its_finalizer_leaves_nothing_dangling():
    """A finalizer in the same cycle of garbage allocates under labels that are written down."""
    program = """
    import contextvars, gc
    from asgi_pprof import labels
    from asgi_pprof.recorders import heap_sampler
    from asgi_pprof.labels import current
    from asgi_pprof.native.core import native

    class Late:
        def __init__(self, context):
            self.context = context
        def __del__(self):
            self.context.run(keep)

    def keep():
        kept.append(bytes(100))

    def make_garbage():
        context = contextvars.copy_context()
        context.run(labels(tenant="acme").__enter__)
        context[current]._own["cycle"] = Late(context)

    kept = []
    heap_sampler.enable(1)
    gc.disable()
    for _ in range(50):
        make_garbage()
    gc.collect()
    assert len(kept) == 50
    others = [bytearray(60) for _ in range(10_000)]
    assert native.heap_pending() == []
    heap_sampler.copy().samples()
    heap_sampler.disable()
    """
    run_program(program)


def test_set_that_waits_for_its_deallocation_is_not_handed_out():
    """Deep in nested deallocations CPython puts objects aside for a while, with no references."""
    program = """
    import contextvars, gc
    from asgi_pprof import labels
    from asgi_pprof.recorders import heap_sampler
    from asgi_pprof.labels import current

    class Node:
        __slots__ = ("a_inner", "b_last")
        def __init__(self, inner, last=None):
            self.a_inner, self.b_last = inner, last

    class Asks:
        def __del__(self):
            heap_sampler.copy().samples()

    def begin():
        labels(tenant="acme").__enter__()
        return [bytes(100)]

    heap_sampler.enable(1)
    for depth in [*range(30, 70), *range(150, 260), 500, 5000]:
        context = contextvars.copy_context()
        kept = context.run(begin)
        chain = context[current]
        del context
        for _ in range(depth):
            chain = Node(chain)
        top = Node(chain, Asks())
        del chain
        del top
        gc.collect()
    heap_sampler.disable()
    """
    run_program(program)


def test_sets_of_ten_thousand_links_die_without_harm():
    """Each in the chain is in a sample of its own, and they all end at once."""
    program = """
    from asgi_pprof import labels
    from asgi_pprof.recorders import heap_sampler
    from asgi_pprof.labels import current
    from asgi_pprof.native.core import native

    heap_sampler.enable(64)
    native.cpu_start(1000)
    kept = []
    for number in range(3000):
        labels(number=number % 10).__enter__()
        kept.append(bytes(200))
    current.set(None)
    assert native.heap_pending() == []
    native.cpu_stop()
    native.marked_labels()
    native.cpu_free()
    heap_sampler.copy().samples()
    heap_sampler.disable()
    """
    run_program(program)


def test_writer_that_fails_is_not_heard_of():
    """The application sees no exception of ours, and keeps the one it has."""
    program = """
    from asgi_pprof.labels import current, labels
    from asgi_pprof.native.core import native

    def fail(label_set, number, on_cpu):
        raise LookupError("no")

    native.use_labels(current, fail)
    native.heap_start(1)
    kept = []
    try:
        with labels(tenant="acme"):
            kept.append(bytes(100))
            raise KeyError("mine")
    except KeyError as error:
        assert str(error) == "'mine'", error
        assert error.__context__ is None
    native.heap_read()
    assert native.heap_pending() == []
    native.heap_stop()
    """
    run_program(program)
