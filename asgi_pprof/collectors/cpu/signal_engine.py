"""
The signal engine: CPU time by stack, in pure Python.

What is measured: CPU time of the process from start to stop. The main thread's
is split by stack; that of every other thread is one sample, under a pseudo-frame
that says that its stacks are not seen. Labels are those of the context that ran.

How: ITIMER_PROF raises SIGPROF for every 10 ms of the process's CPU time, and
Python runs the handler in the main thread between two bytecodes, where it
records that thread's frames. A sample weighs the CPU time that the main thread's
own clock has counted since the last one. So time in a long C call is charged in
full to the line that called it, and time of other threads is not charged to the
main thread. The clocks of other threads are read every second.

What it costs: about 17 to 25 us a sample at 100 samples a CPU second; that
time is left out of the samples and reported in a comment.

What it misses: the stacks of other threads; C functions (their time shows at
the calling line); threads that a C library starts and ends between two readings
of the clocks have one sample together. While other threads run, the signal comes
when they use CPU, and is handled where the main thread gets the GIL back. To
charge that stack was measured up to 74 points off, so the time since the last
sample goes to a pseudo-frame that says so. Code that runs within one frame of
the recursion limit can get its RecursionError early.

Source: setitimer(2), signal(7); CPython, Modules/signalmodule.c.
"""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from types import CodeType, FrameType

from asgi_pprof.collectors.cpu.sigprof import sigprof_claim
from asgi_pprof.collectors.cpu.wakeup import SignalWakeup
from asgi_pprof.collectors.cpu.window import Window
from asgi_pprof.errors import ProfileBusy, ProfileUnavailable
from asgi_pprof.labels import LabelSet, current, resolve
from asgi_pprof.offload import run_in_thread
from asgi_pprof.profile import Profile, pseudo_location
from asgi_pprof.runtime.thread_clocks import ThreadClocks
from asgi_pprof.stacks import MAX_DEPTH, StackCounter, StackKey, name_totals

ENGINE = "signal"

_MAX_PENDING = 1024  # samples in ten seconds of a blocked loop
_MAX_STACKS = 65_536  # distinct stacks kept in one profile
_LOST = pseudo_location("lost: too many different stacks")
_CONTENDED = pseudo_location("main thread: stack not known while other threads ran")
# Under uvloop a signal that arrives in the loop's C code is handled in the first
# Python code that the loop runs next, which is our own.
_LOOP_CODE = SignalWakeup.forward.__code__
_IN_LOOP = pseudo_location("event loop: native code")


def is_supported() -> bool:
    """Return whether this system has SIGPROF and its timer."""
    return hasattr(signal, "SIGPROF")


async def collect(duration_s: float, stop: asyncio.Event, hz: int) -> Profile:
    """Profile the CPU for some seconds, or until `stop` is set; see `CpuCollector`."""
    sampler = _Sampler(hz)
    clocks = ThreadClocks()

    def every_second() -> None:
        clocks.read()
        sampler.drain()

    try:
        sampler.start()
        await sampler.window.wait(duration_s, stop, every_second)
    finally:
        sampler.stop()
    sampler.window.end()
    sampler.drain()
    return await run_in_thread(lambda: _build(sampler, clocks))


class _Sampler:
    """Installs ITIMER_PROF and its handler; `stop` puts back what was there before."""

    def __init__(self, hz: int) -> None:
        self.hz = hz
        self.window = Window(hz)
        self.stacks = _Stacks(self.window.period_ns)
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
        sigprof_claim.claim(_is_inherited)
        try:
            self._wakeup.install()
        except ValueError as error:  # a sub-interpreter's main thread
            sigprof_claim.release()
            raise ProfileUnavailable(f"Could not enable CPU profiling: {error}") from error
        except OSError as error:  # no descriptors left; nothing has been changed
            sigprof_claim.release()
            raise ProfileBusy(f"Could not enable CPU profiling: {error}") from error
        self._installed = True
        replaced = signal.signal(signal.SIGPROF, self._on_signal)
        self._replaced = signal.SIG_DFL if _is_inherited(replaced) else replaced
        # Restart interrupted system calls: C libraries in other threads may not do so.
        signal.siginterrupt(signal.SIGPROF, False)
        self._process_mark_ns = time.process_time_ns()
        self._mark_ns = time.thread_time_ns()
        signal.setitimer(signal.ITIMER_PROF, 1 / self.hz, 1 / self.hz)
        sigprof_claim.guard(self._give_up)

    def _give_up(self) -> None:
        sigprof_claim.unguard()
        self.failure = "the application took SIGPROF for itself"
        self._put_signal_back()

    def stop(self) -> None:
        if not self._installed:
            return
        self._installed = False
        sigprof_claim.unguard()
        self._put_signal_back()
        sigprof_claim.release()
        self._wakeup.restore()

    def _put_signal_back(self) -> None:
        # The timer first: a SIGPROF that finds its default action ends the process.
        signal.setitimer(signal.ITIMER_PROF, 0)
        if signal.getsignal(signal.SIGPROF) == self._on_signal:
            # To ignore the signal discards one that is still pending.
            signal.signal(signal.SIGPROF, signal.SIG_IGN)
            signal.signal(signal.SIGPROF, self._replaced)

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        # Runs inside the application: uses one Python frame only, and never raises.
        try:
            mark_ns = time.thread_time_ns()
            weight_ns = mark_ns - self._mark_ns
            others_ns = time.process_time_ns() - self._process_mark_ns - weight_ns
            if others_ns * 8 > weight_ns:  # more than noise: other threads ran, so keep no stack
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
            sample = weight_ns, instructions, label_set
            if len(self._pending) < _MAX_PENDING:
                self._pending.append(sample)
            else:  # the loop, which drains, is blocked: add up here, in bounded memory
                self.stacks.add(*sample)
            self._process_mark_ns = time.process_time_ns()
            self._mark_ns = time.thread_time_ns()
            self.samples += 1
            self.own_ns += self._mark_ns - mark_ns
        except Exception as error:
            # Not the error itself, which would keep frames alive.
            self.failure = f"the sampler failed with {error!r}"
            signal.setitimer(signal.ITIMER_PROF, 0)

    def drain(self) -> None:
        """Add up the samples that the handler has taken since the last call."""
        pending, self._pending = self._pending, []
        for sample in pending:
            self.stacks.add(*sample)


def _is_inherited(handler: object) -> bool:
    # In a forked child, the handler of a sampler of its parent may be replaced.
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
        # The count is CPU time as well, in whole periods: a signal that comes while the main
        # thread is idle, because another one has used the time, counts as nothing.
        count, self._carried_ns = divmod(self._carried_ns + weight_ns, self._period_ns)
        values = count, weight_ns
        self.counter.add(StackKey(places, codes), values, resolve(label_set), leaf)


def _build(sampler: _Sampler, clocks: ThreadClocks) -> Profile:
    samples = [*name_totals(sampler.stacks.counter.totals())]
    for name, thread_id, cpu_ns in clocks.others():
        if cpu_ns > 0:
            labels = (("thread_id", thread_id),) if thread_id else ()
            samples.append(sampler.window.not_sampled(name, ENGINE, cpu_ns, labels))
    return sampler.window.profile(samples, _comments(sampler, clocks))


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
        comments.append(f"stopped early: {sampler.failure}")
    return comments
