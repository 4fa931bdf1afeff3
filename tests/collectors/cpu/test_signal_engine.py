"""The signal engine charges time to the code that used it, and restores everything."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from asgi_pprof import labels
from asgi_pprof.collectors.cpu import signal_engine as cpu_signal
from asgi_pprof.errors import ProfileBusy, ProfileUnavailable
from asgi_pprof.runtime.proc import native_thread_ids
from asgi_pprof.runtime.thread_clocks import ThreadClocks
from tests.loops import run
from tests.servers import until
from tests.valid import check_valid


def burn_in_python(seconds):
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        sum(range(500))


def burn_in_one_call():
    return sum(range(8_000_000))


async def profiled(work, seconds=0.0):
    """Return a profile taken while `work` runs on the loop."""
    stop = asyncio.Event()
    profile = asyncio.create_task(cpu_signal.collect(seconds or 60, stop, 100))
    await asyncio.sleep(0.01)
    result = work()
    if asyncio.iscoroutine(result):
        await result
    stop.set()
    return await profile


def cpu_by_function(profile):
    """Return the nanoseconds of each function on the stacks."""
    totals = {}
    for sample in profile.samples:
        for name in {location.function.name.split(".")[-1] for location in sample.stack}:
            totals[name] = totals.get(name, 0) + sample.values[1]
    return totals


def test_time_goes_to_the_function_that_used_it(loop_name):
    """Half a second of CPU time is half a second in a valid profile."""
    profile = run(profiled(lambda: burn_in_python(0.5)), loop_name)
    check_valid(profile)
    assert 0.4e9 < cpu_by_function(profile)["burn_in_python"] < 0.6e9


def test_a_long_c_call_is_charged_in_full():
    """One late sample stands for the whole call, at the line that made it."""
    before = time.thread_time_ns()
    burn_in_one_call()
    cost = time.thread_time_ns() - before
    profile = run(profiled(burn_in_one_call))
    assert cpu_by_function(profile)["burn_in_one_call"] > cost / 2


def test_samples_have_the_labels_of_the_code_that_ran():
    """Each half of the work has its own label."""

    def work():
        for tenant in ("acme", "umbrella"):
            with labels(tenant=tenant):
                burn_in_python(0.3)

    profile = run(profiled(work))
    totals = {}
    for sample in profile.samples:
        tenant = dict(sample.labels).get("tenant")
        totals[tenant] = totals.get(tenant, 0) + sample.values[1]
    assert totals["acme"] > 0.2e9
    assert totals["umbrella"] > 0.2e9
    assert totals.get(None, 0) < 0.2e9


def test_another_threads_time_has_its_own_frame():
    """The frame has the thread's name, and no time goes to stacks of the main thread."""

    async def wait_for_thread():
        await asyncio.to_thread(burn_in_python, 0.6)

    profile = run(profiled(wait_for_thread))
    others = [
        sample for sample in profile.samples if "not sampled" in sample.stack[0].function.name
    ]
    assert sum(sample.values[1] for sample in others) > 0.4e9
    assert cpu_by_function(profile).get("burn_in_python", 0) == 0


def test_no_stack_is_guessed_while_other_threads_run():
    """The main thread's time then has a frame that says that the stack is not known."""

    def both():
        thread = threading.Thread(target=burn_in_python, args=(0.5,))
        thread.start()
        burn_in_python(0.5)
        thread.join()

    profile = run(profiled(both))
    unknown = cpu_by_function(profile)["<main thread: stack not known while other threads ran>"]
    assert unknown > 0.2e9
    assert cpu_by_function(profile).get("burn_in_python", 0) < 0.2e9
    assert any("have no stack" in comment for comment in profile.comments)


def test_everything_is_restored(loop_name):
    """Handler, timer and wakeup descriptor are as before, whatever they were."""

    async def main():
        asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, lambda: None)
        signal.signal(signal.SIGPROF, signal.SIG_IGN)
        before = state()
        await profiled(lambda: burn_in_python(0.05))
        after = state()
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        asyncio.get_running_loop().remove_signal_handler(signal.SIGUSR1)
        return before, after

    def state():
        wakeup = signal.set_wakeup_fd(-1)
        signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
        return signal.getsignal(signal.SIGPROF), signal.getitimer(signal.ITIMER_PROF), wakeup

    before, after = run(main(), loop_name)
    assert before[2] != -1
    assert after == before


def test_signals_of_the_application_still_arrive_while_sampling(loop_name):
    """A handler that was added to the loop runs, because its wakeup byte is forwarded."""

    async def main():
        received = asyncio.Event()
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGUSR1, received.set)
        try:
            await profiled(lambda: raise_and_wait(received))
        finally:
            loop.remove_signal_handler(signal.SIGUSR1)
        return received.is_set()

    async def raise_and_wait(received):
        os.kill(os.getpid(), signal.SIGUSR1)
        await asyncio.wait_for(received.wait(), 20)

    assert run(main(), loop_name)


def test_a_second_profile_at_the_same_time_is_refused():
    """The error has Go's words, and the first profile is not disturbed."""

    async def main():
        stop = asyncio.Event()
        first = asyncio.create_task(cpu_signal.collect(60, stop, 100))
        await asyncio.sleep(0.01)
        with pytest.raises(ProfileBusy, match="cpu profiling already in use"):
            await cpu_signal.collect(1, stop, 100)
        stop.set()
        return await first

    check_valid(run(main()))


def test_a_cancelled_profile_stops_its_sampler():
    """Cancelling the request's task ends the timer, and the next profile can start."""

    async def main():
        profile = asyncio.create_task(cpu_signal.collect(60, asyncio.Event(), 100))
        await asyncio.sleep(0.01)
        assert signal.getitimer(signal.ITIMER_PROF) != (0.0, 0.0)
        profile.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await profile
        assert signal.getitimer(signal.ITIMER_PROF) == (0.0, 0.0)
        return await profiled(lambda: burn_in_python(0.05))

    check_valid(run(main()))


def test_a_handler_of_the_application_is_not_replaced():
    """The profile is refused with the handler's name, and the handler stays."""

    def own(signum, frame):
        pass

    signal.signal(signal.SIGPROF, own)
    try:
        with pytest.raises(ProfileBusy, match="own"):
            run(cpu_signal.collect(1, asyncio.Event(), 100))
        assert signal.getsignal(signal.SIGPROF) is own
    finally:
        signal.signal(signal.SIGPROF, signal.SIG_DFL)


def test_outside_the_main_thread_the_engine_is_unavailable():
    """The error has status 501 and the reason."""
    errors = []

    def elsewhere():
        try:
            run(cpu_signal.collect(1, asyncio.Event(), 100))
        except ProfileUnavailable as error:
            errors.append(error)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    (error,) = errors
    assert error.status == 501
    assert "main thread" in str(error)


def test_a_sampler_that_fails_switches_itself_off_and_says_so(monkeypatch):
    """The application sees no exception; a comment of the profile has the error."""

    class Broken:
        def get(self):
            raise LookupError("no labels today")

    monkeypatch.setattr(cpu_signal, "current", Broken())
    profile = run(profiled(lambda: burn_in_python(0.1)))
    assert any("no labels today" in comment for comment in profile.comments)


def test_too_many_stacks_are_counted_as_lost(monkeypatch):
    """Memory is bounded, and the time of lost samples has a name that says so."""
    monkeypatch.setattr(cpu_signal, "_MAX_STACKS", 0)
    profile = run(profiled(lambda: burn_in_python(0.2)))
    (lost,) = [each for each in profile.samples if "lost" in each.stack[0].function.name]
    assert all(value > 0 for value in lost.values)
    functions = {place.function.name for each in profile.samples for place in each.stack}
    assert not any("burn_in_python" in each for each in functions)
    assert any(comment.startswith("lost: ") for comment in profile.comments)


def test_a_late_signal_does_not_end_the_process():
    """SIGPROF's default action ends a process; this one survives 50 starts and stops under load."""
    program = """
import asyncio, sys, threading, time
from asgi_pprof.collectors.cpu import signal_engine as cpu_signal

def burn():
    while not over.is_set():
        sum(range(1000))

async def main():
    for _ in range(50):
        await cpu_signal.collect(0.03, asyncio.Event(), 100)

over = threading.Event()
sys.setswitchinterval(0.0005)  # otherwise most of the time is spent on waiting for the GIL
threads = [threading.Thread(target=burn) for _ in range(3)]
for thread in threads:
    thread.start()
try:
    asyncio.run(main())
finally:
    over.set()
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_thread_clocks_add_up_to_the_process_clock():
    """Time that no known thread has used is reported under the thread number 0."""

    def short_lived():
        burn_in_python(0.1)

    clocks = ThreadClocks()
    thread = threading.Thread(target=short_lived)
    thread.start()
    thread.join()
    until(
        lambda: thread.native_id not in native_thread_ids()
    )  # join returns a moment before the thread ends
    clocks.read()
    busy = [(thread_id, cpu_ns) for _, thread_id, cpu_ns in clocks.others() if cpu_ns > 0.05e9]
    assert [thread_id for thread_id, _ in busy] == [0], "it ended before anybody looked"


def test_a_start_without_descriptors_changes_nothing(monkeypatch):
    """The error has the reason, everything is as before, and the next start works."""

    async def main():
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGUSR1, lambda: None)
        try:
            before = signal.getsignal(signal.SIGPROF)
            with monkeypatch.context() as patch:
                patch.setattr("os.pipe", _no_descriptors)
                with pytest.raises(ProfileBusy, match="Too many open files"):
                    await cpu_signal.collect(1, asyncio.Event(), 100)
            assert signal.getsignal(signal.SIGPROF) == before
            assert signal.getitimer(signal.ITIMER_PROF) == (0.0, 0.0)
            check_valid(await profiled(lambda: burn_in_python(0.05)))
        finally:
            assert loop.remove_signal_handler(signal.SIGUSR1)

    run(main())


def _no_descriptors():
    raise OSError(24, "Too many open files")


def test_a_blocked_loop_keeps_memory_bounded(monkeypatch):
    """Beyond a number of samples the handler adds them up itself, and no time is lost."""
    monkeypatch.setattr(cpu_signal, "_MAX_PENDING", 3)
    profile = run(profiled(lambda: burn_in_python(0.4)))
    assert cpu_by_function(profile)["burn_in_python"] > 0.3e9
