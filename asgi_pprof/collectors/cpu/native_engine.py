"""
The native engine: CPU time by stack, in every thread.

What is measured: CPU time of every thread that runs Python, by stack, with the
labels of the context that ran. A thread that never runs Python (of a BLAS pool)
is one sample with the time of its CPU clock.

How: a timer on each thread's CPU clock signals that thread, and the signal
handler, in C, records its interpreter frames at once, whoever holds the GIL. A
thread in a C call that has released the GIL is charged to the line that called
it. A sample stands for a whole period, as in Go; the kernel checks these timers
on its tick (often 250 Hz), and periods that ended since the last signal count too.

What it costs: 35 to 70 us a sample, measured and reported in a comment; a
thread without the GIL finds new threads every 40 ms (0.1 to 0.2 % of one CPU),
however many old ones there are. A thread whose samples take more than an eighth
of its CPU time is not sampled meanwhile; that time has a name of its own.

What it misses: C functions (their time shows at the calling line); what a thread
that `threading` does not know does in its first 50 ms, and what a thread does after the
last tick before its end (both have names of their own); lines may lag by a few
bytecodes on 3.14 and later, where the interpreter does not store the position of each
instruction. Of code with thousands of lines that is gone before the profile is read,
the line is 0; beyond 16,384 threads the rest are not sampled, which a comment says.

Source: asgi_pprof/_native; timer_create(2); Go, runtime/signal_unix.go.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from typing import cast

from asgi_pprof.collectors.cpu.sigprof import sigprof_claim
from asgi_pprof.collectors.cpu.thread_begins import thread_begins
from asgi_pprof.collectors.cpu.window import Window
from asgi_pprof.errors import ProfileBusy, ProfileUnavailable
from asgi_pprof.native.core import native, reason
from asgi_pprof.native.label_interner import book
from asgi_pprof.native.places import Places
from asgi_pprof.offload import run_in_thread
from asgi_pprof.profile import Profile, Sample
from asgi_pprof.runtime.thread_clocks import ThreadClocks

ENGINE = "native"

_SHORT_NS = 20_000_000  # less unexplained CPU time than this is not reported
_LATE_NS = 60_000_000  # what a thread may use before it gets a timer, and between two ticks
_ROWS = 256  # read in one call, which holds the GIL


def why_not() -> str:
    """Return why this engine cannot run here, "" if it can."""
    if not native:
        return reason
    try:
        native.check()
    except OSError as error:  # a sandbox that forbids process_vm_readv
        return f"process_vm_readv: {error.strerror}"
    return ""


class _Run:
    """One run of the sampler: what is known when it has ended."""

    def __init__(self, hz: int) -> None:
        self.hz = hz
        self.window = Window(hz)
        self.clocks = ThreadClocks()
        self.sampled: set[int] = set()
        """The threads that have or had a timer, and our watcher."""
        self.periods: dict[int, int] = {}
        """The samples of those that have one, in periods."""

    def read_clocks(self) -> None:
        threads, watcher = native.cpu_threads()
        self.periods = dict(threads)
        self.sampled.update(self.periods, (watcher,))
        self.clocks.read()


async def collect(duration_s: float, stop: asyncio.Event, hz: int) -> Profile:
    """Profile the CPU for some seconds, or until `stop` is set; see `CpuCollector`."""
    sigprof_claim.claim()
    try:
        run = _Run(hz)
        _start(hz)
        thread_begins.on()
        sigprof_claim.guard(native.cpu_yield)
        await run.window.wait(duration_s, stop, run.read_clocks)
    except BaseException:
        thread_begins.off()
        native.cpu_stop()
        _free()
        raise
    thread_begins.off()
    native.cpu_stop()
    sigprof_claim.unguard()
    run.window.end()
    # The thread that reads the samples frees them: the caller may be cancelled meanwhile.
    return await run_in_thread(lambda: _build(run))


def _start(hz: int) -> None:
    try:
        native.cpu_start(hz)
    except RuntimeError as error:
        raise ProfileBusy(f"Could not enable CPU profiling: {error}") from error
    except (OSError, MemoryError) as error:
        raise ProfileUnavailable(f"Could not enable CPU profiling: {error}") from error


def _free() -> None:
    native.cpu_free()
    book.forget_cpu()
    sigprof_claim.release()


def _build(run: _Run) -> Profile:
    try:
        stats = cast("dict[str, int]", native.cpu_stats())
        samples = [*_sampled(run.window.period_ns), *_not_sampled(run, stats)]
        return run.window.profile(samples, _comments(run, stats))
    finally:
        _free()


def _sampled(period_ns: int) -> Iterator[Sample]:
    places = Places()
    labels = book.by_number(native.marked_labels())
    rows, position = native.cpu_read(0, _ROWS)
    while rows:
        for stack, label_set, periods in rows:
            values = periods, periods * period_ns
            yield Sample(places.stack(stack), values, labels.get(label_set, ()))
        rows, position = native.cpu_read(position, _ROWS)


def _not_sampled(run: _Run, stats: Mapping[str, int]) -> Iterator[Sample]:
    period_ns, clocks = run.window.period_ns, run.clocks
    rest_ns = clocks.process_ns - stats["periods"] * period_ns - stats["watcher_ns"]
    # What a thread has used since its last sample, or was sampled too much, is no other thread's.
    own_periods = run.periods.get(clocks.own_id)
    if own_periods is not None:
        rest_ns -= clocks.own_ns - own_periods * period_ns
    for name, thread_id, cpu_ns in clocks.threads():
        unexplained_ns = cpu_ns
        if thread_id in run.sampled:
            if thread_id not in run.periods or thread_id not in clocks.alive:
                continue  # it has ended
            unexplained_ns -= run.periods[thread_id] * period_ns
        rest_ns -= unexplained_ns
        if thread_id not in run.sampled and cpu_ns > 0:
            yield run.window.not_sampled(name, ENGINE, cpu_ns, (("thread_id", thread_id),))
        elif unexplained_ns > _LATE_NS + 2 * period_ns:
            name = f"{name}, which takes no SIGPROF or began a moment ago"
            labels = (("thread_id", thread_id),)
            yield run.window.not_sampled(name, ENGINE, unexplained_ns, labels)
    if rest_ns > _SHORT_NS:
        yield run.window.not_sampled("threads that have ended", ENGINE, rest_ns)


def _comments(run: _Run, stats: dict[str, int]) -> list[str]:
    comments = [
        f"engine: {ENGINE}, every thread at {run.hz} Hz of its CPU time",
        f"sampler: {stats['samples']} samples took {stats['own_ns'] / 1e6:.1f} ms of CPU,"
        f" looking for threads {stats['watcher_ns'] / 1e6:.1f} ms",
    ]
    if stats["lost"]:
        comments.append(f"lost: {stats['lost']} samples, no room for more different stacks")
    if stats["skipped"]:
        comments.append(
            f"skipped: {stats['skipped']} samples, their threads had spent an eighth on sampling"
        )
    if stats["unlabelled"]:
        comments.append(f"unlabelled: {stats['unlabelled']} samples, too many different requests")
    if stats["unreadable"]:
        comments.append(f"unreadable: the stacks of {stats['unreadable']} samples")
    if stats["unsampled"]:
        comments.append(f"threads: {stats['unsampled']} got no timer")
    if stats["displaced"]:
        comments.append("stopped early: the application took SIGPROF for itself")
    return comments
