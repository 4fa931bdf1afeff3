"""The native heap engine samples every block at rate 1, and works beside other tools."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import itertools
import math
import re
import sys
import textwrap
import threading
import tracemalloc

import pytest

from asgi_pprof import PprofApp, labels
from asgi_pprof.collectors.heap.collector import HeapCollector
from asgi_pprof.collectors.heap.sizes import scale_sampled, size_class
from asgi_pprof.collectors.heap.tracing import Peaks
from asgi_pprof.labels import current
from asgi_pprof.merge import subtract
from asgi_pprof.native.core import native
from asgi_pprof.recorders import heap_sampler, heap_tracing
from asgi_pprof.request_labels import RequestLabels
from tests.programs import QUIET, run_program
from tests.valid import check_valid

pytestmark = pytest.mark.skipif(not native, reason="needs the C core")

HEADER = sys.getsizeof(b"")  # a bytes object is one block of this size plus its content


@pytest.fixture
def every_block():
    """Sample every block during the test."""
    # Code allocates blocks when it first runs: its caches, and the tables of
    # sys.monitoring once anything in the process has used that.
    keep_blocks(25, 2)
    grow([], 2)
    grow_a_little(bytearray())
    double(bytearray())
    gc.disable()  # the callbacks of other libraries allocate, such as hypothesis's
    heap_sampler.enable(1)
    yield
    heap_sampler.disable()
    gc.enable()


def keep_blocks(count, size):
    return [bytes(size) for _ in range(count)]


def grow(into, count):
    for _ in range(count):
        into.append(None)


def grow_a_little(array):
    for _ in range(1000):
        array += b"0123456789"


def double(array):
    array += bytes(len(array) * 2)


def snapshot(collector=None):
    profile = asyncio.run(
        (collector or HeapCollector(heap_sampler, heap_tracing, Peaks())).snapshot()
    )()
    check_valid(profile)
    return profile


def of(profile, function, size=None, **having):
    """Return the summed values of the samples whose leaf is in a function or nested in it."""
    values = [
        sample.values
        for sample in profile.samples
        if f".{function}" in sample.stack[0].function.name
        and (size is None or dict(sample.labels)["bytes"] == size_class(size))
        and having.items() <= dict(sample.labels).items()
    ]
    return tuple(map(sum, zip(*values, strict=True))) or (0, 0, 0, 0)


# Every block is sampled


@pytest.mark.usefixtures("every_block")
@pytest.mark.parametrize("size", [100, 479, 480, 900, 5_000, 100_000, 2_000_000])
def test_every_block_is_counted_with_its_size(size):
    """Objects and bytes are exact, below and above pymalloc's limit."""
    kept = keep_blocks(25, size)
    counted = of(snapshot(), "keep_blocks", size + HEADER)
    whole = 25 * (size + HEADER)
    assert counted[2:] == (25, whole)
    if size > 400:  # a smaller size class has blocks of other code too
        assert counted[:2] == (25, whole)
    del kept


@pytest.mark.usefixtures("every_block")
def test_freed_blocks_are_not_in_use_but_stay_allocated():
    """The live numbers fall to 0, the allocated ones never fall."""
    kept = keep_blocks(10, 900)
    before = snapshot()
    del kept
    after = snapshot()
    assert of(before, "keep_blocks", 900 + HEADER) == (10, 9000 + 10 * HEADER) * 2
    assert of(after, "keep_blocks", 900 + HEADER) == (10, 9000 + 10 * HEADER, 0, 0)
    assert of(subtract(after, before), "keep_blocks", 900 + HEADER)[:2] == (0, 0)
    assert of(subtract(after, before), "keep_blocks", 900 + HEADER)[2] == -10


@pytest.mark.usefixtures("every_block")
def test_a_growing_list_is_counted_in_full_at_the_line_that_appends():
    """Its storage moves many times, and only the latest storage is live."""
    into = []
    grow(into, 100_000)
    storage = sys.getsizeof(into) - sys.getsizeof([])
    profile = snapshot()
    alloc_objects, alloc_bytes, live_objects, live_bytes = of(profile, "grow")
    assert (live_objects, live_bytes) == (1, storage)
    assert alloc_objects > 20
    assert alloc_bytes > storage
    (line,) = {
        place.line
        for sample in profile.samples
        for place in sample.stack[:1]
        if place.function.name.endswith(".grow") and sample.values[2]
    }
    assert line == grow.__code__.co_firstlineno + 2
    del into[10:]
    storage = sys.getsizeof(into) - sys.getsizeof([])
    assert of(snapshot(), "grow")[2:] == (1, storage)
    into.clear()
    assert of(snapshot(), "grow")[2:] == (0, 0)


@pytest.mark.usefixtures("every_block")
def test_a_growing_bytearray_is_counted_in_full():
    """It grows in small steps in one function, and doubles in another."""
    array = bytearray()
    grow_a_little(array)
    assert of(snapshot(), "grow_a_little")[2:] == (1, array.__alloc__())
    double(array)
    profile = snapshot()
    assert of(profile, "grow_a_little")[2:] == (0, 0)
    assert of(profile, "double")[2:] == (1, array.__alloc__())


@pytest.mark.usefixtures("every_block")
def test_zeroed_memory_is_counted():
    """bytes(n) uses calloc, and a copy uses malloc."""

    def zeroed():
        return [bytes(7000) for _ in range(10)]

    def copied(blocks):
        return [bytes(bytearray(block)) for block in blocks]

    blocks = zeroed()
    copies = copied(blocks)
    profile = snapshot()
    assert of(profile, "zeroed", 7000 + HEADER)[2:] == (10, 10 * (7000 + HEADER))
    assert of(profile, "copied", 7000 + HEADER)[2:] == (10, 10 * (7000 + HEADER))
    del blocks, copies


@pytest.mark.usefixtures("every_block")
def test_blocks_freed_by_another_thread_are_gone():
    """Any thread may free a block."""
    kept = [keep_blocks(50, 3000)]
    thread = threading.Thread(target=kept.clear)
    thread.start()
    thread.join()
    whole = 50 * (3000 + HEADER)
    assert of(snapshot(), "keep_blocks", 3000 + HEADER) == (50, whole, 0, 0)


@pytest.mark.usefixtures("every_block")
def test_many_blocks_are_told_apart():
    """The table grows for 100,000 live blocks, and forgets them when they are freed."""
    whole = 100_000 * (200 + HEADER)
    kept = keep_blocks(100_000, 200)
    assert of(snapshot(), "keep_blocks", 200 + HEADER) == (100_000, whole, 100_000, whole)
    del kept[::2]
    assert of(snapshot(), "keep_blocks", 200 + HEADER)[2:] == (50_000, whole // 2)
    del kept
    profile = snapshot()
    assert of(profile, "keep_blocks", 200 + HEADER) == (100_000, whole, 0, 0)
    assert not any(comment.startswith("lost") for comment in profile.comments)


def test_samples_are_scaled_to_what_they_stand_for():
    """At one sample per 4 KiB the estimate is within six standard errors of the truth."""
    heap_sampler.enable(4096)
    try:
        kept = keep_blocks(40_000, 967)
        profile = scale_sampled(snapshot())
        counted = of(profile, "keep_blocks", 967 + HEADER)
        del kept
    finally:
        heap_sampler.disable()
    assert profile.period == 4096
    taken = 40_000 * (1 - math.exp(-1000 / 4096))
    for value, truth in zip(counted, (40_000, 40_000_000) * 2, strict=True):
        assert value == pytest.approx(truth, rel=6 / math.sqrt(taken))


# Counters


@pytest.mark.usefixtures("every_block")
def test_counters_are_exact():
    """Blocks, bytes and frees grow by the known numbers."""
    before = heap_sampler.counters()
    kept = list(map(bytes, itertools.repeat(1000, 10_000)))
    between = heap_sampler.counters()
    del kept
    after = heap_sampler.counters()
    assert 10_000 <= between.mallocs - before.mallocs < 10_300  # the list allocates too
    assert between.total_bytes - before.total_bytes >= 10_000 * (1000 + HEADER)
    assert 10_000 <= after.frees - between.frees < 10_300
    assert after.mallocs >= after.frees


@pytest.mark.parametrize("rate", [1, 512 * 1024])
def test_counters_outlive_their_threads_and_never_fall(rate):
    """Each thread has counters of its own, which are summed over all threads that ever ran."""
    heap_sampler.enable(rate)
    try:
        last = heap_sampler.counters()
        for _ in range(20):
            thread = threading.Thread(target=keep_blocks, args=(1000, 600))
            thread.start()
            thread.join()
            now = heap_sampler.counters()
            assert now.mallocs - last.mallocs >= 1000
            assert now.frees - last.frees >= 1000
            assert now.total_bytes - last.total_bytes >= 600_000
            last = now
    finally:
        heap_sampler.disable()


FAILING = {
    "malloc": "bytearray(2**62)",
    "calloc": "bytes(2**62)",
    "realloc": "array.extend(Wide(2**58))",
    "malloc below the limit": "bytearray(300 * MB)",
    "calloc below the limit": "bytes(300 * MB)",
    "realloc below the limit": "array.extend(Wide(300 * MB // 8))",
}


@pytest.mark.parametrize("rate", [1, 512 * 1024, 2**62])
@pytest.mark.parametrize("code", FAILING.values(), ids=FAILING.keys())
def test_allocations_that_fail_are_not_counted(code, rate):
    """No memory has been allocated, nor has the block that was to be resized been freed."""
    run_program(
        f"""
        import resource
        from asgi_pprof.recorders import heap_sampler
        from asgi_pprof.runtime.proc import proc_status

        MB = 2**20
        class Wide:
            def __init__(self, length): self.length = length
            def __length_hint__(self): return self.length
            def __iter__(self): return iter(())
        array = [None] * 1000
        used = proc_status()["VmData"]
        resource.setrlimit(resource.RLIMIT_DATA, (used + 200 * MB, resource.RLIM_INFINITY))

        def fail():
            for _ in range(50):
                try:
                    {code}
                except MemoryError:
                    continue
                raise AssertionError("it worked")

        heap_sampler.enable({rate})
        fail()
        before = heap_sampler.counters()
        fail()
        after = heap_sampler.counters()
        heap_sampler.disable()
        assert 0 <= after.total_bytes - before.total_bytes < 50_000, (before, after)
        mallocs, frees = after.mallocs - before.mallocs, after.frees - before.frees
        assert abs(mallocs - frees) < 20, (before, after)
        """
    )


# Labels


@pytest.mark.usefixtures("every_block")
def test_samples_keep_their_labels_after_the_with_has_ended():
    """Living, ended and inherited labels are on the samples; outside there are none."""

    async def keep_in_task():
        return keep_blocks(3, 1000)

    async def main():
        kept = []
        with labels(tenant="gone"):
            kept += keep_blocks(3, 1000)
        with labels(tenant="task"):
            task = asyncio.create_task(keep_in_task())
        with labels(tenant="worker"):
            kept += await asyncio.to_thread(keep_blocks, 3, 1000)
        with labels(tenant="thread"):
            context = contextvars.copy_context()
        thread = threading.Thread(target=lambda: kept.extend(context.run(keep_blocks, 3, 1000)))
        thread.start()
        thread.join()
        kept += await task + keep_blocks(3, 1000)
        with labels(tenant="alive"):
            kept += keep_blocks(3, 1000)
            make = await HeapCollector(heap_sampler, heap_tracing, Peaks()).snapshot()
        return make(), kept

    profile, kept = asyncio.run(main())
    whole = 3 * (1000 + HEADER)
    for tenant in ("gone", "task", "worker", "thread", "alive"):
        counted = of(profile, "keep_blocks", 1000 + HEADER, tenant=tenant)
        assert counted == (3, whole, 3, whole), tenant
    assert of(profile, "keep_blocks", 1000 + HEADER)[2] == 18
    del kept


@pytest.mark.usefixtures("every_block")
@pytest.mark.parametrize("ended", [True, False])
def test_a_route_that_becomes_known_later_labels_earlier_samples(ended):
    """It does not matter whether the request has ended."""

    class Route:
        path = "/carts/{cart}"

    scope = {"type": "http", "method": "PUT", "headers": []}
    token = current.set(RequestLabels(scope))
    kept = keep_blocks(5, 1000)
    scope["route"] = Route()
    if ended:
        current.reset(token)
    found = of(snapshot(), "keep_blocks", 1000 + HEADER, method="PUT", route="/carts/{cart}")
    if not ended:
        current.reset(token)
    assert found[2] == 5
    del kept


def test_thousands_of_requests_at_once_keep_their_labels():
    """With 5,000 living tasks that have labels, memory is bounded and no sample is lost."""
    program = """
    import asyncio
    from asgi_pprof import labels
    from asgi_pprof.recorders import heap_sampler, heap_tracing
    from asgi_pprof.native.core import native

    def keep(number):
        return bytes(1000)

    async def work(number):
        with labels(number=number):
            kept = keep(number)
            arrived.append(number)
            await over.wait()
            return kept

    async def main():
        tasks = [asyncio.create_task(work(number)) for number in range(5000)]
        while len(arrived) < 5000:
            await asyncio.sleep(0)
        heap = heap_sampler.copy()
        found = [
            s
            for s in heap.samples()
            if s.stack[0].function.name.endswith("keep") and dict(s.labels)["bytes"] == 1152
        ]
        print(sum(s.values[2] for s in found))
        print(len({dict(s.labels)["number"] for s in found if "number" in dict(s.labels)}))
        print(*heap.comments, sep="|")
        over.set()
        await asyncio.gather(*tasks)

    arrived, over = [], asyncio.Event()
    heap_sampler.enable(1)
    asyncio.run(main(), debug=False)
    heap_sampler.copy().samples()
    heap_sampler.disable()
    """
    blocks, labelled, comments = run_program(program).splitlines()
    assert int(blocks) == int(labelled) == 5000
    assert "label" not in comments


@pytest.mark.slow
@pytest.mark.oldest_and_newest
def test_freed_memory_loses_its_labels_when_there_are_too_many():
    """New labels and those of live memory are kept, and a comment counts the lost ones."""
    program = """
    from asgi_pprof import labels
    from asgi_pprof.native.label_interner import book
    from asgi_pprof.recorders import heap_sampler

    def make():
        return bytes(3000)

    def live(**label):
        having = {"bytes": 3072, **label}.items()
        return sum(s.values[2] for s in heap_sampler.copy().samples()
                   if having <= dict(s.labels).items())

    heap_sampler.enable(1)
    with labels(user="first"):
        kept = [make() for _ in range(100)]
    for user in range(70_000):
        with labels(user=user):
            make()
    with labels(route="/new"):
        kept += [make() for _ in range(100)]
    heap = heap_sampler.copy()
    print(live(user="first"), live(route="/new"))
    print(sum(s.values[0] for s in heap.samples() if dict(s.labels).get("bytes") == 3072))
    print(*heap.comments[1:])
    heap_sampler.disable()
    """
    labelled, made, comments = run_program(program).splitlines()
    assert labelled == "100 100"
    assert int(made) >= 70_200
    assert re.fullmatch(
        r"unlabelled: \d+ past allocations without their labels, too many different ones", comments
    )


@pytest.mark.slow
@pytest.mark.oldest_and_newest
def test_freed_memory_loses_its_stacks_when_there_are_too_many():
    """All sums and all live memory stay right, and new stacks are recorded."""
    program = """
    import contextvars
    from asgi_pprof import labels
    from asgi_pprof.native.core import native
    from asgi_pprof.recorders import heap_sampler

    def at(depth, size):
        return at(depth - 1, size) if depth else bytes(size)

    def new_one():
        return bytes(70_000)

    sizes = [*range(16, 512, 16), *(int(600 * 2 ** (i / 8)) for i in range(64))]
    heap_sampler.enable(1)
    kept = [at(3, 70_000) for _ in range(100)]
    contexts = [contextvars.copy_context() for _ in range(20)]
    for number, context in enumerate(contexts):
        context.run(labels(number=number).__enter__)
        for depth in range(100):
            for size in sizes:
                context.run(at, depth, size)
    big = [new_one() for _ in range(100)]
    stats = native.heap_stats()
    samples = heap_sampler.copy().samples()
    print(sum(s.values[0] for s in samples) / stats["mallocs"])
    print(sum(s.values[2] for s in samples if s.stack[0].function.name.split(".")[-1] == "at"
              and dict(s.labels).get("bytes") == 73728))
    print(sum(s.values[2] for s in samples if s.stack[0].function.name.endswith("new_one")))
    print(stats["unnamed"] > 10_000, stats["lost"])
    lost = sum(s.values[0] for s in samples if "lost" in s.stack[0].function.name)
    print(lost == stats["unnamed"])
    heap_sampler.disable()
    """
    share, kept, new, unnamed, same = run_program(program).splitlines()
    assert float(share) == pytest.approx(1, rel=0.02)
    assert (kept, new, unnamed, same) == ("100", "100", "True 0", "True")


@pytest.mark.slow
@pytest.mark.oldest_and_newest
def test_memory_that_grows_while_stacks_are_moved_keeps_its_stack():
    """This holds whichever table its bucket is in, and again after the next move."""
    program = """
    from asgi_pprof.native.core import native
    from asgi_pprof.recorders import heap_sampler

    def fill(prefix):
        number = 0
        while not native.heap_compact(1):
            names = {}
            source = f"def {prefix}{number}():\\n return [{number}, {number}.5], {number}.5 * 2"
            exec(compile(source, f"<{prefix}{number}>", "exec"), names)
            names[f"{prefix}{number}"]()
            number += 1

    def keep(size):
        return bytearray(size)

    def live():
        return sum(s.values[2] for s in heap_sampler.copy().samples()
                   if any(each.function.name.endswith("keep") for each in s.stack)
                   and dict(s.labels)["bytes"] > 50_000)

    heap_sampler.enable(1)
    kept = [keep(60_000 + 5_000 * (number % 9)) for number in range(90)]
    print(live())
    for prefix in "ab":
        fill(prefix)
        for number, each in enumerate(kept):
            each.extend(bytes(9_000 + 100 * (number % 10)))
            native.heap_compact(1)
        while native.heap_compact(1):
            pass
        print(live())
    heap_sampler.disable()
    """
    assert run_program(program).split() == ["90", "90", "90"]


@pytest.mark.slow
@pytest.mark.oldest_and_newest
def test_new_names_are_known_after_any_number_of_others():
    """A service may create functions for ever. Names that live memory needs are kept."""
    program = """
    from asgi_pprof.native.core import native
    from asgi_pprof.recorders import heap_sampler

    def make(prefix, count):
        for number in range(count):
            names = {}
            source = f"def {prefix}{number}():\\n return [{number}, {number}.5], {number}.5 * 2"
            exec(compile(source, f"<{prefix}{number}>", "exec"), names)
            yield names[f"{prefix}{number}"]()

    def kept_at_first():
        return bytes(70_000)

    def long_function():
        source = "def long():\\n" + " x = 1\\n" * 10_000 + " return bytes(70_000)\\n"
        names = {}
        exec(compile(source, "<long>", "exec"), names)
        return names["long"]

    def live(name):
        found = {(each.line, s.values[2]) for s in heap_sampler.copy().samples()
                 for each in s.stack if each.function.name.endswith(name) and s.values[2]
                 and dict(s.labels).get("bytes") == 73728}
        return sorted(found)

    heap_sampler.enable(1)
    long = long_function()
    kept = [kept_at_first(), long()]
    before = live("kept_at_first"), live("long")
    for round in range(4):
        for _ in make(f"made{round}_", 10_000):
            pass
        def new_one():
            return bytes(70_000)
        kept.append(new_one())
        print(len(live("new_one")), (live("kept_at_first"), live("long")) == before)
    print(before[1])
    heap_sampler.disable()
    """
    *rounds, long = run_program(program).splitlines()
    assert rounds == ["1 True"] * 4
    assert long == "[(10002, 1)]"


@pytest.mark.oldest_and_newest
def test_new_names_are_known_though_nobody_reads_the_samples():
    """Room is made while memory is allocated; else the first profile would lack the new names."""
    program = """
    from asgi_pprof.native.core import native
    from asgi_pprof.recorders import heap_sampler
    from tests.soak.generated import make_chain

    def kept_at_first():
        return bytes(70_000)

    heap_sampler.enable(1)
    kept = [kept_at_first()]
    for tag in range(16_000):
        make_chain(tag)(1)
    def new_one():
        return bytes(70_000)
    kept.append(new_one())
    heap = heap_sampler.copy()
    for name in ("kept_at_first", "new_one"):
        print(sum(s.values[2] for s in heap.samples() if dict(s.labels).get("bytes") == 73728
                  and any(each.function.name.endswith(name) for each in s.stack)))
    heap_sampler.disable()
    """
    assert run_program(program, timeout=120) == "1\n1\n"


def test_labels_that_live_long_leave_room_for_others():
    """A background task that allocates much under its labels does not displace other labels."""
    program = """
    import contextvars
    from asgi_pprof import labels
    from asgi_pprof.recorders import heap_sampler, heap_tracing

    def churn(count):
        for _ in range(count):
            bytes(5000)

    def keep():
        return [bytes(1000) for _ in range(100)]

    def total(function, size, **having):
        found = [s.values for s in heap_sampler.copy().samples()
                 if function in s.stack[0].function.name and dict(s.labels)["bytes"] == size
                 and having.items() <= dict(s.labels).items()]
        return tuple(sum(values[at] for values in found) for at in (0, 2))

    heap_sampler.enable(1)
    background = contextvars.copy_context()
    background.run(labels(job="for ever").__enter__)
    background.run(churn, 30_000)
    with labels(tenant="acme"):
        kept = keep()
        print(total("keep", 1152, tenant="acme"))
    print(total("keep", 1152, tenant="acme"))
    print(total("churn", 5120, job="for ever"))
    print([comment for comment in heap_sampler.copy().comments if "unlabelled" in comment])
    heap_sampler.disable()
    """
    assert run_program(program).splitlines() == ["(100, 100)", "(100, 100)", "(30000, 0)", "[]"]


def test_labels_that_live_longer_than_the_sampler_are_released():
    """The sampler restarts while sets are alive, and their old numbers become invalid."""
    token = current.set(None)
    with labels(tenant="acme"):
        for _ in range(3):
            heap_sampler.enable(1)
            kept = keep_blocks(3, 1000)
            counted = of(snapshot(), "keep_blocks", 1000 + HEADER, tenant="acme")
            heap_sampler.disable()
            assert counted[:1] == (3,)
            del kept
    current.reset(token)
    assert native.heap_pending() == []


# On and off


def counted_in(work):
    before = native.heap_stats()["mallocs"]
    work()
    return native.heap_stats()["mallocs"] - before


def test_two_apps_share_the_sampler_and_the_last_one_stops_it():
    """The first app's rate applies. When the last one closes, hooks are removed."""
    first, second = PprofApp(memory_profile_rate=1), PprofApp(memory_profile_rate=4096)
    assert native.heap_stats()["rate"] == 1
    first.close()
    assert native.heap_stats()["rate"] == 1
    assert counted_in(lambda: keep_blocks(100, 1000)) >= 100
    second.close()
    assert native.heap_stats()["rate"] == 0
    assert counted_in(lambda: keep_blocks(100, 1000)) == 0
    assert heap_sampler.counters() is None
    second.open()
    assert native.heap_stats()["rate"] == 4096
    second.close()
    second.close()
    first.close()
    assert native.heap_stats()["rate"] == 0


def test_rate_0_is_off_and_says_so():
    """There are no hooks and no samples, and the note has the reason."""
    app = PprofApp(memory_profile_rate=0)
    try:
        assert native.heap_stats()["rate"] == 0
        assert (
            "memory_profile_rate is 0" in HeapCollector(heap_sampler, heap_tracing, Peaks()).note()
        )
        profile = snapshot()
        assert not profile.samples
        assert "memory_profile_rate is 0" in profile.comments[0]
    finally:
        app.close()


@pytest.mark.parametrize("rate", [-1, -(10**30), 2**63])
def test_invalid_rates_are_refused(rate):
    """The message has the name of the argument."""
    with pytest.raises(ValueError, match="memory_profile_rate"):
        PprofApp(memory_profile_rate=rate)


def test_an_enormous_rate_samples_next_to_nothing():
    """The counters are exact all the same."""
    heap_sampler.enable(2**62)
    try:
        before = heap_sampler.counters()
        keep_blocks(1000, 1000)
        assert heap_sampler.counters().mallocs - before.mallocs >= 1000
        assert not snapshot().samples
    finally:
        heap_sampler.disable()


def test_a_restart_forgets_all_blocks():
    """Blocks from before are unknown, and an earlier copy names no functions any more."""
    heap_sampler.enable(1)
    kept = keep_blocks(10, 900)
    copy = heap_sampler.copy()
    heap_sampler.disable()
    heap_sampler.enable(1)
    try:
        others = [bytearray(700) for _ in range(300)]
        names = {place.function.name for sample in copy.samples() for place in sample.stack}
        assert names == {"<lost: too many different names>"}
        assert of(snapshot(), "keep_blocks") == (0, 0, 0, 0)
        del kept
        assert of(snapshot(), "keep_blocks") == (0, 0, 0, 0)
        del others
    finally:
        heap_sampler.disable()


@pytest.mark.usefixtures("every_block")
def test_the_comment_says_the_rate_and_since_when():
    """There are no comments about losses in a test as small as this."""
    (comment,) = snapshot().comments
    assert comment.startswith("engine: native, one sample in 1 bytes since 20")


@pytest.mark.usefixtures("every_block")
def test_a_window_needs_no_tracing_while_the_sampler_runs():
    """tracemalloc stays off."""
    collector = HeapCollector(heap_sampler, heap_tracing, Peaks())
    with collector.window():
        assert not tracemalloc.is_tracing()
        before = snapshot(collector)
        kept = keep_blocks(7, 2000)
        after = snapshot(collector)
    whole = 7 * (2000 + HEADER)
    grown = of(subtract(after, before), "keep_blocks", 2000 + HEADER)
    assert grown == (7, whole, 7, whole)
    del kept


# Beside other tools, and at the end of the process

COMMON = """
import asyncio, faulthandler, gc, os, signal, sys, threading, time, tracemalloc
from asgi_pprof import PprofApp, labels
from asgi_pprof.collectors.heap.collector import HeapCollector
from asgi_pprof.recorders import heap_sampler, heap_tracing
from asgi_pprof.collectors.heap.tracing import Peaks
from asgi_pprof.native.core import native

def keep_blocks(count=10, size=900):
    return [bytes(size) for _ in range(count)]

def work():
    kept = keep_blocks(200, 100)
    text = ""
    for number in range(200):
        text += str(number)
    return {number: [number] * 10 for number in range(200)}, kept

def live(size=900):
    "Return how many of keep_blocks' blocks of that size are in the profile."
    collector = HeapCollector(heap_sampler, heap_tracing, Peaks())
    profile = asyncio.run(collector.snapshot(), debug=False)()
    return sum(
        sample.values[2]
        for sample in profile.samples
        if "keep_blocks" in sample.stack[0].function.name
        and size <= dict(sample.labels)["bytes"] < size + 100
    )

def engine():
    return HeapCollector(heap_sampler, heap_tracing, Peaks()).note()
"""

SCENARIOS = {
    "tracemalloc before": """
        tracemalloc.start()
        app = PprofApp(memory_profile_rate=1)
        kept = keep_blocks()
        assert engine() == "engine: tracemalloc"
        assert native.heap_stats()["rate"] == 0
        tracemalloc.stop()
        del kept
        assert engine().startswith("off")
        assert live() == 0
        assert engine() == "engine: native"
        kept = keep_blocks(20)
        assert live() == 20
        app.close()
        assert native.heap_stats()["rate"] == 0
    """,
    "tracemalloc meanwhile": """
        app = PprofApp(memory_profile_rate=1)
        kept = keep_blocks()
        tracemalloc.start()
        more = keep_blocks(5)
        assert engine() == "engine: native"
        assert live() == 15
        snapshot = tracemalloc.take_snapshot()
        assert sum(s.count for s in snapshot.filter_traces(
            [tracemalloc.Filter(True, "<string>")]).statistics("filename")) >= 5
        del kept, snapshot
        assert live() == 5
        tracemalloc.stop()
        again = keep_blocks(7)
        assert live() == 12
        del again, more
        assert live() == 0
        app.close()
        assert native.heap_stats()["rate"] == 0
        before = native.heap_stats()["mallocs"]
        work()
        assert native.heap_stats()["mallocs"] == before
    """,
    "tracemalloc after, left on": """
        app = PprofApp(memory_profile_rate=1)
        kept = keep_blocks()
        tracemalloc.start()
        assert live() == 10
    """,
    "tracemalloc after, the sampler ends first": """
        app = PprofApp(memory_profile_rate=1)
        kept = keep_blocks()
        tracemalloc.start(5)
        app.close()
        assert native.heap_stats()["rate"] == 0
        work()
        assert engine() == "engine: tracemalloc"
        tracemalloc.stop()
        work()
        assert native.heap_stats()["rate"] == 0
        app.open()
        more = keep_blocks(20)
        assert engine() == "engine: native"
        assert live() == 20
        app.close()
        work()
        before = native.heap_stats()["mallocs"]
        work()
        assert native.heap_stats()["mallocs"] == before
    """,
    "tracemalloc on and off": """
        app = PprofApp(memory_profile_rate=1)
        for number in range(15):
            tracemalloc.start(number + 1)
            kept = keep_blocks(number)
            assert live() == number
            tracemalloc.stop()
            del kept
        assert live() == 0
        app.close()
    """,
    "on and off a hundred times": """
        for number in range(100):
            app = PprofApp(memory_profile_rate=1 + number % 3 * 1000)
            kept = keep_blocks()
            if number % 3 == 0:
                assert live() == 10
            app.close()
            assert native.heap_stats()["rate"] == 0
            del kept
    """,
    "on and off a hundred times beside threads": """
        def loop():
            while not over.is_set():
                work()
        over = threading.Event()
        threads = [threading.Thread(target=loop) for _ in range(3)]
        for thread in threads:
            thread.start()
        for number in range(100):
            app = PprofApp(memory_profile_rate=1 + number % 2 * 10_000)
            work()
            heap_sampler.copy().samples()
            app.close()
        over.set()
        for thread in threads:
            thread.join()
    """,
    "faulthandler before": """
        faulthandler.enable()
        app = PprofApp(memory_profile_rate=1)
        native.cpu_start(1000)
        kept = keep_blocks()
        for _ in range(50):
            work()
        native.cpu_stop()
        assert live() == 10
        app.close()
    """,
    "faulthandler after": """
        faulthandler.disable()
        app = PprofApp(memory_profile_rate=1)
        native.cpu_start(1000)
        faulthandler.enable()
        faulthandler.dump_traceback_later(1000)
        kept = keep_blocks()
        for _ in range(50):
            work()
        faulthandler.cancel_dump_traceback_later()
        native.cpu_stop()
        assert live() == 10
        app.close()
    """,
    "exit with all on": """
        app = PprofApp(memory_profile_rate=1)
        kept = keep_blocks()
        native.cpu_start(1000)
        for _ in range(50):
            work()
        assert live() == 10
    """,
    "exit beside daemon threads": """
        def loop():
            while True:
                with labels(tenant="daemon"):
                    work()
        app = PprofApp(memory_profile_rate=1)
        native.cpu_start(1000)
        for _ in range(4):
            threading.Thread(target=loop, daemon=True).start()
        time.sleep(0.5)
    """,
    "exit by os._exit": """
        app = PprofApp(memory_profile_rate=1)
        native.cpu_start(1000)
        threading.Thread(target=work).start()
        work()
        os._exit(0)
    """,
    "exit of a thread": """
        def leave():
            work()
            sys.exit(3)
        app = PprofApp(memory_profile_rate=1)
        native.cpu_start(1000)
        threads = [threading.Thread(target=leave) for _ in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        work()
    """,
    "exit with labels alive": """
        app = PprofApp(memory_profile_rate=1)
        native.cpu_start(1000)
        labels(tenant="for ever").__enter__()
        kept = [work() for _ in range(20)]
        class Last:
            def __del__(self):
                work()
        last = Last()
        last.itself = last
        sys.modules["last"] = last
    """,
    "garbage collected at every step": """
        gc.set_threshold(1, 1, 1)
        app = PprofApp(memory_profile_rate=1)
        native.cpu_start(1000)
        for number in range(10):
            with labels(number=number):
                work()
            heap_sampler.copy().samples()
        native.cpu_stop()
        native.marked_labels()
        app.close()
    """,
    "a reader beside threads that label and allocate": """
        def loop():
            while not over.is_set():
                with labels(number=time.monotonic_ns() % 1000):
                    work()
        over = threading.Event()
        app = PprofApp(memory_profile_rate=1)
        native.cpu_start(1000)
        threads = [threading.Thread(target=loop) for _ in range(4)]
        for thread in threads:
            thread.start()
        end = time.monotonic() + 2
        while time.monotonic() < end:
            heap_sampler.copy().samples()
            native.marked_labels()
        over.set()
        for thread in threads:
            thread.join()
        native.cpu_stop()
        app.close()
    """,
    "memory runs out": """
        import pathlib, resource
        app = PprofApp(memory_profile_rate=1)
        pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
        used = pages * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (used + 64 * 2**20,) * 2)
        kept = []
        try:
            while True:
                kept.append(bytes(2**16))
        except MemoryError:
            count = len(kept)
            del kept
        assert count > 100
        work()
        assert live(2**16) == 0
        app.close()
    """,
}


@pytest.mark.parametrize("name", SCENARIOS)
def test_the_sampler_works_beside_other_tools(name):
    """The results are right, the exit status is 0, and stderr is empty."""
    run_program(COMMON + textwrap.dedent(SCENARIOS[name]))


@pytest.mark.parametrize(
    "allocator",
    ["malloc", "malloc_debug", "debug", "pymalloc", "pymalloc_debug", "default"],
)
@pytest.mark.parametrize(
    "options",
    [
        pytest.param(QUIET, marks=pytest.mark.oldest_and_newest, id="-X dev"),
        pytest.param((), id=""),
    ],
)
def test_the_sampler_works_with_every_allocator(options, allocator):
    """With any PYTHONMALLOC, tracemalloc starts and stops, and the process ends with all on."""
    names = (
        "tracemalloc meanwhile",
        "tracemalloc after, the sampler ends first",
        "exit with all on",
    )
    program = COMMON + "".join(textwrap.dedent(SCENARIOS[name]) for name in names)
    run_program(program, options=options, PYTHONMALLOC=allocator)


def test_an_interrupt_ends_the_program_as_usual():
    """KeyboardInterrupt is raised while both samplers run."""
    program = (
        COMMON
        + """
# The parent of the tests may run in the background, where interrupts are ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
app = PprofApp(memory_profile_rate=1)
native.cpu_start(1000)
threading.Timer(0.3, signal.raise_signal, [signal.SIGINT]).start()
while True:
    work()
"""
    )
    run_program(program, status=-2, errors="KeyboardInterrupt")


INTERPRETERS = """
import os, sys, threading, time
try:
    import _interpreters as interpreters
except ImportError:
    import _xxsubinterpreters as interpreters
from asgi_pprof.recorders import heap_sampler, heap_tracing
from asgi_pprof.native.core import native

def create(own_gil):
    if sys.version_info >= (3, 13):
        return interpreters.create("isolated" if own_gil else "legacy")
    return interpreters.create(**({"isolated": own_gil} if sys.version_info >= (3, 12) else {}))

SOURCE = '''if True:
    import contextvars, time
    variable = contextvars.ContextVar("x")
    end = time.monotonic() + 1
    while time.monotonic() < end:
        variable.set(bytes(600))
        kept = [bytes(n) for n in range(600)], {str(n): [n] for n in range(300)}
        exec("def f(): return [i for i in range(99)]\\\\nf()", {})
'''

def run(interpreter):
    function = getattr(interpreters, "exec", None) or interpreters.run_string
    failed = function(interpreter, SOURCE)
    assert not failed, failed

def keep_blocks(count, size):
    return [bytes(size) for _ in range(count)]
"""


OWN_GILS = pytest.mark.skipif(sys.version_info < (3, 12), reason="interpreters share the GIL")


@pytest.mark.parametrize("own_gil", [pytest.param("1", marks=OWN_GILS), "0"])
def test_other_interpreters_run_beside_both_samplers(own_gil):
    """They have their own GIL (from 3.12 on) or share ours; our blocks are counted exactly."""
    program = (
        INTERPRETERS
        + """
heap_sampler.enable(1)
native.cpu_start(1000)
others = [create(sys.argv[1] == "1") for _ in range(2)]
threads = [threading.Thread(target=run, args=(other,)) for other in others]
for thread in threads:
    thread.start()
kept = keep_blocks(1000, 900)
while any(thread.is_alive() for thread in threads):
    heap_sampler.copy().samples()
    time.sleep(0.1)
for thread in threads:
    thread.join()
for other in others:
    interpreters.destroy(other)
native.cpu_stop()
found = [s for s in heap_sampler.copy().samples()
         if "keep_blocks" in s.stack[0].function.name and dict(s.labels)["bytes"] == 960]
assert sum(s.values[2] for s in found) == 1000, found
rows, _ = native.cpu_read(0, 10**6)
assert sum(row[2] for row in rows) > 0
native.cpu_free()
heap_sampler.disable()
"""
    )
    run_program(program, own_gil, options=("-X", "dev"))
    run_program(program, own_gil, options=())


@OWN_GILS
def test_switching_on_and_off_beside_interpreters_with_their_own_gil():
    """
    Hooks that are installed stay and only delegate, and no hook is installed. CPython changes
    an allocator in several steps, and a thread that calls it meanwhile would read half a pointer.
    """
    program = (
        INTERPRETERS
        + """
def toggle():
    heap_sampler.enable(1 + count % 2 * 4096)
    is_on = heap_sampler.resume()
    heap_sampler.disable()
    return is_on

count, others = 0, [create(True) for _ in range(2)]
if sys.argv[1] == "installed before":
    for other in others:
        interpreters.destroy(other)
    heap_sampler.enable(512)
    others = [create(True) for _ in range(2)]
    heap_sampler.disable()
threads = [threading.Thread(target=run, args=(other,)) for other in others]
for thread in threads:
    thread.start()
were_on = set()
while any(thread.is_alive() for thread in threads):
    count += 1
    were_on.add(toggle())
    assert sys.argv[1] == "installed before" or "GIL" in heap_sampler.why_off()
for thread in threads:
    thread.join()
for other in others:
    interpreters.destroy(other)
assert were_on == {sys.argv[1] == "installed before"}, were_on
assert toggle()
"""
    )
    for when in ("installed before", "not installed"):
        for options in (("-X", "dev"), ("-X", "faulthandler")):
            run_program(program, when, options=options)


# Fork


def test_a_forked_child_starts_again_and_the_parent_goes_on():
    """The child's sampler is off until a profile is requested; the parent's is not affected."""
    program = (
        COMMON
        + """
import traceback, warnings
warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)

def in_the_child():
    assert native.heap_stats()["rate"] == 0
    assert native.heap_pending() == []
    kept.clear()
    work()
    mine = keep_blocks(3)
    assert live() == 0
    assert engine() == "engine: native"
    more = keep_blocks(5)
    assert live() == 5
    app.close()
    assert native.heap_stats()["rate"] == 0
    tracemalloc.start()
    tracemalloc.stop()
    work()

def loop():
    while not over.is_set():
        with labels(number=time.monotonic_ns() % 10):
            work()

over = threading.Event()
thread = threading.Thread(target=loop)
thread.start()
app = PprofApp(memory_profile_rate=1)
native.cpu_start(1000)
kept = keep_blocks()
for _ in range(20):
    child = os.fork()
    if child == 0:
        try:
            in_the_child()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert live() == 10
more = keep_blocks(5)
assert live() == 15
over.set()
thread.join()
app.close()
"""
    )
    run_program(program)


def test_a_forked_child_may_exit_as_any_program_does():
    """The child runs the interpreter's finalization, with atexit."""
    program = (
        COMMON
        + """
app = PprofApp(memory_profile_rate=1)
native.cpu_start(1000)
kept = keep_blocks()
child = os.fork()
work()
if child:
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert live() == 10
"""
    )
    options = (*QUIET, "-W", "ignore::DeprecationWarning")
    run_program(program, options=options)
