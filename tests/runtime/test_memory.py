"""The memory of the process: blocks of known size are found again, and the sums are right."""

from __future__ import annotations

import pathlib
import random
import sys
import threading
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asgi_pprof.native.core import native
from asgi_pprof.offload import run_in_thread
from asgi_pprof.runtime import malloc as malloc_module
from asgi_pprof.runtime import memory as memory_module
from asgi_pprof.runtime import small_blocks as small_blocks_module
from asgi_pprof.runtime.malloc import Malloc, read_malloc
from asgi_pprof.runtime.mappings import Mapping, Range, resident_bytes, writable_mappings
from asgi_pprof.runtime.memory import RESIDENT_PARTS, MemoryReader, read_memory
from asgi_pprof.runtime.small_blocks import read_small_blocks
from asgi_pprof.runtime.thread_stacks import thread_stacks
from tests.loops import run
from tests.programs import run_program

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
needs_native = pytest.mark.skipif(native is None, reason="needs the C core")


@pytest.fixture(autouse=True)
def _mallinfo2_may_take_long(monkeypatch):
    """Without the C core it is not asked where malloc has much, as in a test run."""
    monkeypatch.setattr(malloc_module, "_SMALL", 10**12)


MB = 2**20
HEAD = sys.getsizeof(b"") + 24 * sys.flags.dev_mode  # what the debug allocator puts around each


def check(memory):
    """The sums that hold at any moment."""
    assert 0 <= memory.alloc <= memory.inuse <= memory.system
    assert memory.inuse + memory.idle == memory.system
    assert 0 <= memory.released <= memory.idle
    assert 0 < memory.stack_inuse <= memory.stack_system
    assert tuple(memory.parts) == RESIDENT_PARTS
    assert all(size >= 0 for size in memory.parts.values())
    assert sum(memory.parts.values()) == memory.resident > 0
    assert sum(size * count for size, count in memory.by_size) <= memory.alloc
    assert memory.unknown == ()
    return memory


def block_size(size):
    """Return what bytes of this size take: a block of pymalloc's, or of malloc's."""
    size += HEAD
    if size <= 512:
        return -(-size // 16) * 16
    if size < 32 * MB:
        return -(-(size + 8) // 16) * 16
    return -(-(size + 16) // 4096) * 4096  # a mapping of its own


SIZES = st.one_of(
    st.integers(2, 512 - HEAD),
    st.integers(513, 20_000),
    st.integers(20_000, 200_000),
    st.integers(33 * MB, 40 * MB),
)
STEPS = st.lists(st.tuples(SIZES, st.floats(0, 1), st.booleans()), min_size=1, max_size=6)
STEP = 16 * MB


@settings(max_examples=15)
@given(STEPS, st.integers(0, 1000))
def test_known_blocks_are_counted_whatever_is_allocated(steps, seed):
    """
    At each step some 16 MB of blocks of one size are added, and then a part of all is freed.

    That is done in this thread or in another one, whose blocks are in another of malloc's
    arenas. The blocks are within 2 % of the truth, and all sums are right.
    """
    held, rnd = [], random.Random(seed)
    before = check(read_memory())
    for size, kept, in_a_thread in steps:
        number = max(1, STEP // block_size(size))
        if in_a_thread:
            thread = threading.Thread(target=lambda: held.extend(blocks(size, number)))  # noqa: B023
            thread.start()
            thread.join()
        else:
            held.extend(blocks(size, number))
        rnd.shuffle(held)
        del held[int(len(held) * kept) :]
        now = check(read_memory())
        truth = sum(block_size(len(block)) for block in held) + sys.getsizeof(held)
        assert now.alloc - before.alloc == pytest.approx(truth, rel=0.02, abs=MB / 2)
        assert now.objects - before.objects == pytest.approx(len(held), rel=0.02, abs=2000)


def blocks(size, number):
    return [bytes(size) for _ in range(number)]


def test_the_sums_are_right_while_other_threads_allocate():
    """Blocks of all kinds come and go in four threads; the figures stay near the truth."""
    ended = threading.Event()

    def churn(seed):
        rnd = random.Random(seed)
        while not ended.is_set():
            held = [bytes(rnd.choice((40, 300, 700, 5000, 150_000))) for _ in range(50)]
            rnd.shuffle(held)

    before = read_memory()
    threads = [threading.Thread(target=churn, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(30):
            assert abs(check(read_memory()).alloc - before.alloc) < 30 * MB
    finally:
        ended.set()
        for thread in threads:
            thread.join()


def test_what_is_free_inside_the_heap_is_idle():
    """One small block in 400 keeps its pool, and a large one in 2 what is beside it."""
    before = read_memory()
    small = [bytes(100) for _ in range(200_000)]
    large = [bytes(2000) for _ in range(15_000)]
    full = check(read_memory())
    del small[::], large[::2]
    holes = check(read_memory())
    assert full.alloc - before.alloc > 55 * MB
    assert full.alloc - holes.alloc == pytest.approx(
        200_000 * block_size(100) + 7500 * block_size(2000), rel=0.05
    )
    assert holes.system > full.system - 30 * MB  # arenas without blocks are given back
    assert holes.idle - full.idle > 14 * MB


PROGRAM = """
import ctypes, threading
from asgi_pprof.runtime.memory import read_memory

MB = 2**20
libc = ctypes.CDLL(None)
"""


def test_memory_that_malloc_gives_back_is_released():
    """malloc_trim gives back whole pages, in the arenas of other threads as well."""
    run_program(
        PROGRAM
        + """
held, ends = [], []
def hold(number):
    held.extend([bytes(20_000) for _ in range(number)])
    ends.append(bytes(20_000))  # malloc cannot shrink its heap below this

hold(2000)
if IN_THREADS:
    threads = [threading.Thread(target=hold, args=(1000,)) for _ in range(2)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
size = sum(map(len, held))
full = read_memory()
held.clear()
freed = read_memory()
libc.malloc_trim(0)
trimmed = read_memory()
assert freed.idle - full.idle > 0.9 * size, (full, freed)
assert trimmed.resident < freed.resident - 0.9 * size, (freed, trimmed)
assert trimmed.released - freed.released > 0.9 * size, (freed, trimmed)
assert trimmed.parts["malloc"] < freed.parts["malloc"] - 0.9 * size
assert trimmed.inuse + trimmed.idle == trimmed.system
""".replace("IN_THREADS", str(native is not None)),
        MALLOC_TRIM_THRESHOLD_=str(10**9),
    )


def test_a_large_block_that_was_never_written_is_not_resident():
    """It is in use, and in no part of the resident memory."""
    before = read_memory()
    block = bytes(1024 * MB)
    now = check(read_memory())
    assert now.alloc - before.alloc == pytest.approx(len(block), rel=0.01)
    assert now.resident - before.resident < 20 * MB
    assert now.parts["malloc"] - before.parts["malloc"] < 20 * MB


@pytest.mark.parametrize(
    ("part", "code"),
    [
        ("python_heap", "kept = [str(number) for number in range(10**6)]"),
        ("malloc", "kept = [bytes(5000) for _ in range(10_000)]"),
        ("malloc", "kept = bytes(b'x' * 50 * MB)"),
        ("mapped_files", "kept = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ); kept[::4096]"),
        ("other", "kept = mmap.mmap(-1, 50 * MB, flags=PRIVATE); kept.write(b'x' * 50 * MB)"),
    ],
)
def test_resident_memory_is_told_apart(part, code, tmp_path):
    """50 MB of one kind are in the part of that kind, and in no other."""
    (tmp_path / "big").write_bytes(bytes(50 * MB))
    said = run_program(
        PROGRAM
        + f"""
import mmap, sys
PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
with open(sys.argv[1], "rb") as file:
    before = read_memory()
    {code}
    now = read_memory()
for part, size in now.parts.items():
    if size - before.parts[part] > 10 * MB:
        print(part, size - before.parts[part] > 40 * MB)
""",
        str(tmp_path / "big"),
    )
    assert said.split() == [part, "True"]


def test_stacks_of_all_threads_are_counted():
    """Those of Python's threads, of `_thread`, and of a C library."""
    said = run_program(
        PROGRAM
        + """
import _thread, resource, time

def until_more(stacks):
    end = time.monotonic() + 60
    while (now := read_memory()).stack_system - before.stack_system < stacks * size:
        assert time.monotonic() < end, (before, now)
        time.sleep(0.01)

size = 8 * MB
resource.setrlimit(resource.RLIMIT_STACK, (size, resource.getrlimit(resource.RLIMIT_STACK)[1]))
threading.stack_size(size)
before = read_memory()
ended = threading.Event()
threads = [threading.Thread(target=ended.wait, daemon=True) for _ in range(20)]
for thread in threads: thread.start()
until_more(20)
for _ in range(5): _thread.start_new_thread(ended.wait, ())
until_more(25)
for _ in range(5):
    libc.pthread_create(ctypes.byref(ctypes.c_void_p()), None, libc.sleep, ctypes.c_void_p(300))
until_more(29.9)  # one may have been measured while it started
now = read_memory()
assert now.stack_system - before.stack_system < 31 * size
assert now.stack_inuse - before.stack_inuse >= 30 * 4096
assert now.parts["thread_stacks"] == now.stack_inuse <= now.stack_system
ended.set()
for thread in threads: thread.join()
print("counted")
"""
    )
    assert said == "counted\n"


def test_neighbours_without_a_guard_page_between_them_are_told_apart():
    """With newer C libraries stacks are one mapping with other memory; their size is known."""
    ended = threading.Event()
    threads = [threading.Thread(target=ended.wait) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        apart = thread_stacks(writable_mappings())
        *stacks, main = apart
        all_stacks = Range(stacks[0].start - 100 * MB, stacks[-1].end)
        united = [Mapping(all_stacks, ""), Mapping(main, "[stack]")]
        together = thread_stacks(united)
        assert sum(each.size for each in together) == pytest.approx(
            sum(each.size for each in apart), rel=0.3
        )
    finally:
        ended.set()
        for thread in threads:
            thread.join()


@pytest.mark.parametrize("allocator", ["malloc", "debug", "malloc_debug"])
def test_other_allocators_of_python(allocator):
    """All are counted: blocks of malloc's, and what CPython's debug hooks add."""
    run_program(
        PROGRAM
        + """
before = read_memory()
small, large = [bytes(70) for _ in range(100_000)], [bytes(3000) for _ in range(5000)]
now = read_memory()
assert now.unknown == ()
assert 0 <= now.alloc <= now.inuse <= now.system
grown = now.alloc - before.alloc
assert 0.98 * (100_000 * 112 + 5000 * 3040) < grown < 1.25 * (100_000 * 112 + 5000 * 3040), grown
""",
        PYTHONMALLOC=allocator,
    )


@pytest.mark.skipif(sys.version_info < (3, 13), reason="CPython has it since 3.13")
def test_mimalloc_is_not_known():
    """It is said that Python's blocks are missing."""
    said = run_program(
        PROGRAM + "now = read_memory()\nprint(now.by_size, now.unknown[0])", PYTHONMALLOC="mimalloc"
    )
    assert said == "() small blocks are not known: the allocator is not pymalloc\n"


def test_tracemalloc_hides_small_blocks_from_python_alone():
    """CPython tells Python code nothing while allocators are hooked; the C core knows."""
    said = run_program(
        PROGRAM
        + """
import tracemalloc
tracemalloc.start()
now = read_memory()
print(now.unknown, now.alloc > 5 * MB)
""",
        options=("-W", "error"),
    )
    assert said == "() True\n" if native else "tracemalloc, hooks its allocators" in said


@needs_native
def test_the_sampler_s_hooks_hide_nothing():
    """With hooks installed small blocks are counted as without."""
    run_program(
        PROGRAM
        + """
from asgi_pprof.native.core import native
before = read_memory()
native.heap_start(512 * 1024)
kept = [bytes(100) for _ in range(100_000)]
now = read_memory()
assert now.unknown == () and now.by_size, now
assert now.alloc - before.alloc > 14 * MB
native.heap_stop()
"""
    )


class TestAtOnce:
    """What can only be read with the GIL, in one go, is read while it is little."""

    @pytest.mark.skipif(native is not None and sys.version_info >= (3, 12), reason="in steps")
    def test_many_arenas_are_not_read(self):
        """The reason is given."""
        assert not isinstance(read_small_blocks(at_most=500 * MB), str)
        assert "up to 1025 MiB of them" in read_small_blocks(at_most=1025 * MB)

    @pytest.mark.skipif(native is None or sys.version_info < (3, 12), reason="at once")
    def test_in_steps_all_are_read(self):
        """However many there are."""
        assert not isinstance(read_small_blocks(at_most=10**15), str)

    def test_mallinfo2_is_not_asked_about_much(self, monkeypatch):
        """It would hold locks of malloc's for long."""
        monkeypatch.setattr(malloc_module, "native", None)
        monkeypatch.setattr(malloc_module, "_SMALL", 64 * MB)
        heap = Mapping(Range(0, 65 * MB), "[heap]")
        assert "65 MiB" in read_malloc([heap])
        assert isinstance(read_malloc([heap._replace(range=Range(0, 60 * MB))]), Malloc)


@needs_native
def test_malloc_s_lists_say_what_mallinfo2_says():
    """In a program of its own, with free blocks of many sizes in several arenas."""
    run_program(
        PROGRAM
        + """
import random
from asgi_pprof.runtime import malloc as module
from asgi_pprof.runtime.malloc import read_malloc
from asgi_pprof.runtime.mappings import writable_mappings

kept = [bytes(random.randrange(600, 40_000)) for _ in range(4000)]
def add(): kept.extend([bytes(random.randrange(600, 40_000)) for _ in range(1000)])
threads = [threading.Thread(target=add) for _ in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
random.shuffle(kept)
del kept[::2]
kept.append(bytes(50 * MB))
read_malloc(writable_mappings())
info = module._mallinfo2()
found = read_malloc(writable_mappings())
assert found.all_counted
assert abs(found.system - info["arena"]) < MB, (found, info)
assert abs(found.free - info["fordblks"]) < MB / 2, (found, info)
assert abs(found.mapped - info["hblkhd"]) < MB / 2, (found, info)
assert info["fordblks"] > 50 * MB
""",
        options=("-W", "error"),
    )


@needs_native
def test_more_pieces_than_are_counted_are_said(monkeypatch):
    """What is free is then more than the figure."""
    monkeypatch.setattr(malloc_module, "_CHUNKS", 5)
    kept = [bytes(1000) for _ in range(1000)]
    del kept[::2]
    assert read_memory().unknown == (
        "more is free in malloc than is counted: it is in too many pieces",
    )


@pytest.mark.timing
@needs_native
def test_other_threads_allocate_while_free_blocks_are_counted():
    """
    50,000 free blocks take some 0.1 s to count, and no thread waits for that.

    mallinfo2 holds the lock that every allocation of this size needs.
    """
    said = run_program(
        PROGRAM
        + """
import random, time
from asgi_pprof.runtime.malloc import read_malloc
from asgi_pprof.runtime.mappings import writable_mappings

kept = [bytes(random.randrange(1100, 1500)) for _ in range(100_000)]
random.shuffle(kept)
del kept[::2]
read_malloc(writable_mappings())
done = []
def read():
    read_malloc(writable_mappings())
    done.append(True)
thread = threading.Thread(target=read)
thread.start()
libc.malloc.restype = ctypes.c_void_p
rounds = 0
while not done:
    libc.free(ctypes.c_void_p(libc.malloc(100_000)))
    rounds += 1
    time.sleep(0.001)
thread.join()
print(rounds)
""",
        options=("-W", "error"),
    )
    assert int(said) > 10


def test_a_long_reading_serves_for_a_while(monkeypatch):
    """It takes no more than 1 % of a CPU; a short one is made anew each time."""
    readings, used = [], [0.01]
    clock = SimpleNamespace(now=0.0)

    def read():
        readings.append(clock.now)
        return SimpleNamespace(number=len(readings))

    times = SimpleNamespace(
        thread_time=lambda: len(readings) * used[0], monotonic=lambda: clock.now
    )
    monkeypatch.setattr(memory_module, "read_memory", read)
    monkeypatch.setattr(memory_module, "time", times)
    reader = MemoryReader()
    assert [reader.read().number for _ in range(3)] == [1, 2, 3]
    used[0] = 0.5
    readings.clear()
    assert reader.read().number == 1
    clock.now = 49.0
    assert reader.read().number == 1
    clock.now = 51.0
    assert reader.read().number == 2


def test_without_proc_and_glibc_zeros_are_read(monkeypatch):
    """On macOS and Windows nothing is known but pymalloc's blocks, and no error is raised."""
    monkeypatch.setattr("asgi_pprof.runtime.proc.Path", lambda path: pathlib.Path("/nonexistent"))
    monkeypatch.setattr("asgi_pprof.runtime.mappings._MAPS", "/nonexistent")
    monkeypatch.setattr(malloc_module, "native", None)
    monkeypatch.setattr("ctypes.CDLL", lambda name: object())
    now = read_memory()
    assert now.resident == now.stack_system == now.mapped == sum(now.parts.values()) == 0
    assert now.unknown[-1].startswith("malloc's blocks are not known: the C library is not glibc")


def test_pages_that_are_not_mapped_are_not_resident():
    """Memory may go away between two looks."""
    assert resident_bytes([Range(4096, 8192), Range(2**46, 2**46 + 2**30)]) == [0, 0]
    assert resident_bytes([]) == []


def test_the_loop_runs_meanwhile():
    """Reading is for threads; it leaves the loop its turns."""

    async def main():
        return await run_in_thread(read_memory)

    check(run(main()))


def test_the_steps_find_what_cpython_s_own_text_says():
    """The text is parsed without the C core, and on 3.11."""
    text = small_blocks_module._debug_malloc_stats()
    parsed = small_blocks_module._parsed(text)
    found = read_small_blocks(at_most=0)
    assert parsed.system == found.system
    assert parsed.alloc == pytest.approx(found.alloc, rel=0.01)
    assert parsed.inuse == pytest.approx(found.inuse, rel=0.01)
    assert parsed.count == pytest.approx(found.count, rel=0.01)
    assert parsed.larger == pytest.approx(found.larger, rel=0.05)
    sizes = [size for size, _ in parsed.blocks]
    assert sizes == sorted(set(sizes) & set(range(16, 513, 16)))
    assert len(sizes) >= 31  # in development mode there is no block of 16 bytes
