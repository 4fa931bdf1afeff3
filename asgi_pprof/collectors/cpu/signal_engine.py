"""
CPU time by stack: the signal engine, pure Python.

What is measured: CPU time of the process from start to stop. The main thread's
is split by stack; that of every other thread is one sample a thread, under a
pseudo-frame that says its stacks are not seen. Labels are those of the context
that ran.

How: ITIMER_PROF raises SIGPROF for every 10 ms of the process's CPU time, and
the handler, which Python runs on the main thread between two bytecodes, notes
that thread's frames. A sample weighs what the main thread's own CPU clock has
counted since the last one, so time in a long C call is charged in full to the
line that called it, and time of other threads is not charged to this one.
Other threads' clocks are read by the second.

What it costs: about 17 to 25 us a sample at 100 samples a CPU second; that
time is left out of the samples and reported in a comment.

What it misses: the stacks of other threads; C functions (their time shows at
the calling line); threads that a C library starts and ends between two looks
are lumped together. While other threads run, the signal comes when they use
CPU and is handled where the main thread gets the GIL back: charging its time
to that stack was measured up to 74 points off, so the time since the last
sample then goes to a pseudo-frame that says so. Code that runs within one
frame of the recursion limit can see its RecursionError early.

Source: setitimer(2), signal(7); CPython, Modules/signalmodule.c.
"""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from types import CodeType, FrameType

from asgi_pprof.collectors.cpu import sigprof
from asgi_pprof.collectors.cpu.wakeup import SignalWakeup
from asgi_pprof.errors import ProfileBusy, ProfileUnavailable
from asgi_pprof.labels import LabelSet, current, resolve
from asgi_pprof.merge import sum_samples
from asgi_pprof.offload import run_in_thread
from asgi_pprof.profile import Profile, Sample, ValueType, pseudo_location
from asgi_pprof.runtime.thread_clocks import ThreadClocks
from asgi_pprof.stacks import MAX_DEPTH, StackCounter, StackKey, name_totals

ENGINE = "signal"

_SAMPLE_TYPES = (ValueType("samples", "count"), ValueType("cpu", "nanoseconds"))
_DRAIN_S = 1.0
_MAX_PENDING = 1024  # ten seconds of a blocked loop
_MAX_STACKS = 65_536  # distinct stacks kept in one profile
_LOST = pseudo_location("lost: too many different stacks")
_NOT_SAMPLED = "stack not sampled by the signal engine"
_CONTENDED = pseudo_location("main thread: stack not known while other threads ran")
# Under uvloop a signal that lands in the loop's C code is handled in the first
# Python code that it wakes, which is ours.
_LOOP_CODE = SignalWakeup.forward.__code__
_IN_LOOP = pseudo_location("event loop: native code")


def is_supported() -> bool:
    """Whether this system has SIGPROF and its timer."""
    return hasattr(signal, "SIGPROF")


async def collect(duration_s: float, stop: asyncio.Event, hz: int) -> Profile:
    """Profile the CPU for some seconds, or until `stop` is set; see `CpuCollector`."""
    sampler = _Sampler(hz)
    start_ns, started = time.time_ns(), time.monotonic_ns()
    clocks = ThreadClocks()
    sampler.start()
    try:
        deadline = started + round(duration_s * 1e9)
        while not stop.is_set() and (left := deadline - time.monotonic_ns()) > 0:
            try:
                await asyncio.wait_for(stop.wait(), min(left / 1e9, _DRAIN_S))
            except TimeoutError:
                pass
            clocks.read()
            sampler.drain()
    finally:
        sampler.stop()
    duration_ns = time.monotonic_ns() - started
    sampler.drain()
    samples, comments = await run_in_thread(lambda: _build(sampler, clocks))
    return Profile(
        sample_types=_SAMPLE_TYPES,
        samples=samples,
        period_type=ValueType("cpu", "nanoseconds"),
        period=sampler.period_ns,
        time_ns=start_ns,
        duration_ns=max(duration_ns, 1),
        comments=comments,
    )


class _Sampler:
    """ITIMER_PROF and its handler: installed by `start`, put back by `stop`."""

    def __init__(self, hz: int) -> None:
        self.hz = hz
        self.period_ns = 1_000_000_000 // hz
        self.stacks = _Stacks(self.period_ns)
        self._installed = False
        self.samples = 0
        self.own_ns = 0
        self.contended_ns = 0
        self.failure = ""
        self._mark_ns = 0
        self._process_mark_ns = 0
        self._pending: list[tuple[int, list[CodeType | int], LabelSet | None]] = []
        self._wakeup = SignalWakeup(ignore=getattr(signal, "SIGPROF", 0))

    def start(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            raise ProfileUnavailable(
                "CPU profiles need an event loop in the main thread of a Unix process:"
                f" the {ENGINE} engine samples with SIGPROF, which Python handles only there"
            )
        sigprof.claim(_is_inherited)
        try:
            self._wakeup.install()
        except ValueError as error:  # a sub-interpreter's main thread
            sigprof.release()
            raise ProfileUnavailable(f"Could not enable CPU profiling: {error}") from error
        except OSError as error:  # no descriptors left; nothing has been changed
            sigprof.release()
            raise ProfileBusy(f"Could not enable CPU profiling: {error}") from error
        self._installed = True
        replaced = signal.signal(signal.SIGPROF, self._on_signal)
        self._replaced = signal.SIG_DFL if _is_inherited(replaced) else replaced
        # Restart interrupted system calls: C libraries in other threads may not.
        signal.siginterrupt(signal.SIGPROF, False)
        self._process_mark_ns = time.process_time_ns()
        self._mark_ns = time.thread_time_ns()
        signal.setitimer(signal.ITIMER_PROF, 1 / self.hz, 1 / self.hz)

    def stop(self) -> None:
        if not self._installed:
            return
        self._installed = False
        # The timer first: a SIGPROF that finds its default action ends the process.
        signal.setitimer(signal.ITIMER_PROF, 0)
        if signal.getsignal(signal.SIGPROF) == self._on_signal:
            # Ignoring it discards one that is still on its way.
            signal.signal(signal.SIGPROF, signal.SIG_IGN)
            signal.signal(signal.SIGPROF, self._replaced)
        sigprof.release()
        self._wakeup.restore()

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        # Runs inside the application. One Python frame deep, and never raises.
        try:
            mark_ns = time.thread_time_ns()
            weight_ns = mark_ns - self._mark_ns
            others_ns = time.process_time_ns() - self._process_mark_ns - weight_ns
            if others_ns * 8 > weight_ns:  # more than noise: they ran, so no stack is kept
                frame = None
                self.contended_ns += weight_ns
            instructions: list[CodeType | int] = []
            append = instructions.append
            depth = 0
            while frame is not None and depth <= MAX_DEPTH:  # one more shows that it was cut
                append(frame.f_code)
                append(frame.f_lasti)
                frame = frame.f_back
                depth += 1
            label_set = current.get() if instructions else None
            note = weight_ns, instructions, label_set
            if len(self._pending) < _MAX_PENDING:
                self._pending.append(note)
            else:  # the loop that drains is blocked: add up here, in bounded memory
                self.stacks.add(*note)
            self._process_mark_ns = time.process_time_ns()
            self._mark_ns = time.thread_time_ns()
            self.samples += 1
            self.own_ns += self._mark_ns - mark_ns
        except Exception as error:
            self.failure = repr(error)  # the error itself would keep frames alive
            signal.setitimer(signal.ITIMER_PROF, 0)

    def drain(self) -> None:
        """Add up what the handler has noted since the last time."""
        pending, self._pending = self._pending, []
        for note in pending:
            self.stacks.add(*note)


def _is_inherited(handler: object) -> bool:
    # A handler that a forked child has from a sampler of its parent is free to take.
    return isinstance(getattr(handler, "__self__", None), _Sampler)


class _Stacks:
    """Samples added up by instructions and labels."""

    def __init__(self, period_ns: int) -> None:
        self.counter = StackCounter(_LOST, _MAX_STACKS)
        self._period_ns = period_ns
        self._carried_ns = 0

    def add(
        self, weight_ns: int, instructions: list[CodeType | int], label_set: LabelSet | None
    ) -> None:
        leaf = None if instructions else _CONTENDED
        if instructions and instructions[0] is _LOOP_CODE:
            leaf, instructions = _IN_LOOP, instructions[2:]
        codes = tuple(part for part in instructions if isinstance(part, CodeType))
        places = tuple(id(part) if isinstance(part, CodeType) else part for part in instructions)
        # Counts are CPU time too, in whole periods: a signal that finds the main
        # thread idle, because another one has used the time, counts nothing.
        count, self._carried_ns = divmod(self._carried_ns + weight_ns, self._period_ns)
        values = count, weight_ns
        self.counter.add(StackKey(places, codes), values, resolve(label_set), leaf)


def _build(sampler: _Sampler, clocks: ThreadClocks) -> tuple[tuple[Sample, ...], tuple[str, ...]]:
    samples = [*name_totals(sampler.stacks.counter.totals())]
    for name, thread_id, cpu_ns in clocks.others():
        if cpu_ns > 0:
            place = pseudo_location(f"{name}: {_NOT_SAMPLED}")
            labels = (("thread_id", thread_id),) if thread_id else ()
            samples.append(Sample((place,), (round(cpu_ns / sampler.period_ns), cpu_ns), labels))
    return sum_samples(samples), tuple(_comments(sampler, clocks))


def _comments(sampler: _Sampler, clocks: ThreadClocks) -> list[str]:
    comments = [
        f"engine: {ENGINE}, main thread at {sampler.hz} Hz of CPU time;"
        " other threads by their CPU clocks",
        f"sampler: {sampler.samples} samples took {sampler.own_ns / 1e6:.1f} ms of CPU",
    ]
    if sampler.contended_ns:
        comments.append(
            f"main thread: {sampler.contended_ns / 1e6:.1f} ms of its CPU have no stack,"
            " because other threads ran at the same time"
        )
    if lost := sampler.stacks.counter.overflowed:
        comments.append(f"lost: {lost} samples, more than {_MAX_STACKS} stacks")
    if sampler.failure:
        comments.append(f"stopped early: the sampler failed with {sampler.failure}")
    return comments
