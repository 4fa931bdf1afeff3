"""Labels outlive the label sets of their samples, and places have numbers."""

from __future__ import annotations

import pytest

from asgi_pprof.labels import current, labels
from asgi_pprof.native.core import native
from asgi_pprof.stacks import TRUNCATED
from tests.programs import run_program

if native:
    from asgi_pprof.native import label_interner as sampled_labels
    from asgi_pprof.native.label_interner import LabelInterner
    from asgi_pprof.native.places import Places

pytestmark = pytest.mark.skipif(not native, reason="needs the C core")


class FakeSet:
    """The part of a label set that the interner uses."""

    def __init__(self, number, **own):
        self.number, self.outer, self._own = number, None, own

    def own(self):
        return self._own


def all_used(end):
    return b"\x01" * end


def test_sets_with_equal_pairs_share_a_label():
    """So the samples of the sets add up. A set without pairs has label 0."""
    interner = LabelInterner(all_used)
    first = interner.store(FakeSet(1, tenant="acme"), 1, False, True)
    second = interner.store(FakeSet(2, tenant="umbrella"), 2, False, True)
    third = interner.store(FakeSet(3, tenant="acme"), 3, False, True)
    assert first == third != second
    assert interner.pairs(first) == (("tenant", "acme"),)
    assert interner.pairs(second) == (("tenant", "umbrella"),)
    assert interner.store(FakeSet(4), 4, False, True) == 0
    assert interner.pairs(0) == ()


def test_pairs_of_marked_sets_are_found_by_number():
    """A dead set has its last pairs, a living one its current pairs, until they are dropped."""
    interner = LabelInterner(all_used)
    living = FakeSet(2, method="GET")
    interner.store(FakeSet(1, tenant="acme"), 1, True, False)
    interner.store(FakeSet(3, tenant="other"), 3, False, True)
    living.own()["route"] = "/carts"
    found = interner.by_number([living])
    assert found == {1: (("tenant", "acme"),), 2: (("method", "GET"), ("route", "/carts"))}
    interner.forget_cpu()
    assert interner.by_number([]) == {}


def test_the_number_of_labels_is_bounded(monkeypatch):
    """Beyond the limit, new sets get no label; known ones keep theirs."""
    monkeypatch.setattr(sampled_labels, "_MAX_LABELS", 3)
    interner = LabelInterner(all_used)
    written = [interner.store(FakeSet(n, shard=str(n)), n, False, True) for n in range(5)]
    assert written == [1, 2, 0, 0, 0]
    assert interner.store(FakeSet(9, shard="1"), 9, False, True) == 2


def test_labels_that_no_sample_has_are_used_again(monkeypatch):
    """Other labels keep their pairs. A reader learns of the reuse from `reuses`."""
    monkeypatch.setattr(sampled_labels, "_MAX_LABELS", 4)
    interner = LabelInterner(lambda end: bytes(each in (0, 2) for each in range(end)))
    for n in range(1, 4):
        interner.store(FakeSet(n, shard=str(n)), n, False, True)
    assert interner.reuses == 0
    new = [interner.store(FakeSet(n, shard=str(n)), n, False, True) for n in (4, 5)]
    assert sorted(new) == [1, 3]
    assert interner.reuses == 1
    assert interner.pairs(2) == (("shard", "2"),)
    assert {interner.pairs(each) for each in new} == {(("shard", "4"),), (("shard", "5"),)}
    assert interner.refused == 0


def test_a_set_that_dies_while_another_is_stored_takes_no_label_from_it(monkeypatch):
    """Storing a set runs Python code, and so finalizers, before a sample has the set's label."""
    monkeypatch.setattr(sampled_labels, "_MAX_LABELS", 1)
    asked = []

    def used_labels(end):
        asked.append(end)
        return bytes(end)

    class Ends(FakeSet):
        def own(self):
            assert interner.store(FakeSet(2, shard="2"), 2, False, True) == 0
            assert asked == []
            return super().own()

    interner = LabelInterner(used_labels)
    interner.store(Ends(1, shard="1"), 1, False, True)
    assert asked == [1]


def test_each_set_has_a_number_of_its_own():
    """Numbers of dead sets are not reused."""
    numbers = []
    for _ in range(100):
        with labels(tenant="acme"):
            numbers.append(current.get().number)
    assert len(set(numbers)) == 100
    assert numbers == sorted(numbers)


def test_places_outside_code_have_names():
    """They say in the stack itself what could not be read."""
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
def test_invalid_places_are_refused(place):
    """`describe` raises and does not crash."""
    with pytest.raises((ValueError, OverflowError, TypeError)):
        native.describe(place)


def test_a_set_that_is_sampled_after_its_finalizer_leaves_no_dangling_pointer():
    """A finalizer in the same cycle allocates memory under a label set whose labels are stored."""
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


def test_a_set_that_waits_for_its_deallocation_is_not_returned():
    """In deeply nested deallocations CPython defers some objects, which then have no references."""
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

    gc.freeze()  # otherwise collecting the imported modules takes most of the time
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


def test_a_long_chain_of_sets_can_die_at_once():
    """Each of 1500 sets is in a sample of its own."""
    program = """
    from asgi_pprof import labels
    from asgi_pprof.recorders import heap_sampler
    from asgi_pprof.labels import current
    from asgi_pprof.native.core import native

    heap_sampler.enable(64)
    native.cpu_start(1000)
    kept = []
    for number in range(1500):
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


def test_an_exception_of_the_writer_is_dropped():
    """The application does not see it, and keeps its own exception."""
    program = """
    from asgi_pprof.labels import current, labels
    from asgi_pprof.native.core import native

    def fail(label_set, number, marked, waited_for):
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
