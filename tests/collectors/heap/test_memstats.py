"""runtime.MemStats: all fields of Go's, and the pauses of the garbage collector."""

import gc
import re
import sys
import time
import tracemalloc
from pathlib import Path

import pytest

from asgi_pprof.collectors.heap.memstats import AllocationCounters, mem_stats, mem_stats_text
from asgi_pprof.runtime.gc_pauses import GcPauses
from asgi_pprof.runtime.memory import read_memory

needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
GOLDEN = Path(__file__).parents[2] / "golden" / "heap_debug1.body"

GO_FIELDS = (
    "Alloc TotalAlloc Sys Lookups Mallocs Frees HeapAlloc HeapSys HeapIdle HeapInuse HeapReleased"
    " HeapObjects StackInuse StackSys MSpanInuse MSpanSys MCacheInuse MCacheSys BuckHashSys GCSys"
    " OtherSys NextGC LastGC PauseTotalNs PauseNs PauseEnd NumGC NumForcedGC GCCPUFraction BySize"
).split()
OTHER_FIELDS = (
    "RSS RSSPythonHeap RSSMalloc RSSThreadStacks RSSMappedFiles RSSProfiler RSSOther HeapSampled"
).split()
IN_A_PAIR = {"StackInuse", "StackSys", "MSpanInuse", "MSpanSys", "MCacheInuse", "MCacheSys"}


def trailer(text):
    """Return the trailer's lines as (name, value)."""
    lines = text[text.index("# runtime.MemStats\n") :].splitlines()
    return [re.fullmatch(r"# (\w+) = (.*)", line).groups() for line in lines[1:]]


def read_mem_stats(gc_pauses, *arguments):
    return mem_stats(read_memory(), gc_pauses, *arguments)


def values(**changes):
    """Return fields with different numbers, so that none can be mistaken for another."""
    numbers = {name: 1_000 + index for index, name in enumerate(read_mem_stats(GcPauses()))}
    numbers |= {"PauseNs": tuple(range(256)), "PauseEnd": tuple(range(256, 512))}
    numbers["BySize"] = ((16, 7, 0), (32, 9, 0))
    return {**numbers, "GCCPUFraction": 0.25, "DebugGC": False, **changes}


@pytest.fixture
def collected():
    """Return a GcPauses that is switched on."""
    timed = GcPauses()
    timed.enable()
    yield timed
    timed.disable()


class TestFields:
    def test_every_field_of_gos_struct_is_there_in_gos_order(self):
        """Further fields are DebugGC and MaxRSS, which Go prints, and ours."""
        assert list(read_mem_stats(GcPauses())) == [
            *GO_FIELDS,
            "DebugGC",
            "MaxRSS",
            *OTHER_FIELDS,
        ]

    def test_every_field_is_printed_once(self):
        """Six of them are printed as pairs, as in Go."""
        names = [name for name, _ in trailer(mem_stats_text(values()))]
        assert sorted(names) == sorted(
            {*GO_FIELDS, "DebugGC", "MaxRSS", *OTHER_FIELDS, "Stack", "MSpan", "MCache"} - IN_A_PAIR
        )

    def test_gos_lines_come_first_and_in_gos_order(self):
        """Parsers of Go's text can read ours."""
        go = [name for name, _ in trailer(GOLDEN.read_text())]
        ours = [name for name, _ in trailer(mem_stats_text(values()))]
        assert len(go) == 27
        assert ours[: len(go)] == go
        assert ours[len(go) :] == ["PauseTotalNs", "BySize", *OTHER_FIELDS]

    def test_every_line_has_the_form_of_gos(self):
        """Digits and brackets are where Go has them."""

        def form(value):
            return re.sub(r"\d+( \d+)*", "N", re.sub(r"\d+\.\d+", "F", value))

        go = [(name, form(value)) for name, value in trailer(GOLDEN.read_text())]
        ours = [(name, form(value)) for name, value in trailer(mem_stats_text(values()))]
        assert ours[: len(go)] == go

    def test_every_value_stands_beside_its_own_name(self):
        """In a pair the number in use comes first, then the system's."""
        stats = values()
        printed = dict(trailer(mem_stats_text(stats)))
        for name in GO_FIELDS:
            if name not in IN_A_PAIR and isinstance(value := stats[name], int):
                assert printed[name] == str(value)
        assert printed["MSpan"] == f"{stats['MSpanInuse']} / {stats['MSpanSys']}"
        assert printed["MCache"] == f"{stats['MCacheInuse']} / {stats['MCacheSys']}"
        assert printed["Stack"] == f"{stats['StackInuse']} / {stats['StackSys']}"
        assert printed["PauseNs"] == "[" + " ".join(map(str, range(256))) + "]"
        assert printed["PauseEnd"] == "[" + " ".join(map(str, range(256, 512))) + "]"
        assert printed["GCCPUFraction"] == "0.25"
        assert printed["BySize"] == "[{16 7 0} {32 9 0}]"

    @pytest.mark.parametrize(("debug", "text"), [(True, "true"), (False, "false")])
    def test_truth_is_written_as_in_go(self, debug, text):
        """Booleans are in lower case."""
        assert dict(trailer(mem_stats_text(values(DebugGC=debug))))["DebugGC"] == text

    def test_every_line_is_a_comment_to_parsers(self):
        """The text ends with a newline."""
        text = mem_stats_text(read_mem_stats(GcPauses()))
        assert text.endswith("\n")
        assert all(line.startswith("# ") for line in text.splitlines())


class TestReading:
    def test_rings_have_256_places(self):
        """They have 256 elements even before the first pause, as in Go."""
        stats = read_mem_stats(GcPauses())
        assert (len(stats["PauseNs"]), len(stats["PauseEnd"])) == (256, 256)

    def test_no_number_is_negative(self):
        """This holds on all platforms."""
        stats = read_mem_stats(GcPauses())
        assert all(number >= 0 for number in stats.values() if not isinstance(number, tuple))

    @needs_linux
    def test_the_system_s_memory_is_the_sum_of_its_parts(self):
        """As in Go, Sys is the sum of the fields whose names end so."""
        stats = read_mem_stats(GcPauses())
        parts = [value for name, value in stats.items() if name.endswith("Sys") and name != "Sys"]
        assert stats["Sys"] == sum(parts) > 0

    @needs_linux
    def test_resident_memory_is_the_sum_of_its_parts(self):
        """Each byte has one name."""
        stats = read_mem_stats(GcPauses())
        parts = [stats[name] for name in OTHER_FIELDS if name.startswith("RSS") and name != "RSS"]
        assert stats["RSS"] == sum(parts)
        assert stats["MaxRSS"] >= stats["RSS"] * 0.9

    def test_allocations_are_those_that_were_counted(self):
        """They come from the sampler's counters, and the estimate has a field of its own."""
        assert (
            read_mem_stats(GcPauses())["HeapSampled"] == read_mem_stats(GcPauses())["Mallocs"] == 0
        )
        stats = read_mem_stats(
            GcPauses(), 2**20, AllocationCounters(mallocs=5, frees=3, total_bytes=2**21)
        )
        assert stats["HeapSampled"] == 2**20
        assert stats["Alloc"] == stats["HeapAlloc"] != 2**20
        assert (stats["Mallocs"], stats["Frees"], stats["TotalAlloc"]) == (5, 3, 2**21)

    def test_what_is_missing_is_said(self):
        """A line each, after all others."""
        text = mem_stats_text(values(), ["small blocks are not known: it rains"])
        assert text.splitlines()[-1] == "# heap: small blocks are not known: it rains"

    def test_tables_of_tracemalloc_are_known_while_it_traces(self):
        """BuckHashSys is Go's name for the profiler's own tables."""
        before = read_mem_stats(GcPauses())["BuckHashSys"]
        tracemalloc.start()
        try:
            stats = read_mem_stats(GcPauses())
        finally:
            tracemalloc.stop()
        assert stats["BuckHashSys"] > before

    def test_debug_flags_of_the_collector_are_told(self):
        """DebugGC is true while any flag is set."""
        assert read_mem_stats(GcPauses())["DebugGC"] is False
        gc.set_debug(gc.DEBUG_UNCOLLECTABLE)
        try:
            assert read_mem_stats(GcPauses())["DebugGC"] is True
        finally:
            gc.set_debug(0)


class TestPauses:
    def test_the_latest_pause_is_where_go_has_it(self, collected):
        """It is at PauseNs[(NumGC+255)%256] after each collection."""
        for generation in (0, 1, 2, 0, 2):
            gc.collect(generation)
            gc.disable()  # no collection between the two
            try:
                before = collected.total_ns
                gc.collect(generation)
                stats = read_mem_stats(collected)
            finally:
                gc.enable()
            latest = (stats["NumGC"] + 255) % 256
            assert stats["PauseNs"][latest] == stats["PauseTotalNs"] - before > 0
            assert stats["PauseEnd"][latest] == stats["LastGC"] == max(stats["PauseEnd"])

    def test_pauses_fill_the_ring_and_go_round(self, collected):
        """After 256 collections each element has a pause, and the oldest are overwritten."""
        gc.disable()
        try:
            for _ in range(300):
                gc.collect(0)
            stats = read_mem_stats(collected)
        finally:
            gc.enable()
        latest = (stats["NumGC"] + 255) % 256
        in_order = stats["PauseEnd"][latest + 1 :] + stats["PauseEnd"][: latest + 1]
        assert all(in_order)
        assert list(in_order) == sorted(in_order)

    def test_the_end_of_a_pause_is_the_time_of_day(self, collected):
        """It is in nanoseconds since 1970, UTC."""
        start = time.time_ns()
        gc.collect()
        assert start <= read_mem_stats(collected)["LastGC"] <= time.time_ns()

    def test_a_pause_is_no_longer_than_the_collection(self, collected):
        """The total grows by less than the time around the collection."""
        start, before = time.perf_counter_ns(), collected.total_ns
        gc.collect()
        assert 0 < collected.total_ns - before < time.perf_counter_ns() - start

    def test_all_collections_are_counted_also_those_before(self, collected):
        """NumGC is the interpreter's own count."""
        before = read_mem_stats(collected)["NumGC"]
        gc.collect()
        gc.collect()
        assert read_mem_stats(collected)["NumGC"] >= before + 2

    def test_collections_that_were_asked_for_are_counted_apart(self, collected):
        """`?gc=1` counts, gc.collect() elsewhere does not."""
        gc.collect()
        assert read_mem_stats(collected)["NumForcedGC"] == 0
        collected.collect()
        stats = read_mem_stats(collected)
        assert stats["NumForcedGC"] == 1
        assert stats["PauseTotalNs"] > 0

    def test_the_share_of_cpu_time_is_a_fraction(self, collected):
        """It is 0 before the first pause, then above 0."""
        assert GcPauses().cpu_fraction() == 0.0
        gc.collect()
        assert read_mem_stats(collected)["GCCPUFraction"] > 0.0

    def test_the_share_of_cpu_time_is_never_above_1(self, collected, monkeypatch):
        """It stays below even if the machine was suspended for a month during a collection."""
        month_ns = 30 * 86_400 * 10**9
        monkeypatch.setattr(GcPauses, "total_ns", property(lambda self: month_ns))
        assert read_mem_stats(collected)["GCCPUFraction"] <= 1.0
