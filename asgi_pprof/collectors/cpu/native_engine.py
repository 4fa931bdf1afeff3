"""
CPU time by stack, every thread: the native engine.

What is measured: CPU time of every thread that runs Python, by stack, with the
labels of the context that ran. Threads that never run Python (a BLAS pool) are
one sample each, by their own CPU clock.

How: a timer on each thread's CPU clock signals that very thread, and the
handler, in C, notes the interpreter's frames there and then, whoever holds the
GIL. A thread in a C call that has released the GIL is charged to the line that
called it. A sample stands for a whole period, as in Go; the kernel looks at
these timers on its tick (often 250 Hz), and what expired since counts as well.

What it costs: 35 to 70 us a sample, measured and reported in a comment; a
thread without the GIL looks for new threads every 40 ms (0.1 to 0.2 % of one CPU).

What it misses: C functions (their time shows at the calling line); what a
thread does in its first 50 ms; lines may lag by a few bytecodes on 3.14 and
later, where the interpreter does not note each instruction.

Source: asgi_pprof/_native; timer_create(2); Go, runtime/signal_unix.go.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import cast

from asgi_pprof.collectors.cpu import sigprof
from asgi_pprof.errors import ProfileBusy, ProfileUnavailable
from asgi_pprof.merge import sum_samples
from asgi_pprof.native.core import native, reason
from asgi_pprof.native.label_interner import book
from asgi_pprof.native.places import Places
from asgi_pprof.offload import run_in_thread
from asgi_pprof.profile import Label, Profile, Sample, ValueType, pseudo_location
from asgi_pprof.runtime.thread_clocks import ThreadClocks

ENGINE = "native"

_SAMPLE_TYPES = (ValueType("samples", "count"), ValueType("cpu", "nanoseconds"))
_LOOK_S = 1.0  # how often the clocks of threads without Python are read
_SHORT_NS = 20_000_000  # unexplained time that is not worth a line
_ROWS = 256  # read at a time: the GIL is held meanwhile


def why_not() -> str:
    """Return why this engine cannot serve here, "" if it can."""
    if not native:
        return reason
    try:
        native.check()
    except OSError as error:  # a sandbox that forbids process_vm_readv
        return f"process_vm_readv: {error.strerror}"
    return ""


@dataclass(slots=True)
class _Run:
    """What is known when sampling has ended."""

    hz: int
    clocks: ThreadClocks = field(default_factory=ThreadClocks)
    sampled_threads: set[int] = field(default_factory=set)

    @property
    def period_ns(self) -> int:
        return 1_000_000_000 // self.hz

    def look(self) -> None:
        self.sampled_threads.update(native.cpu_threads())
        self.clocks.read()


async def collect(duration_s: float, stop: asyncio.Event, hz: int) -> Profile:
    """Profile the CPU for some seconds, or until `stop` is set; see `CpuCollector`."""
    sigprof.claim()
    try:
        start_ns, started = time.time_ns(), time.monotonic_ns()
        run = _Run(hz)
        _start(hz)
        deadline = started + round(duration_s * 1e9)
        while not stop.is_set() and (left := deadline - time.monotonic_ns()) > 0:
            try:
                await asyncio.wait_for(stop.wait(), min(left / 1e9, _LOOK_S))
            except TimeoutError:
                pass
            run.look()
    except BaseException:
        native.cpu_stop()
        _let_go()
        raise
    native.cpu_stop()
    duration_ns = time.monotonic_ns() - started
    # Who reads the samples lets them go: the caller may be cancelled meanwhile.
    samples, comments = await run_in_thread(lambda: _build(run))
    return Profile(
        sample_types=_SAMPLE_TYPES,
        samples=samples,
        period_type=ValueType("cpu", "nanoseconds"),
        period=run.period_ns,
        time_ns=start_ns,
        duration_ns=max(duration_ns, 1),
        comments=comments,
    )


def _start(hz: int) -> None:
    try:
        native.cpu_start(hz)
    except RuntimeError as error:
        raise ProfileBusy(f"Could not enable CPU profiling: {error}") from error
    except (OSError, MemoryError) as error:
        raise ProfileUnavailable(f"Could not enable CPU profiling: {error}") from error


def _let_go() -> None:
    native.cpu_free()
    book.forget_cpu()
    sigprof.release()


def _build(run: _Run) -> tuple[tuple[Sample, ...], tuple[str, ...]]:
    try:
        stats = cast("dict[str, int]", native.cpu_stats())
        samples = sum_samples([*_sampled(run.period_ns), *_unsampled(run, stats)])
        return samples, tuple(_comments(run, stats))
    finally:
        _let_go()


def _sampled(period_ns: int) -> Iterator[Sample]:
    places = Places()
    labels = book.by_number(native.marked_labels())
    rows, position = native.cpu_read(0, _ROWS)
    while rows:
        for stack, label_set, periods in rows:
            values = periods, periods * period_ns
            yield Sample(places.stack(stack), values, labels.get(label_set, ()))
        rows, position = native.cpu_read(position, _ROWS)


def _unsampled(run: _Run, stats: Mapping[str, int]) -> Iterator[Sample]:
    rest_ns = run.clocks.process_ns - stats["periods"] * run.period_ns - stats["watcher_ns"]
    for name, thread_id, cpu_ns in run.clocks.threads():
        if cpu_ns > 0 and thread_id not in run.sampled_threads:
            yield _not_sampled(name, cpu_ns, run.period_ns, (("thread_id", thread_id),))
            rest_ns -= cpu_ns
    # A sampled thread may owe up to a period.
    if rest_ns > _SHORT_NS + len(run.sampled_threads) * run.period_ns:
        yield _not_sampled("threads that ended at once", rest_ns, run.period_ns)


def _not_sampled(name: str, cpu_ns: int, period_ns: int, labels: tuple[Label, ...] = ()) -> Sample:
    place = pseudo_location(f"{name}: stack not sampled by the {ENGINE} engine")
    return Sample((place,), (round(cpu_ns / period_ns), cpu_ns), labels)


def _comments(run: _Run, stats: dict[str, int]) -> list[str]:
    comments = [
        f"engine: {ENGINE}, every thread at {run.hz} Hz of its CPU time",
        f"sampler: {stats['samples']} samples took {stats['own_ns'] / 1e6:.1f} ms of CPU,"
        f" looking for threads {stats['watcher_ns'] / 1e6:.1f} ms",
    ]
    if stats["lost"]:
        comments.append(f"lost: {stats['lost']} samples, no room for more different stacks")
    if stats["unreadable"]:
        comments.append(f"unreadable: the stacks of {stats['unreadable']} samples")
    if stats["unsampled"]:
        comments.append(f"threads: {stats['unsampled']} got no timer")
    if stats["displaced"]:
        comments.append("stopped early: the application took SIGPROF for itself")
    return comments
