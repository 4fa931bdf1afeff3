"""The profiles block and mutex: rates, windows, and the restoring of what was replaced."""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import replace

import pytest

from asgi_pprof import PprofApp
from asgi_pprof.collectors.contention import threading_waits
from asgi_pprof.collectors.contention.collector import ContentionCollector, ContentionSettings
from asgi_pprof.collectors.contention.lock_classes import RecordedLock
from asgi_pprof.collectors.contention.patches import Target
from asgi_pprof.collectors.contention.recording import block, mutex
from asgi_pprof.collectors.goroutine.collector import TaskCollector
from asgi_pprof.collectors.threads import ThreadCollector
from asgi_pprof.encoders.protobuf import encode
from asgi_pprof.encoders.text import contention_text
from asgi_pprof.recorders import contention, set_block_profile_rate, set_mutex_profile_fraction
from tests.collectors.contention.recorded import (
    KINDS,
    Recorded,
    asking,
    contend_a,
    contend_once,
    identical,
    is_in,
    names,
    patched,
    recording,
    take,
)
from tests.decode import decode
from tests.gotool import flat, go_pprof
from tests.loops import run
from tests.servers import until


@pytest.mark.parametrize("kind", KINDS)
def test_both_profiles_are_off_by_default_and_say_so(kind):
    """They have Go's sample types, period 1 and the time; comment and note say they are off."""
    before_ns = time.time_ns()
    profile = take(kind)
    assert before_ns <= profile.time_ns <= time.time_ns()
    assert [tuple(each) for each in profile.sample_types] == [
        ("contentions", "count"),
        ("delay", "nanoseconds"),
    ]
    assert (tuple(profile.period_type), profile.period) == (("contentions", "count"), 1)
    assert profile.comments[0].startswith("off: ")
    assert ContentionCollector(contention, kind).note().startswith("off: ")


def test_rates_have_gos_meanings():
    """Setting a fraction returns the last one; a negative one only reads. A rate below 1 is off."""
    assert set_mutex_profile_fraction(5) == 0
    assert set_mutex_profile_fraction(-1) == 5
    assert set_mutex_profile_fraction(-1) == 5
    assert set_mutex_profile_fraction(0) == 5
    assert set_mutex_profile_fraction(-1) == 0
    set_block_profile_rate(10)
    assert take("block").comments[0].startswith("on: a sample in 10 ns of waiting")
    set_block_profile_rate(-3)
    assert take("block").comments[0].startswith("off: ")


def test_switching_off_keeps_what_was_recorded():
    """Totals only rise, and nothing is added while a profile is off."""
    with recording() as seen:
        contend_once()
    block, mutex = seen.of("block", "contend_a"), seen.of("mutex", "hold_b")
    contend_once()
    assert seen.of("block", "contend_a") == block
    assert seen.of("mutex", "hold_b") == mutex


def test_switching_on_and_off_restores_the_original_objects():
    """Every attribute is replaced while recording is on, and is the original object afterwards."""
    before = patched()
    for _ in range(200):
        with asking(block=1, mutex=1, wrap_lock_classes=True):
            during = patched()
        assert identical(patched(), before)
    assert [name for name in before if during[name] is before[name]] == []


def test_task_and_thread_stacks_show_no_frames_of_our_wrappers(loop_name):
    """Stacks of a task, a thread and a worker thread are the same while recording is on."""

    async def stacks() -> dict[str, list[str]]:
        lock, gate = asyncio.Lock(), threading.Event()
        await lock.acquire()
        waiting = [
            asyncio.create_task(lock.acquire(), name="for a lock"),
            asyncio.create_task(asyncio.to_thread(gate.wait), name="for a worker"),
        ]
        beside = threading.Thread(target=gate.wait, name="for an event")
        beside.start()
        seen: dict[str, list[str]] = {}
        while sum("Event.wait" in names for names in seen.values()) < 2:
            await asyncio.sleep(0.001)
            for collector in (TaskCollector(), ThreadCollector()):
                for sample in (await collector.snapshot())().samples:
                    labels = dict(sample.labels)
                    name = str(labels.get("task") or labels.get("thread"))
                    if name.startswith("for "):
                        seen[name] = names(sample)
        gate.set()
        lock.release()
        await asyncio.gather(*waiting)
        beside.join()
        return seen

    usual = run(stacks(), loop_name)
    assert len(usual) == 3
    with recording():
        assert run(stacks(), loop_name) == usual


def test_another_librarys_wrapper_around_ours_stays(monkeypatch):
    """While off, ours delegates and records nothing. On again, it records each wait once."""
    # Restores the original method at the end.
    monkeypatch.setattr(threading.Condition, "wait", threading.Condition.wait)
    with recording() as seen:
        ours = threading.Condition.wait

        def theirs(self, timeout=None):
            return ours(self, timeout)

        threading.Condition.wait = theirs
    assert threading.Condition.wait is theirs
    contend_once()
    assert seen.of("block", "contend_a") == (0, 0)
    with recording() as seen:
        contend_once()
    assert seen.of("block", "contend_a")[0] == 1
    assert threading.Condition.wait is theirs


@pytest.mark.parametrize("kind", KINDS)
def test_a_window_switches_on_what_is_off(kind):
    """It records at 10,000 ns or every event, and a comment says so. Then the profile is off."""
    collector, seen, before = ContentionCollector(contention, kind), Recorded(), patched()
    with asking(wrap_lock_classes=True), collector.window(), collector.window():
        with collector.window():
            pass
        contend_once()
        comment = take(kind).comments[0]
        assert threading.Lock is before[f"{threading}.Lock"]
    assert "switched on for this request only" in comment
    assert ("10000 ns" if kind == "block" else "in 1 is") in comment
    assert identical(patched(), before)
    assert seen.of(kind, "contend_a" if kind == "block" else "hold_b")[0] >= 1


def test_a_window_keeps_the_rate_that_is_set():
    """A window of one profile changes neither that profile's rate nor the other's."""
    with recording(block=77, mutex=0), ContentionCollector(contention, "block").window():
        with ContentionCollector(contention, "mutex").window():
            assert take("block").comments[0].startswith("on: a sample in 77 ns")
            assert "this request only" not in take("block").comments[0]
            assert "this request only" in take("mutex").comments[0]
        assert take("mutex").comments[0].startswith("off: ")
        contend_once()


def test_waits_of_a_profile_survive_a_window_of_the_other():
    """A wait that began before a window of mutex is in block when the wait ends."""
    with recording(block=1, mutex=0) as seen:
        lock = threading.Semaphore(0)
        thread = threading.Thread(target=contend_a, args=(lock,))
        thread.start()
        until(lambda: lock._cond._waiters)
        with ContentionCollector(contention, "mutex").window():
            pass
        lock.release()
        thread.join()
    assert seen.of("block", "contend_a")[0] == 1


def test_middlewares_share_the_rates():
    """The last middleware's rate applies. When it is closed, the one before gets its rate back."""
    first, second = ContentionSettings(100, 0), ContentionSettings(200, 3)
    contention.enable(first)
    contention.enable(second)
    assert (contention.rate("block"), contention.rate("mutex")) == (200, 3)
    contention.disable(second)
    assert (contention.rate("block"), contention.rate("mutex")) == (100, 0)
    set_block_profile_rate(5)
    contention.disable(first)
    assert contention.rate("block") == 5
    set_block_profile_rate(0)
    with pytest.raises(ValueError, match="block_profile_rate"):
        PprofApp(block_profile_rate=-1)


def test_rates_may_change_while_all_primitives_are_in_use():
    """Threads and tasks that contend meanwhile lose no step, do not hang, and see no error."""
    counted, stop = Counter(), threading.Event()
    shared = [threading.Lock(), threading.RLock(), threading.Semaphore(), threading.Condition()]
    items: queue.Queue[int] = queue.Queue(2)

    def use(number: int) -> None:
        while not stop.is_set():
            for place in range(len(shared)):
                with shared[place]:
                    before = counted[place]
                    time.sleep(0)
                    counted[place] = before + 1
                counted[number, place] += 1
            items.put(1)
            items.get()

    async def use_in_task(number: int, lock: asyncio.Lock) -> None:
        while not stop.is_set():
            async with lock:
                before = counted["tasks"]
                await asyncio.sleep(0)
                counted["tasks"] = before + 1
            counted[number, "tasks"] += 1

    async def use_in_tasks() -> None:
        lock = asyncio.Lock()
        await asyncio.gather(*(use_in_task(number, lock) for number in range(4)))

    users = [threading.Thread(target=use, args=(number,)) for number in range(4)]
    users.append(threading.Thread(target=asyncio.run, args=(use_in_tasks(),)))
    errors: list[object] = []
    before = patched()
    interval_s = sys.getswitchinterval()
    with pytest.MonkeyPatch.context() as patch, asking(wrap_lock_classes=True):
        patch.setattr(threading, "excepthook", errors.append)
        sys.setswitchinterval(0.0001)  # so that threads interrupt one another more often
        for thread in users:
            thread.start()
        for step in range(300):
            set_block_profile_rate((0, 1, 10_000)[step % 3])
            set_mutex_profile_fraction((0, 1)[step // 2 % 2])
            if step % 10 == 1 and step < 200:
                shared.append(threading.Lock())
            time.sleep(0.001)
        stop.set()
        sys.setswitchinterval(interval_s)
        set_block_profile_rate(0)
        set_mutex_profile_fraction(0)
        for thread in users:
            thread.join(60)
    assert {type(each) for each in shared} > {RecordedLock}
    assert not any(thread.is_alive() for thread in users)
    assert errors == []
    for place in (*range(len(shared)), "tasks"):
        each = [counted[number, place] for number in range(4)]
        assert counted[place] == sum(each)
    assert identical(patched(), before)
    assert (block.lost, mutex.lost) == (0, 0)


def test_a_finalizer_may_change_the_rate_during_a_change(monkeypatch):
    """Its change applies after the first one. Nothing stays wrapped, and nothing is lost."""
    before = patched()
    targets = threading_waits.wait_targets

    def targets_and_a_finalizer():
        set_block_profile_rate(0)
        return targets()

    with monkeypatch.context() as patch:
        patch.setattr(threading_waits, "wait_targets", targets_and_a_finalizer)
        set_block_profile_rate(1)
    assert identical(patched(), before)
    assert contention.rate("block") == 0


def test_importing_changes_nothing():
    """Names and methods are the same objects before and after the import."""
    script = (
        "import asyncio, threading\n"
        "def look(): return threading.Lock, threading.Condition.wait, asyncio.Lock.acquire\n"
        "before = look()\n"
        "import asgi_pprof.collectors.contention.collector\n"
        "assert all(a is b for a, b in zip(before, look()))"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_child_records_its_own_events_only():
    """It does so even if our lock was held at the fork."""
    with recording() as seen:
        contend_once()
        with contention._lock:
            child = os.fork()
        if child == 0:
            status = 1
            with contextlib.suppress(BaseException):
                contend_once()
                samples = take("block").samples
                found = [each.values[0] for each in samples if is_in("contend_a", each)]
                status = 0 if found == [1] else 2
            os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert seen.of("block", "contend_a")[0] == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_child_forked_in_the_middle_of_switching_on_wraps_everything(monkeypatch):
    """Its parent's thread has wrapped the first half, and does not exist there."""
    parent, half, forked = os.getpid(), threading.Event(), threading.Event()
    targets = threading_waits.wait_targets()

    def pause(recording, original):
        if os.getpid() == parent:
            half.set()
            forked.wait(20)
        return original

    middle = Target(threading, "Event", pause)
    monkeypatch.setattr(threading_waits, "wait_targets", lambda: [targets[0], middle, *targets[1:]])
    before = patched()
    thread = threading.Thread(target=set_block_profile_rate, args=(1,))
    thread.start()
    assert half.wait(20)
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            set_block_profile_rate(1)
            now = patched()
            wrapped = [now[f"{each.owner}.{each.name}"] for each in targets]
            ours = [hasattr(each, "__wrapped__") for each in wrapped]
            set_block_profile_rate(0)
            os._exit(0 if all(ours) and identical(before, patched()) else 2)
        os._exit(1)
    forked.set()
    thread.join()
    set_block_profile_rate(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.go
@pytest.mark.parametrize("kind", KINDS)
def test_go_tool_pprof_reads_both_profiles(kind, tmp_path):
    """It prints the protobuf's names, and the same totals from the debug=1 text."""
    with recording() as seen:
        contend_once()
    profile = replace(take(kind), samples=seen.samples(kind))
    (tmp_path / "binary").write_bytes(encode(profile))
    (tmp_path / "text").write_text("".join(contention_text(kind, profile)))
    name = "contend_a" if kind == "block" else "hold_b"
    for index, position in (("contentions", 0), ("delay", 1)):
        option = f"-sample_index={index}"
        # -nodefraction=0 shows the stack however short its wait was.
        options = "-top", "-cum", "-unit=ns", "-nodefraction=0", option
        report = go_pprof(tmp_path, *options, tmp_path / "binary").text
        assert any(function.endswith(name) for function in flat(report)), report
        raw = go_pprof(tmp_path, "-raw", "-symbolize=none", tmp_path / "text").text
        lines = [line.split() for line in raw.partition("delay/nanoseconds\n")[2].splitlines()]
        totals = sum(
            int(line[position].rstrip(":"))
            for line in lines
            if len(line) > 2 and line[1][-1] == ":"
        )
        assert totals == sum(sample.values[position] for sample in profile.samples)
    assert decode(encode(profile))["sample_types"][1] == ("delay", "nanoseconds")
